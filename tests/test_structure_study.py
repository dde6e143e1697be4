"""The study of structures on a tiny BERT: one row per student, made once; its table."""

import importlib
import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from kronbert.distill.finetune import training_rows
from kronbert.errors import DistillError

SMALL = {"hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 96}

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def study(modules, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("structure_study", "stage1_tables", "structure_latency")
    yield Namespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name)


@pytest.fixture
def command(tiny_bert, glue, tmp_path, modules, monkeypatch):
    """The study's arguments, its teacher made."""
    monkeypatch.setitem(modules.settings.TEACHER, "epochs", 1)
    shared = ["--model", tiny_bert, "--data-dir", glue / "glue", "--tasks", "sst2"]
    given = [*shared, "--output", tmp_path / "out", "--students"]
    options = modules.main.parser().parse_args([str(word) for word in given])
    assert not modules.main.work(modules.runs.Study(options), modules.main.runs_of(options))
    own = ["--teachers", tmp_path / "out", "--ood-dir", glue / "ood", "--factors", 3, "--fit", 16,
           "--tokens", 400, "--output", tmp_path / "own", "--results",
           tmp_path / "found.json"]  # fmt: skip
    return [str(word) for word in (*shared, *own)]


def run(study, command, monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", ["structure_study.py", *command, *more])
    study.structure_study.work(study.structure_study.Task, study.structure_study.STRUCTURES)


def test_students_of_one_size_learn_the_same_rows(study, command, monkeypatch, tmp_path, capsys):
    seen = []
    real = study.structure_study.run_stage

    def counted(student, teacher, stage, data, *rest, **more):
        seen.append((stage.name, sum(len(ids) for ids in training_rows(data, stage)["input_ids"])))
        return real(student, teacher, stage, data, *rest, **more)

    monkeypatch.setattr(study.structure_study, "run_stage", counted)
    small = [replace(stage, batch_size=8) for stage in study.structure_study.task_stages("sst2")]
    monkeypatch.setattr(study.structure_study, "task_stages", lambda task, tokens: small)
    names = ["planned", "single layers"]
    run(study, command, monkeypatch, "--structures", *names)
    assert [name for name, _ in seen] == ["intermediate", "task"] * 2
    assert len(set(seen)) == 2
    assert 300 < seen[0][1] < 500
    content = json.loads((tmp_path / "found.json").read_text())
    rows = {row["structure"]: row for row in content["rows"]}
    assert list(rows) == names
    assert 0.8 < rows["single layers"]["parameters"] / rows["planned"]["parameters"] <= 1
    assert rows["single layers"]["flops_per_token"] != rows["planned"]["flops_per_token"]
    for row in rows.values():
        assert row["dev"].keys() == {"accuracy", "agreement", "kl", "hidden"}
        assert row["dev"]["hidden"] < row["fitted"]["dev"]["hidden"]
        assert row["outside"]["hidden"] > 0
    assert len(list((tmp_path / "own/sst2/teacher").glob("*-states.npy"))) == 1
    run(study, command, monkeypatch, "--structures", *names)
    assert len(seen) == 4
    with pytest.raises(SystemExit, match="--tokens do not compare"):
        run(study, command, monkeypatch, "--structures", "uniform", "--tokens", "500")
    other = ["--tokens", "500", "--results", str(tmp_path / "other.json")]
    with pytest.raises(DistillError, match=r"\(other tokens, rows\)"):
        run(study, command, monkeypatch, "--structures", *names, *other)
    assert len(seen) == 4
    head, _, first, *_ = study.stage1_tables.structures(
        tmp_path / "found.json", tmp_path / "none.json"
    ).splitlines()
    assert head.endswith("| times as fast, fp32 | bf16 | sst2 | sst2, outside |")
    own = rows["planned"]["dev"]
    expected = f"{100 * own['accuracy']:.1f}; {own['kl']:.3f}; {own['hidden']:.3f}"
    assert first.split(" | ")[4:7] == ["not measured", "not measured", expected]


def test_rows_are_added_to_those_of_earlier(study, tmp_path):
    """A row made anew takes its place; students that learnt from more tokens are refused."""

    def row(name, seed, score):
        return {"task": "sst2", "factor": 8.0, "structure": name, "seed": seed, "score": score}

    def collected(folder, *rows, tokens=400):
        for place, one in enumerate(rows):
            path = tmp_path / folder / "sst2" / str(place) / "row.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(one))
        study.structure_study.collect(tmp_path / folder, results, tokens)
        return json.loads(results.read_text())["rows"]

    results = tmp_path / "found.json"
    first = [row("planned", 42, 1), row("uniform", 42, 2)]
    assert collected("a", *first[::-1]) == first
    more = [row("uniform", 42, 3), row("planned", 43, 4)]
    assert collected("b", *more) == [first[0], more[1], more[0]]
    with pytest.raises(SystemExit, match="--tokens do not compare"):
        collected("c", tokens=500)
    assert collected("d") == [first[0], more[1], more[0]]


def test_times_of_the_students_stand_beside_their_scores(study, monkeypatch, tmp_path):
    """Each student is timed beside the dense model, and the table finds it again."""
    timed, learnt = tmp_path / "timed.json", tmp_path / "learnt.json"
    monkeypatch.setattr(study.structure_latency, "MINILM", SMALL | {"num_hidden_layers": 6})
    monkeypatch.setattr(sys, "argv", ["structure_latency.py", "--quick", "--out", str(timed)])
    study.structure_latency.main()
    content = json.loads(timed.read_text())
    measured = content["sections"]["students"]["rows"]
    (row,) = measured.values()
    measured["another"] = {"error": "RuntimeError: no memory", "commit": "c0ffee"}
    timed.write_text(json.dumps(content))
    assert row["ms"].keys() == {"planned", "balanced layers"}
    assert all(pair.keys() == {"dense", name} for name, pair in row["ms"].items())
    assert (row["factor"], row["dtype"], row["batch"], row["sequence"]) == (8, "fp32", 1, 128)
    names = ("planned", "single layers")
    rows = [
        {"task": "sst2", "factor": 8.0, "structure": name, "seed": 42, "metric": "accuracy",
         "table": "dense", "flops_per_token": 1e6, "machine": "one", "commit": "c0ffee",
         "dev": {"accuracy": 0.9, "kl": 0.1, "hidden": 0.5}}
        for name in names
    ]  # fmt: skip
    learnt.write_text(json.dumps({"command": "study", "rows": rows}))
    _, _, *lines, _, note = study.stage1_tables.structures(learnt, timed).splitlines()
    cells = {line.split(" | ")[1]: line.split(" | ")[4:6] for line in lines}
    none = "not measured"
    assert cells["planned"] == [f"{row['ratio']['planned']:.2f}x", none]
    assert cells["single layers"] == [none, none]
    assert "at batch 1 of 128 tokens" in note
    (row,) = content["sections"]["depths"]["rows"].values()
    title, _, *lines, _, note = study.stage1_tables.depths(timed).splitlines()
    assert title == "| student | 8x, fp32 | 8x, bf16 |"
    assert lines == [
        f"| {n} layers | {row['ratio'][f'{n} layers']:.2f}x | {none} |" for n in (6, 4)
    ]
    assert "at batch 1 of 128 tokens" in note
    assert study.stage1_tables.depths(tmp_path / "nothing.json") == none


def test_every_structure_is_timed_at_both_factors(study, monkeypatch):
    script = study.structure_latency
    names = [name for name, _ in script.cases(script.by_structure, quick=False)]
    assert len(set(names)) == len(names) == 8
    monkeypatch.setattr(script, "MINILM", SMALL)
    made = script.models(script.by_structure, 19.0, quick=False)
    assert list(made) == ["dense", *script.STRUCTURES]
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in made.items()}
    assert max(size for name, size in sizes.items() if name != "dense") < sizes["dense"] / 18
