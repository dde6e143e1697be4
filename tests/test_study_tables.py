"""The study's tables and picture: means, what is missing, and the same seeds compared."""

import json
from math import isnan

import pytest
from matplotlib.image import imread


def result(task, kind, factor, seed, score, tag="main", **more):
    return {
        "task": task, "student": kind, "factor": factor, "seed": seed, "tag": tag,
        "scores": {"validation": {"accuracy": score}}, "metric": "accuracy", "start": None,
        "parameters": 2_840_000, "data": f"{task}/train.tsv", "subset": False, "machine": "a chip",
        "versions": {"torch": "2", "transformers": "5"}, "commit": "abcdef1234", "changes": {},
        **({"digest": "d1"} if kind == "teacher" else {"teacher_digest": "d1"}),
        **more,
    }  # fmt: skip


@pytest.fixture
def results(modules):
    """At factor 8 kronbert has three seeds of every task, svd one and none of stsb."""
    full = ("sst2", "mrpc", "rte", "cola", "stsb")
    commonest = {"validation": {"accuracy": 0.5}}
    teachers = [
        {**result(t, "teacher", 1.0, 42, 0.8), "parameters": 22_700_000, "commonest": commonest}
        for t in full
    ]
    runs = [result(t, "kronbert", 8.0, s, 0.7 + 0.01 * s) for t in full for s in (1, 2, 3)]
    runs += [result(t, "svd", 8.0, 1, 0.6) for t in full[:4]]
    runs += [result("sst2", "kronbert", 8.0, s, 0.75, "ema", changes={"ema": 0.9}) for s in (2, 3)]
    return modules.results.Results({"limit": None, "teachers": teachers, "runs": runs})


def rows_of(table):
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()
            if line.startswith("|")]  # fmt: skip


def test_table_shows_means_and_what_is_missing(modules, results):
    head, _, teacher, commonest, *rows = rows_of(modules.tables.full_tasks(results))
    assert head[:4] == ["factor", "student", "parameters", "sst2, accuracy"]
    assert teacher[1:] == ["teacher", "22.700 M", *["80.0"] * 6, "100 %"]
    assert commonest[3:8] == ["50.0"] * 5
    by_name = {row[1]: row for row in rows}
    assert list(by_name) == ["**kronbert**", "truncated SVD"]
    ours = by_name["**kronbert**"]
    assert ours[0] == "8"
    assert ours[3:8] == ["72.0 ± 1.0, 90.0 %"] * 5
    assert ours[8:] == ["72.0 ± 0.4", "90.0 ± 0.6 %"]
    svd = by_name["truncated SVD"]
    assert svd[3] == "60.0 (1 seed), 75.0 %"
    assert svd[7:] == ["not measured"] * 3
    said = modules.tables.full_tasks(results)
    assert said.count("Without a run yet at factor 8: truncated SVD, fitted to data; single") == 1
    assert "student of general text" not in said
    assert said.endswith("; dense, two narrow layers.")
    assert "Machines: a chip; torch 2" in said
    results.runs[0]["precision"] = "bf16"
    both = modules.tables.full_tasks(results)
    assert "Machines: a chip; a chip, bf16 autocast; torch 2" in both
    empty = modules.results.Results({"limit": None, "teachers": [], "runs": []})
    assert modules.tables.full_tasks(empty) == "not measured"
    assert modules.tables.subsets(results) == "not measured"


def test_students_are_held_against_their_own_teachers(modules, results):
    other = {**results.every_teacher[0], "scores": {"validation": {"accuracy": 0.9}}}
    teachers = [*results.every_teacher, {**other, "digest": "d2"}]
    runs = [
        {**row, "teacher_digest": "d2"} if (row["task"], row["seed"]) == ("sst2", 3) else row
        for row in results.runs
    ]
    told = modules.results.Results({**results.content, "teachers": teachers, "runs": runs})
    kept = told.retained("kronbert", 8.0, "sst2")
    assert kept == pytest.approx({1: 0.71 / 0.8, 2: 0.72 / 0.8, 3: 0.73 / 0.9})
    _, _, teacher, *_ = rows_of(modules.tables.full_tasks(told))
    assert teacher[3:5] == ["85.0 ± 7.1 (2 teachers)", "80.0"]


