"""The teacher's outputs on disk: the same numbers, one computation, no teacher in training."""

import copy
import os
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    DataCollatorWithPadding,
)

from kronbert.distill import (
    Objective,
    Stage,
    Term,
    teacher_cache,
)
from kronbert.distill.digests import rows_digest
from kronbert.distill.finetune import run_stage
from kronbert.distill.teacher_cache import (
    TEACHER_LOGITS,
    TEACHER_ROW,
    TEACHER_STATES,
    WithStates,
    model_digest,
    with_teacher,
)
from kronbert.errors import DistillError
from tests.small_teacher import SOFT, STAGE, a_teacher, model_of, with_teacher_logits

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def cut_after(batches, teacher):
    """What runs inside is interrupted once the teacher has seen so many batches."""
    left = [batches]

    def cut(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    handle = teacher.register_forward_pre_hook(cut)
    with pytest.raises(KeyboardInterrupt):
        yield
    handle.remove()


def one_by_one(teacher, rows, tokenizer):
    collate = DataCollatorWithPadding(tokenizer)
    keys = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        return np.stack([
            teacher(**collate([{k: row[k] for k in keys if k in row}])).logits[0].numpy()
            for row in rows
        ])  # fmt: skip


def test_every_row_has_its_own_logits(tiny_bert, rows, tokenizer, tmp_path):
    teacher = a_teacher(tiny_bert).train()  # dropout would show
    train = rows.train.shuffle(seed=3)
    out = with_teacher_logits(train, teacher, tmp_path, tokenizer=tokenizer, batch_size=7)
    expected = one_by_one(teacher.eval(), train, tokenizer)
    assert np.ptp(expected, axis=0).min() > 1  # rows differ: a wrong order would show
    assert np.allclose(np.array(out[TEACHER_LOGITS]), expected, atol=1e-5)
    assert out["input_ids"] == train["input_ids"]


def test_computed_once(calls, tiny_bert, rows, tokenizer, tmp_path):
    given = {"tokenizer": tokenizer, "batch_size": 64}
    first = with_teacher_logits(rows.train, a_teacher(tiny_bert), tmp_path, **given)
    assert calls == [64] * 4
    said = []
    again = with_teacher_logits(
        rows.train, a_teacher(tiny_bert), tmp_path, say=said.append, **given
    )
    assert calls == [64] * 4
    assert said[0].startswith("teacher's logits of 256 rows: ")
    assert first[TEACHER_LOGITS] == again[TEACHER_LOGITS]
    assert len(list(tmp_path.glob("*.npy"))) == 1


def test_the_digest_knows_what_matters(tiny_bert, rows, tmp_path):
    inputs = rows.train.select_columns(["input_ids", "attention_mask"])
    swapped = inputs.select([1, 0, *range(2, len(inputs))])
    assert rows_digest(inputs) == rows_digest(inputs.select(range(len(inputs))))
    assert rows_digest(inputs) != rows_digest(swapped)
    # the same numbers, cut into rows elsewhere
    cuts = [[[1, 2], [3]], [[1], [2, 3]]]
    tables = [datasets.Dataset.from_dict({"input_ids": cut}) for cut in cuts]
    assert rows_digest(tables[0]) != rows_digest(tables[1])
    teacher = a_teacher(tiny_bert)
    other = copy.deepcopy(teacher)
    assert model_digest(teacher) == model_digest(other)
    teacher.save_pretrained(tmp_path)
    assert model_digest(teacher) == model_digest(model_of(tmp_path))
    with torch.no_grad():
        other.classifier.bias[0] += 1e-6
    assert model_digest(teacher) != model_digest(other)
    other = copy.deepcopy(teacher)
    other(torch.ones(2, 3).long(), labels=torch.tensor([0, 1]))  # sets the config's problem_type
    assert other.config.problem_type != teacher.config.problem_type
    assert model_digest(teacher) == model_digest(other)
    other.config.hidden_act = "relu"
    assert model_digest(teacher) != model_digest(other)


def test_an_interrupted_computation_goes_on(
    monkeypatch, calls, tiny_bert, rows, tokenizer, tmp_path
):
    monkeypatch.setattr(teacher_cache, "SAVED_EVERY", 2)
    given = {"tokenizer": tokenizer, "batch_size": 16}
    whole = with_teacher_logits(rows.train, a_teacher(tiny_bert), tmp_path / "a", **given)
    assert len(calls) == 16
    teacher = a_teacher(tiny_bert)
    with cut_after(5, teacher):
        with_teacher_logits(rows.train, teacher, tmp_path / "b", **given)
    assert sorted(p.suffix for p in (tmp_path / "b").glob("*[!k]")) == [".json", ".part"]
    calls.clear()
    again = with_teacher_logits(rows.train, teacher, tmp_path / "b", **given)
    assert len(calls) == 12  # four of five were noted
    assert again[TEACHER_LOGITS] == whole[TEACHER_LOGITS]
    assert [p.suffix for p in (tmp_path / "b").glob("*[!k]")] == [".npy"]


def test_a_stage_learns_the_same_without_running_the_teacher(
    tiny_bert, rows, tokenizer, tmp_path, calls
):
    given = {"tokenizer": tokenizer, "precision": "fp32"}
    plain, cached = model_of(tiny_bert), model_of(tiny_bert)
    logs = [
        run_stage(model, a_teacher(tiny_bert), stage, rows, tmp_path / name / "run", **given)
        for model, stage, name in (
            (plain, replace(STAGE, cache_teacher=False), "plain"), (cached, STAGE, "cached"),
        )
    ]  # fmt: skip
    assert len(calls) == 4
    assert len(list((tmp_path / "cached" / "teacher-outputs").glob("*.npy"))) == 1
    for name, value in plain.state_dict().items():
        assert torch.allclose(cached.state_dict()[name], value, atol=2e-4), name
    start = model_of(tiny_bert).state_dict()["bert.embeddings.word_embeddings.weight"]
    moved = (cached.state_dict()["bert.embeddings.word_embeddings.weight"] - start).abs().max()
    assert moved > 2e-3
    losses = [[row["loss_logits"] for row in log if "loss_logits" in row] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

    def never(*args):
        raise AssertionError("the teacher was run")

    teacher = a_teacher(tiny_bert)
    teacher.register_forward_pre_hook(never)
    run_stage(
        model_of(tiny_bert), teacher, STAGE, rows, tmp_path / "third" / "run",
        cache=tmp_path / "cached" / "teacher-outputs", max_steps=2, **given,
    )  # fmt: skip


HIDDEN = Objective(terms=(Term(tap="embedding"), Term(tap="ffn"), *SOFT.terms))


def test_every_token_has_its_own_states(tiny_bert, rows, tokenizer, tmp_path):
    teacher = a_teacher(tiny_bert)
    train = rows.train.shuffle(seed=3)
    depth = teacher.config.num_hidden_layers
    _, states = with_teacher(
        train, teacher, tmp_path, tokenizer=tokenizer, batch_size=7, layers=(0, depth)
    )
    lengths = [len(ids) for ids in train["input_ids"]]
    assert states.values.shape == (sum(lengths), 2, teacher.config.hidden_size)
    assert len(set(lengths)) > 5  # a wrong start would show
    for place in (0, 5, len(train) - 1):
        ids = torch.tensor([train[place]["input_ids"]])
        with torch.no_grad():
            seen = teacher(input_ids=ids, output_hidden_states=True).hidden_states
        expected = torch.stack([seen[0][0], seen[depth][0]], dim=1)
        assert torch.allclose(states.of([place]).float(), expected, atol=4e-3)


def test_padding_of_the_rows_has_no_states(tiny_bert, rows, tokenizer, tmp_path):
    """Rows that were padded when they were tokenised have the states of those that were not."""
    train = rows.train.select(range(9))
    longest = max(map(len, train["input_ids"]))
    padded = train.map(lambda row: tokenizer.pad(row, padding="max_length", max_length=longest))
    teacher, found = a_teacher(tiny_bert), []
    for given in (train, padded):
        _, states = with_teacher(given, teacher, tmp_path, tokenizer=tokenizer, layers=(0, 1))
        found.append(states.of(range(9)).float())
    assert {len(ids) for ids in padded["input_ids"]} == {longest}
    torch.testing.assert_close(*found, atol=4e-3, rtol=0)


def test_a_collator_puts_states_where_their_tokens_are(tiny_bert, rows, tokenizer, tmp_path):
    taught, states = with_teacher(
        rows.train, a_teacher(tiny_bert), tmp_path, tokenizer=tokenizer, layers=(0, 1)
    )
    collate = WithStates(DataCollatorWithPadding(tokenizer), states)
    lengths = np.array([len(ids) for ids in taught["input_ids"]])
    short, long = int(lengths.argmin()), int(lengths.argmax())
    batch = collate([taught[short], taught[long]])
    found = batch[TEACHER_STATES]
    assert TEACHER_ROW not in batch
    assert found.shape[:3] == (2, lengths[long], 2)
    assert torch.equal(found[0, : lengths[short]], states.of([short]))
    assert torch.equal(found[1], states.of([long]))
    assert not found[0, lengths[short] :].any()
    plain = collate([{k: v for k, v in taught[0].items() if k != TEACHER_ROW}])
    assert TEACHER_STATES not in plain  # an evaluation's rows


def test_states_are_read_in_any_order_and_whole(tiny_bert, rows, tokenizer, tmp_path):
    _, states = with_teacher(
        rows.train, a_teacher(tiny_bert), tmp_path, tokenizer=tokenizer, layers=(0, 1)
    )
    starts, last = states.starts, len(rows.train) - 1
    for drawn in ([last, 0, 5, 5, 2], [7], []):
        parts = [states.values[starts[i] : starts[i + 1]] for i in drawn]
        expected = np.concatenate(parts or [states.values[:0]])
        assert np.array_equal(states.of(drawn).numpy(), expected)
    (path,) = tmp_path.glob("*-states.npy")
    os.truncate(path, path.stat().st_size - 1)
    assert len(states.of([0])) == starts[1]
    with pytest.raises(DistillError, match=rf"{path.name}: cut short"):
        states.of([0, last])


def test_a_stage_on_hidden_states_learns_the_same(tiny_bert, rows, tokenizer, tmp_path, calls):
    given = {"tokenizer": tokenizer, "precision": "fp32"}
    stage = replace(STAGE, objective=HIDDEN)
    plain, cached = model_of(tiny_bert), model_of(tiny_bert)
    logs = [
        run_stage(model, a_teacher(tiny_bert), one, rows, tmp_path / name / "run", **given)
        for model, one, name in (
            (plain, replace(stage, cache_teacher=False), "plain"), (cached, stage, "cached"),
        )
    ]  # fmt: skip
    assert len(calls) == 4
    names = sorted(p.name for p in (tmp_path / "cached" / "teacher-outputs").glob("*.npy"))
    assert len(names) == 2
    assert names[0].removesuffix("-states.npy") == names[1][:-4]
    for name, value in plain.state_dict().items():
        assert torch.allclose(cached.state_dict()[name], value, atol=3e-4), name
    for key in ("loss_embedding", "loss_ffn", "loss_logits"):
        losses = [[row[key] for row in log if key in row] for log in logs]
        assert losses[0][0] > 1e-3
        assert losses[0] == pytest.approx(losses[1], rel=2e-3), key

    def never(*args):
        raise AssertionError("the teacher was run")

    teacher = a_teacher(tiny_bert)
    teacher.register_forward_pre_hook(never)
    hidden = replace(stage, objective=Objective(terms=HIDDEN.terms[:2]))
    run_stage(
        model_of(tiny_bert), teacher, hidden, rows, tmp_path / "third" / "run",
        cache=tmp_path / "cached" / "teacher-outputs", max_steps=2, **given,
    )  # fmt: skip


def test_states_go_on_where_they_were_cut(monkeypatch, calls, tiny_bert, rows, tokenizer, tmp_path):
    monkeypatch.setattr(teacher_cache, "SAVED_EVERY", 2)
    given = {"tokenizer": tokenizer, "batch_size": 16, "layers": (0, 1)}
    _, whole = with_teacher(rows.train, a_teacher(tiny_bert), tmp_path / "a", **given)
    teacher = a_teacher(tiny_bert)
    with cut_after(5, teacher):
        with_teacher(rows.train, teacher, tmp_path / "b", **given)
    calls.clear()
    _, again = with_teacher(rows.train, teacher, tmp_path / "b", **given)
    assert len(calls) == 12
    assert np.array_equal(whole.values, again.values)


def test_a_disk_that_is_too_small_is_said_first(
    monkeypatch, calls, tiny_bert, rows, tokenizer, tmp_path
):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DistillError, match=r"hidden states take 0\.\d GB, but .* has 0\.0 GB left"):
        with_teacher(rows.train, a_teacher(tiny_bert), tmp_path, tokenizer=tokenizer, layers=(0, 1))
    assert calls == []


def test_states_that_float16_cannot_hold(tiny_bert, rows, tokenizer, tmp_path):
    teacher = a_teacher(tiny_bert)
    with torch.no_grad():
        teacher.bert.encoder.layer[0].output.LayerNorm.bias.fill_(1e5)
    with pytest.raises(DistillError, match="not finite in float16"):
        with_teacher(rows.train, teacher, tmp_path, tokenizer=tokenizer, layers=(1,))


def test_bf16_has_logits_of_its_own(calls, tiny_bert, rows, tokenizer, tmp_path):
    teacher = a_teacher(tiny_bert)
    for autocast in (None, torch.bfloat16):
        with_teacher_logits(rows.train, teacher, tmp_path, tokenizer=tokenizer, autocast=autocast)
    exact, rounded = (np.load(p) for p in sorted(tmp_path.glob("*.npy"), key=lambda p: p.stat()
                                                 .st_mtime_ns))  # fmt: skip
    difference = np.abs(exact - rounded).max()
    assert 0 < difference < 0.1


@pytest.mark.parametrize(
    ("terms", "needed"),
    [
        ((Term(tap="logits"), Term(tap="scores")), "logits, scores"),
        ((Term(tap="labels"),), "nothing"),
    ],
)
def test_other_taps_are_refused(terms, needed):
    with pytest.raises(DistillError, match=f"embedding, ffn, logits are kept.*needs {needed}"):
        replace(STAGE, objective=Objective(terms=terms))


def test_labels_beside_the_logits_are_fine(tiny_bert, rows, tokenizer, tmp_path):
    both = Objective(terms=(*SOFT.terms, Term(tap="labels", weight=0.5)))
    log = run_stage(
        model_of(tiny_bert), a_teacher(tiny_bert), replace(STAGE, objective=both), rows,
        tmp_path / "run", tokenizer=tokenizer, precision="fp32", max_steps=3,
    )  # fmt: skip
    row = next(row for row in log if "loss_labels" in row)
    assert row["loss"] == pytest.approx(row["loss_logits"] + 0.5 * row["loss_labels"], rel=1e-5)


def test_what_has_no_vector_per_row(tiny_bert, rows, tokenizer, tmp_path):
    with pytest.raises(DistillError, match="only one vector per row is kept"):
        with_teacher_logits(
            rows.train, AutoModelForMaskedLM.from_pretrained(tiny_bert), tmp_path,
            tokenizer=tokenizer,
        )  # fmt: skip
    with pytest.raises(DistillError, match="BertModel gives no logits of one vector a row"):
        with_teacher_logits(
            rows.train, AutoModel.from_pretrained(tiny_bert), tmp_path, tokenizer=tokenizer
        )
    with pytest.raises(DistillError, match="no training rows"):
        with_teacher_logits(
            rows.train.select([]), a_teacher(tiny_bert), tmp_path, tokenizer=tokenizer
        )
    broken = a_teacher(tiny_bert)
    with torch.no_grad():
        broken.classifier.bias.fill_(float("nan"))
    with pytest.raises(DistillError, match=r"logits of row \d+ are not finite"):
        with_teacher_logits(rows.train, broken, tmp_path, tokenizer=tokenizer)
    logits, places = np.array([[0.0, 1.0], [np.inf, 0.0], [2.0, 3.0]]), np.array([9, 4, 7])
    with pytest.raises(DistillError, match="logits of row 4 are not finite"):
        teacher_cache._check(logits, None, places, "")


def test_what_does_not_go_together_is_said_before_the_computation(
    calls, tiny_bert, rows, tokenizer, tmp_path
):
    teacher = a_teacher(tiny_bert)
    with pytest.raises(DistillError, match="the terms logits need a teacher"):
        run_stage(model_of(tiny_bert), None, STAGE, rows, tmp_path / "run", tokenizer=tokenizer)
    with pytest.raises(DistillError, match="share the parameter"):
        run_stage(teacher, teacher, STAGE, rows, tmp_path / "run", tokenizer=tokenizer)
    assert calls == []


def test_stage_survives_json():
    assert Stage.from_json(STAGE.to_json()) == STAGE


def test_a_note_of_lost_parts_skips_no_rows(monkeypatch, tiny_bert, rows, tokenizer, tmp_path):
    monkeypatch.setattr(teacher_cache, "SAVED_EVERY", 4)
    given = {"tokenizer": tokenizer, "batch_size": 16, "layers": (0, 1)}
    _, whole = with_teacher(rows.train, a_teacher(tiny_bert), tmp_path / "a", **given)
    teacher = a_teacher(tiny_bert)
    with cut_after(5, teacher):
        with_teacher(rows.train, teacher, tmp_path / "b", **given)
    next((tmp_path / "b").glob("*-states.part")).unlink()
    with cut_after(2, teacher):
        with_teacher(rows.train, teacher, tmp_path / "b", **given)
    taught, again = with_teacher(rows.train, teacher, tmp_path / "b", **given)
    assert np.array_equal(whole.values, again.values)
    assert all(any(row) for row in taught["teacher_logits"])


def test_what_is_whole_is_read_without_a_lock(monkeypatch, tiny_bert, rows, tokenizer, tmp_path):
    """A folder that may only be read has no room for one."""
    expected, _ = with_teacher(rows.train, a_teacher(tiny_bert), tmp_path, tokenizer=tokenizer)

    def none(path):
        raise PermissionError(path)

    monkeypatch.setattr(teacher_cache, "FileLock", none)
    found, _ = with_teacher(rows.train, a_teacher(tiny_bert), tmp_path, tokenizer=tokenizer)
    assert found[TEACHER_LOGITS] == expected[TEACHER_LOGITS]
