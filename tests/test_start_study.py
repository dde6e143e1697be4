"""The study of starts: what it does beside `kronbert.convert`, and one row per student."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import kronbert
from kronbert.distill.recipes.kronbert import task_stages
from kronbert.job_begin import hidden_error
from kronbert.shapes import low_rank
from kronbert.weighted_fit import Objective, sum_of
from tests.small_berts import classifier

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def study(modules, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("structure_study", "start_study", "study_starts", "stage1_tables")
    yield Namespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name)


def batches(count=6, rows=8, length=10):
    made = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, 6:] = 0
    return [
        {"input_ids": torch.randint(5, 384, (rows, length), generator=made), "attention_mask": mask}
        for _ in range(count)
    ]


def test_counted_outputs_are_the_nearest_in_their_metric(study):
    """Of all sums of three terms: none nearby, and not the plain fit, comes closer."""
    torch.manual_seed(0)
    x, target = torch.randn(200, 12, dtype=torch.float64), torch.randn(9, 12, dtype=torch.float64)
    root = study.study_starts.root_of(torch.diag(torch.arange(1.0, 10.0) ** 2))
    objective = Objective(x.T @ x, target @ x.T @ x)

    def missed(weight):
        return (((target - weight) @ x.T).T @ root).square().sum()

    shape = low_rank(9, 12, 3)
    pairs = study.study_starts.nearest_counted(objective, [shape], [], root=root)
    found = missed(sum_of(pairs))
    plain = sum_of(study.study_starts.nearest_outputs(objective, [shape], []))
    assert found < 0.9 * missed(plain)
    ((a, b),) = pairs
    for _ in range(50):
        moved = [(a + 1e-3 * torch.randn_like(a), b + 1e-3 * torch.randn_like(b))]
        assert missed(sum_of(moved)) > found


def test_fisher_is_that_of_the_teachers_answers(study):
    """Of a head's logits it is p (1 - p) in all directions in which the two classes differ."""
    teacher, rows = classifier().eval(), batches(200)
    found = study.study_starts.fisher_of(teacher, ["classifier"], rows)["classifier"]
    with torch.no_grad():
        p = torch.cat([teacher(**row).logits.softmax(-1)[:, 0] for row in rows]).double()
    expected = (p * (1 - p)).sum() * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    torch.testing.assert_close(found, expected.double(), rtol=0.1, atol=0.0)
    inner = study.study_starts.fisher_of(teacher, ["bert.encoder.layer.0.output.dense"], rows[:2])
    assert inner["bert.encoder.layer.0.output.dense"].shape == (48, 48)


def test_blocks_learn_one_by_one(study, monkeypatch):
    """From the student's own inputs, nearer to the teacher than before; nothing else changes."""
    teacher, rows = classifier().eval(), batches(60)
    student = kronbert.convert(teacher, 3, init="data", calibration=rows[:4])
    before = hidden_error(student, teacher, rows[:4])
    heads = student.classifier.weight.clone()
    given, real = {}, study.study_starts.block_output

    def watched(block, value, mask):
        given.setdefault(block, value)
        return real(block, value, mask)

    monkeypatch.setattr(study.study_starts, "block_output", watched)
    study.study_starts.learn_blocks(student, teacher, rows, task_stages("sst2")[0])
    assert hidden_error(student, teacher, rows[:4]) < 0.8 * before
    assert torch.equal(student.classifier.weight, heads)
    ids, mask = rows[0]["input_ids"], rows[0]["attention_mask"]
    states, own = (
        model(**rows[0], output_hidden_states=True).hidden_states for model in (teacher, student)
    )
    last = given[student.bert.encoder.layer[-1]]
    assert (last - own[-2])[mask.bool()].norm() < 0.1 * (last - states[-2])[mask.bool()].norm()
    own = real(teacher.bert.encoder.layer[0], teacher.bert.embeddings(input_ids=ids), mask.bool())
    torch.testing.assert_close(own[mask.bool()], states[1][mask.bool()], rtol=1e-4, atol=1e-5)


def test_every_start_has_its_row(study, tiny_bert, glue, tmp_path, modules, monkeypatch):
    monkeypatch.setitem(modules.settings.TEACHER, "epochs", 1)
    shared = ["--model", tiny_bert, "--data-dir", glue / "glue", "--tasks", "sst2"]
    given = [*shared, "--output", tmp_path / "out", "--students"]
    options = modules.main.parser().parse_args([str(word) for word in given])
    assert not modules.main.work(modules.runs.Study(options), modules.main.runs_of(options))
    own = ["--teachers", tmp_path / "out", "--factors", 3, "--fit", 16, "--tokens", 400,
           "--output", tmp_path / "own", "--results", tmp_path / "found.json"]  # fmt: skip
    command = ["start_study.py", *map(str, [*shared, *own])]
    monkeypatch.setattr(sys, "argv", command)
    seen = []
    real = study.structure_study.run_stage

    def counted(student, teacher, stage, *rest, **more):
        seen.append((stage.name, stage.epochs))
        return real(student, teacher, stage, *rest, **more)

    monkeypatch.setattr(study.structure_study, "run_stage", counted)
    study.start_study.work(study.start_study.Started, study.start_study.STARTS)
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["command"].startswith("python examples/start_study.py")
    rows = {row["start"]: row for row in content["rows"]}
    assert list(rows) == list(study.start_study.STARTS)
    assert len({row["parameters"] for row in rows.values()}) == 1
    assert len({row["fitted"]["dev"]["hidden"] for row in rows.values()}) == 4
    passes = [epochs for name, epochs in seen if name == "intermediate"]
    assert passes == [1.0, 1.0, 1.0, 0.5]
    head, _, *lines, _, note = study.stage1_tables.starts(tmp_path / "found.json").splitlines()
    assert head == "| factor | start | sst2, start | end |"
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [one[1] for one in cells] == list(study.start_study.STARTS)
    start, end = rows["blocks"]["fitted"]["dev"], rows["blocks"]["dev"]
    assert cells[3][2:] == [
        f"{100 * one['accuracy']:.1f}; {one['kl']:.3f}; {one['hidden']:.3f}" for one in (start, end)
    ]
    assert "start_study.py" in note