def test_what_is_kept_has_its_standard_error(modules, results):
    errors = {1: 0.01, 2: 0.02, 3: None}
    runs = [
        {**row, "retention_error": errors[row["seed"]]}
        if row["task"] == "sst2" and row["tag"] == "main"
        else row
        for row in results.runs
    ]
    told = modules.results.Results({**results.content, "runs": runs})
    ours = rows_of(modules.tables.full_tasks(told))[4]
    assert ours[3:5] == ["72.0 ± 1.0, 90.0 % (± 1.5)", "72.0 ± 1.0, 90.0 %"]
    told = modules.results.Results(
        {**results.content, "runs": [{**row, "retention_error": 0.01} for row in results.runs]}
    )
    assert rows_of(modules.tables.full_tasks(told))[4][9] == "90.0 ± 0.6 % (± 0.4)"
    said = "percent: student / its teacher, in brackets the standard error of it"
    assert said in modules.tables.full_tasks(told)
    assert "in brackets" not in modules.tables.full_tasks(results)


def test_collect_adds_to_what_was_collected_before(modules, tmp_path):
    def put(folder, row):
        place = tmp_path / folder / row["task"] / f"{row['student']}-{row['seed']}"
        place.mkdir(parents=True)
        asked = {"model": "a model", "limit": None}
        content = {**row, "history": [], "asked": asked}
        (place / "result.json").write_text(json.dumps(content))

    def gather(*sources):
        found = modules.results.collect(
            [tmp_path / name for name in sources], tmp_path / "all.json"
        )
        return {(r["seed"], r["scores"]["validation"]["accuracy"]) for r in found["runs"]}, [
            row["digest"] for row in found["teachers"]
        ]

    first = result("sst2", "teacher", 1.0, 42, 0.8)
    put("old", first)
    put("old", result("sst2", "kronbert", 8.0, 1, 0.7))
    put("old", result("sst2", "kronbert", 8.0, 2, 0.6))
    assert gather("old") == ({(1, 0.7), (2, 0.6)}, ["d1"])
    put("new", {**first, "digest": "d2"})
    put("new", {**result("sst2", "kronbert", 8.0, 2, 0.75), "teacher_digest": "d2"})
    put("new", {**result("sst2", "kronbert", 8.0, 3, 0.65), "teacher_digest": "d2"})
    assert gather("new", "all.json") == ({(1, 0.7), (2, 0.75), (3, 0.65)}, ["d1", "d2"])
    (tmp_path / "old/sst2/kronbert-1/result.json").unlink()
    put("new", {**result("sst2", "kronbert", 8.0, 1, 0.5), "teacher_digest": "d2"})
    assert gather("all.json", "new") == ({(1, 0.5), (2, 0.75), (3, 0.65)}, ["d2"])
    put("spare", first)
    assert gather("all.json", "new", "spare")[1] == ["d2"]
    put("new", {**result("rte", "teacher", 1.0, 42, 0.6), "digest": "d3", "start": "sst2"})
    assert sorted(gather("all.json", "new", "spare")[1]) == ["d1", "d2", "d3"]


def test_short_table_has_students_with_every_task(modules, results):
    head, _, *rows = rows_of(modules.tables.kept(results))
    assert head == ["factor", "student", *modules.settings.FULL, "mean kept"]
    assert rows == [["8", "**kronbert**", *["90.0 %"] * 5, "90.0 ± 0.6 %"]]
    few = [row for row in results.runs if row["task"] != "cola" or row["seed"] == 1]
    told = modules.results.Results({**results.content, "runs": few})
    *_, ours = rows_of(modules.tables.kept(told))
    assert ours[5:] == ["88.8 %", "90.0 %", "89.8 % (1 to 3 seeds)"]
    few = [row for row in results.runs if row["task"] != "cola" or row["seed"] < 3]
    told = modules.results.Results({**results.content, "runs": few})
    *_, ours = rows_of(modules.tables.kept(told))
    assert ours[5:] == ["89.4 %", "90.0 %", "89.9 ± 0.5 % (2 to 3 seeds)"]
    empty = modules.results.Results({"limit": None, "teachers": [], "runs": []})
    assert modules.tables.kept(empty) == "not measured"


def test_notes_of_the_main_runs_are_theirs_alone(modules, results):
    runs = [{**row, "rows": 10, "commit": "abc"} for row in results.runs if row["tag"] == "main"]
    variant = result(
        "sst2", "kronbert", 8.0, 2, 0.75, "long", rows=20, commit="012345678", changes={}
    )
    told = modules.results.Results({**results.content, "runs": [*runs, variant]})
    main, every = modules.tables.full_tasks(told), modules.tables.ablations(told)
    assert "learnt: sst2 10;" in main
    assert "01234567" not in main
    assert "learnt: sst2 10 or 20." in every
    assert "01234567" in every
    many = [{**row, "commit": str(place)} for place, row in enumerate(runs)]
    told = modules.results.Results({**results.content, "runs": many})
    commits = {row["commit"][:8] for row in (*many, *told.every_teacher)}
    assert f"; {len(commits)} commits, in the JSON run by run." in modules.tables.full_tasks(told)


def test_agreement_with_the_teacher_is_averaged_over_seeds(modules, results):
    found = {"sst2": {"agreement": 0.9, "kl": 0.1}, "stsb": {"correlation": 0.98, "rmse": 0.25}}
    runs = [
        {
            **row,
            "fidelity": {"validation": {k: v + row["seed"] / 100 for k, v in found[task].items()}},
        }
        if (task := row["task"]) in found and row["student"] == "kronbert"
        else row
        for row in results.runs
    ]
    told = modules.results.Results({**results.content, "runs": runs})
    head, _, *rows = rows_of(modules.tables.agreement(told))
    assert head == ["factor", "student", *modules.settings.FULL]
    missing = ["not measured"] * 3
    assert rows == [["8", "**kronbert**", "92.0 %, 0.120", *missing, "1.000, 0.27 off"]]
    assert modules.tables.agreement(results) == "not measured"


def test_a_variant_of_stages_says_what_differs(modules, results):
    usual = [{"name": "first", "epochs": 1.0, "batch_size": 64}, {"name": "last", "epochs": 0.5}]
    other = [{**usual[0], "epochs": 2.0, "cache_teacher": True}, usual[1]]
    runs = [{**row, "stages": usual} for row in results.runs if row["tag"] == "main"]
    runs.append(result("sst2", "kronbert", 8.0, 2, 0.75, "long", changes={"stages": other}))
    told = modules.results.Results({**results.content, "runs": runs})
    assert "scored again" not in modules.tables.ablations(told)
    runs[-1]["scored_at"] = "0123456789"
    said = "Some scored again, from the saved models: commit 01234567."
    assert said in modules.tables.ablations(told)
    assert said not in modules.tables.full_tasks(told)
    *_, row = rows_of(modules.tables.ablations(told))
    assert row[2:5] == ["long", '`{"first epochs": 2.0}`', "75.0 (1 seed) (+3.0)"]


def test_table_of_other_texts_names_them(modules, results):
    runs = [
        {**row, "outside": {"imdb": {"accuracy": 0.4}}, "outside_data": "imdb/test.tsv"}
        for row in results.runs
        if row["task"] == "sst2"
    ]
    told = modules.results.Results({**results.content, "runs": runs})
    head, _, teacher, *rows = rows_of(modules.tables.outside(told))
    assert head[3:] == ["sst2 on imdb, accuracy", "mrpc on paws_wiki, accuracy"]
    assert teacher[3:] == ["not measured"] * 2
    ours = next(row for row in rows if row[1] == "**kronbert**")
    assert ours[3:] == ["40.0 ± 0.0", "not measured"]
    assert "Data: imdb/test.tsv." in modules.tables.outside(told)


def test_tables_name_files_once_and_count_rows(modules, results):
    counts = {1: 20_000, 2: 9_000, 3: 20_000}
    runs = [
        {**row, "rows": counts[row["seed"]], "data": f"{row['data']}; 11 rows without a label"}
        for row in results.runs
        if row["task"] in ("sst2", "mrpc")
    ]
    told = modules.results.Results({**results.content, "runs": runs})
    said = modules.tables.full_tasks(told)
    assert said.count("mrpc/train.tsv") == 1
    assert "without a label" not in said
    assert "students learnt: sst2 9,000 or 20,000; mrpc 9,000 or 20,000." in said


def test_ablations_compare_the_same_seeds(modules, results):
    head, _, main, ema = rows_of(modules.tables.ablations(results))
    assert head[:5] == ["factor", "student", "variant", "changed", "sst2, accuracy"]
    assert main[2:] == ["main", "", "72.0 ± 1.0"]
    assert ema[2:] == ["ema", '`{"ema": 0.9}`', "75.0 ± 0.0 (+2.5)"]


def test_whole_stages_beside_a_run_of_another_seed(modules):
    row = {"changes": {"stages": [{"name": "one", "rate": 2, "epochs": 1}]}, "seed": 5}
    base = {7: {"stages": [{"name": "one", "rate": 1, "epochs": 1}]}}
    assert modules.tables._changed(row, base) == {"one rate": 2}
    assert modules.tables._changed(row, {}) == row["changes"]


def test_ablations_of_earlier_runs_stay_beside_them(modules, results):
    tag = modules.settings.EARLIER
    runs = [*results.runs]
    close = {"validation": {"agreement": 0.92, "kl": 0.12}}
    runs.append(result("sst2", "kronbert", 8.0, 2, 0.71, tag, fidelity=close))
    outside = {"outside": {"imdb": {"accuracy": 0.65}}}
    runs.append(result("sst2", "kronbert", 8.0, 2, 0.71, "a-new-one", **outside))
    for task in ("sst2", "mrpc"):  # of mrpc the main runs have not been made anew
        runs.append(result(task, "kronbert", 8.0, 2, 0.69, "words-replaced", changes={"splice": 0}))
    told = modules.results.Results({**results.content, "runs": runs})
    _, _, *rows = rows_of(modules.tables.ablations(told))
    none = "not measured"
    assert [row[2:] for row in rows] == [
        ["main", "", "72.0 ± 1.0", "72.0 ± 1.0", none],
        ["a-new-one", "", "71.0 (1 seed) (-1.0)", none, "65.0 (1 seed)"],
        ["ema", '`{"ema": 0.9}`', "75.0 ± 0.0 (+2.5)", none, none],
        [tag, "", "71.0 (1 seed) (-1.0); 92.0 %, 0.120", none, none],
        ["words-replaced", '`{"splice": 0}`', "69.0 (1 seed) (-2.0)", "69.0 (1 seed) (-3.0)", none],
    ]


def test_picture_has_a_panel_per_task_and_a_line_per_measured_kind(
    modules, results, monkeypatch, tmp_path
):
    drawn = []

    class Kept(modules.picture.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    monkeypatch.setattr(modules.picture, "Figure", Kept)
    weak = result("cola", "dense", 8.0, 1, 0.16)
    for run in results.runs:
        run["retention_error"] = 0.02 if run["task"] == "rte" and run["student"] == "svd" else None
    results.runs.append(weak)
    path = tmp_path / "docs" / "retention.png"
    assert modules.picture.retention_picture(results, path)
    assert imread(path).shape[1] == 1100
    panels = {axes.get_title(loc="left"): axes for axes in drawn[0].axes}
    assert list(panels) == ["sst2", "mrpc", "rte", "cola", "stsb", "mean of the five"]

    def lines(name):
        bars = panels[name].containers
        return {bar.get_label(): bar.lines[0].get_ydata() for bar in bars}

    both = {"kronbert": pytest.approx([90.0]), "truncated SVD": pytest.approx([75.0])}
    for name in ("sst2", "mrpc", "rte"):
        assert lines(name) == both
    assert lines("stsb") == lines("mean of the five") == {"kronbert": pytest.approx([90.0])}
    seeds = [one for one in panels["sst2"].lines if one.get_marker() == "."]
    assert [one.get_ydata() for one in seeds] == [pytest.approx([88.75, 90.0, 91.25])]
    whiskers = {bar.get_label(): bar.lines[2][0].get_segments() for bar in panels["rte"].containers}
    assert whiskers["truncated SVD"][0][:, 1] == pytest.approx([73.0, 77.0])
    assert whiskers["kronbert"][0][:, 1] == pytest.approx([90.0, 90.0])
    below = lines("cola").pop("dense, two narrow layers")
    assert [isnan(one) for one in below] == [True]
    (said,) = panels["cola"].texts
    assert said.get_text() == "20"
    assert said.xy[1] == panels["cola"].get_ylim()[0] == 60
    fewer = replace_runs(modules, results)
    assert not modules.picture.retention_picture(fewer, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def replace_runs(modules, results):
    return modules.results.Results({**results.content, "runs": []})


def test_variants_stay_beside_the_runs_that_read_twice_where_these_are(modules, results):
    tag = modules.settings.READ_TWICE
    added = {tag: (0.71, 0.71), "more-rows": (0.74, 0.74), "ema": (0.75, None)}
    runs = [row for row in results.runs if row["tag"] == "main"]
    for variant, scores in added.items():
        for task, score in zip(("mrpc", "sst2"), scores, strict=True):
            if score is not None and not (variant == tag and task == "sst2"):
                runs.append(result(task, "kronbert", 8.0, 2, score, variant, changes={}))
    runs.append(result("mrpc", "kronbert", 8.0, 2, 0.7, "one-teacher", changes={}))
    runs.append(result("mrpc", "kronbert", 8.0, 2, 0.73, "batch-64", changes={}))
    told = modules.results.Results({**results.content, "runs": runs})
    _, _, *rows = rows_of(modules.tables.ablations(told))
    assert [row[2:3] + row[4:6] for row in rows] == [
        ["main", "72.0 ± 1.0", "72.0 ± 1.0"],
        ["batch-64", "not measured", "73.0 (1 seed) (+1.0)"],
        ["one-teacher", "not measured", "70.0 (1 seed) (-1.0)"],
        ["ema", "not measured", "75.0 (1 seed) (+5.0)"],
        ["more-rows", "74.0 (1 seed) (+2.0)", "74.0 (1 seed) (+4.0)"],
        [tag, "not measured", "71.0 (1 seed) (-1.0)"],
    ]
