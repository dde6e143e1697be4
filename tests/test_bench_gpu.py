"""The GPU benchmark without a GPU: its ops, its checks, its file and its time limit."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from kronbert import bench_checks, bench_gpu, reference
from kronbert.bench_checks import Definition, Dense
from kronbert.bench_gpu import Sizes
from kronbert.bench_models import bert_base, inputs, saved_for_backward, training_step
from kronbert.bench_results import TIME_IS_UP, Results, brief, current_commit, timed_row
from kronbert.errors import ReportError
from kronbert.latency import Timing, compare
from kronbert.shapes import KroneckerShape

SMALL = Sizes(
    device="cpu", layers=1, batch=2, sequence=8, width=96, entries=50, tokens=(6,),
    check_rows=(5,), seconds=0.01, compiled=False,
)  # fmt: skip


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "gpu.json", command="test", commit="abc")


def on_cpu(calls, sizes, rounds=5):
    return compare(calls, seconds=0.01, rounds=rounds)


def test_no_device_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu.main(["--out", str(tmp_path / "x.json")]) == 2
    assert "No CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_gpu.main(["--out", "x.json", "--only", "speed"])
    assert "invalid choice" in capsys.readouterr().err


CHECKS = dict(bench_checks.all_checks((5,), width=96, entries=50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHECKS)
def test_ops_are_right_on_a_cpu(name, dtype):
    found = bench_checks.check(CHECKS[name], "cpu", dtype)
    assert found["passed"], found


def test_every_kind_is_checked():
    assert {op.name for op in CHECKS.values()} == set(bench_checks.KINDS)


@pytest.mark.parametrize(
    "broken",
    [
        lambda op, t: op.fused(t) * (1 + 1e-4),
        lambda op, t: op.fused(t) + 0 * t["residual"].sum() + t["map.bias"].detach() * 1e-3,
        lambda op, t: op.fused({**t, "map.b0": t["map.b0"].detach()}) + 0 * t["map.b0"].sum(),
        lambda op, t: op.fused(t) * float("nan"),
    ],
    ids=["scaled", "bias", "no gradient", "nan"],
)
def test_a_wrong_op_does_not_pass(broken):
    op = CHECKS["linear_norm k21 5 rows"]
    assert not bench_checks.check(replace(op, fused=partial(broken, op)), "cpu", torch.float32)[
        "passed"
    ]


def test_fast_gelu_has_its_allowance_and_no_more():
    op = CHECKS["ffn k21 5 rows, gelu fast"]
    exact = CHECKS["ffn k21 5 rows"]
    off = partial(lambda t, by: exact.fused(t) * (1 + by), by=1.5e-3)
    assert bench_checks.check(replace(op, fused=off), "cpu", torch.float32)["passed"]
    assert not bench_checks.check(replace(exact, fused=off), "cpu", torch.float32)["passed"]
    far = partial(off, by=1e-2)
    assert not bench_checks.check(replace(op, fused=far), "cpu", torch.float32)["passed"]


@pytest.mark.parametrize("name", ["qkv k8 5 rows", "ffn_norm k21 5 rows", "embed_norm k21 5 rows"])
def test_the_dense_twin_is_the_same_function(name):
    op = CHECKS[name]
    given = op.to("cpu", torch.float64)
    twin = bench_checks.outputs(op.plain(given, Dense(given)))
    exact = bench_checks.outputs(op.plain(given, Definition(given)))
    for one, other in zip(twin, exact, strict=True):
        torch.testing.assert_close(one, other)


def test_costs_by_hand():
    op = CHECKS["kron_linear odd 5 rows"]  # 30x20 ⊗ 7x3: 60 numbers in, 210 out
    assert op.flops == 5 * min(5 * 7 * 20 + 39 * 7 * 30, 39 * 30 * 3 + 5 * 7 * 30)
    assert op.moved == 5 * 60 + 5 * 210 + 30 * 20 + 7 * 3 + 210
    op = CHECKS["embed_norm k21 5 rows"]  # 6 numbers of a per row, b 1x16, 96 wide
    assert op.moved == 5 * 96 + 5 * 6 + 16 + 64 * 96 + 2 * 96 + 2 * 96


@pytest.mark.parametrize(
    ("name", "written"), [("qkv k8", 3), ("add_norm odd", 2), ("linear_norm k8", 1), ("ffn k21", 1)]
)
def test_every_output_and_every_map_costs(name, written):
    op = CHECKS[f"{name} 5 rows"]
    width = 210 if "odd" in name else 96
    assert op.moved == sum(t.numel() for t in op.tensors.values()) + written * 5 * width
    maps = [key.removesuffix(".a0") for key in op.tensors if key.endswith(".a0")]
    shapes = [(op.tensors[f"{one}.a0"].shape, op.tensors[f"{one}.b0"].shape) for one in maps]
    flops = [KroneckerShape(*a[1:], *b[1:], a[0]).flops() for a, b in shapes]
    assert op.flops == 5 * sum(flops)


def test_more_rows_than_positions():
    op = bench_checks.make("embed_norm", {"word": (KroneckerShape(50, 6, 1, 16),)}, 70, entries=50)
    assert bench_checks.check(op, "cpu", torch.float32)["passed"]


def test_a_row_of_the_embedding_is_the_definition():
    op = CHECKS["embed_norm k8 5 rows"]
    given = op.to("cpu", torch.float64)
    a, b = given["word.a0"], given["word.b0"]
    rows = reference.kron_embedding(op.ids, a.transpose(0, 1), b)
    at = torch.arange(5)
    x = rows + given["position"][at] + given["kind"][at % 2]
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(
        op.fused(given), x * given["norm.weight"] + given["norm.bias"], rtol=1e-9, atol=1e-9
    )


def test_sections_run_small(results, monkeypatch, capsys):
    """All but CUDA graphs, which fail on a CPU: recorded, and the run ends with code 1."""
    monkeypatch.setattr(bench_gpu, "device_times", on_cpu)
    monkeypatch.setattr(
        bench_gpu, "machine_rates", lambda sizes: {"flop_per_s": 1e9, "bytes_per_s": 1e9}
    )
    monkeypatch.setattr(bench_gpu, "PRESETS", ("k21",))
    assert bench_gpu.run(results, list(bench_gpu.SECTIONS), SMALL, 1000) == 1
    sections = json.loads(results.file.read_text())["sections"]
    assert list(sections) == list(bench_gpu.SECTIONS)
    for name, section in sections.items():
        failed = [case for case, row in section["rows"].items() if "error" in row]
        assert bool(failed) == (name == "graphs"), (name, failed)
        assert section["rows"]
        assert section["environment"]["device"] == "cpu"
    forward = sections["micro"]["rows"]["ffn_norm k21 6 tokens, forward"]
    assert set(forward["ms"]) == {"dense", "kronbert"}
    assert set(sections["encoder"]["rows"]["k21 eager"]["ratio"]) == {"fused", "not fused"}
    kept = sections["training"]["rows"]["k21 forward+backward"]["saved_for_backward_bytes"]
    assert set(kept) == {"dense", "fused", "not fused"}
    assert min(kept.values()) > 0
    out = capsys.readouterr().out
    assert "right, worst" in out
    assert "of the floor's speed" in out
    assert "graphs: k21 batch 1: " in out


def test_time_limit_leaves_rows_out_and_the_next_run_measures_them(tmp_path):
    now = [0.0]

    def case(name):
        def measure():
            now[0] += 10
            return {"value": name}

        return name, measure

    def run():
        made = Results(tmp_path / "r.json", command="test", commit="abc", clock=lambda: now[0])
        start = now[0]
        made.section("part", map(case, "abc"), deadline=start + 15, say=said.append)
        return json.loads(made.file.read_text())["sections"]["part"]["rows"]

    said = []
    first = run()
    assert first["a"]["value"] == "a"
    assert first["b"]["value"] == "b"
    assert first["c"] == {"error": TIME_IS_UP}
    assert TIME_IS_UP in said[-1]
    second = run()
    assert second["c"]["value"] == "c"
    assert now[0] == 30, "a row that was there was measured again"


def test_one_failing_case_is_recorded_and_the_rest_goes_on(results):
    tries = []

    def fails():
        tries.append(1)
        raise torch.cuda.OutOfMemoryError("no memory")

    cases = [("first", fails), ("second", lambda: {"ratio": {"dense": 2.0}})]
    results.section("part", cases, say=lambda line: None)
    rows = results.content["sections"]["part"]["rows"]
    assert rows["first"]["error"] == "OutOfMemoryError: no memory"
    assert rows["first"]["commit"] == "abc"
    assert brief(rows["second"]) == "dense 2.00x"
    results.section("part", cases, say=lambda line: None)
    assert len(tries) == 2, "a failed row is tried again"


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "other.json"
    file.write_text("{}")
    with pytest.raises(ReportError, match="Choose another --out"):
        Results(file, command="test")
    file.write_text("not JSON")
    with pytest.raises(ReportError, match="expected the JSON of a benchmark"):
        Results(file, command="test")
    quick = Results(tmp_path / "quick.json", command="test", quick=True)
    quick.write()
    with pytest.raises(ReportError, match="holds quick measurements"):
        Results(quick.file, command="test")


def test_timed_row_pairs_samples():
    slow, fast = Timing.of((4.0, 8.0, 40.0)), Timing.of((1.0, 4.0, 10.0))
    row = timed_row({"dense": slow, "ours": fast}, "dense")
    assert row["ratio"] == {"ours": 4.0}
    assert row["rounds"] == 3
    assert row["ms"]["dense"]["median_ms"] == 8.0
    assert timed_row({"dense": slow, "ours": fast}, "dense", over=())["ratio"] == {}


def test_floor_is_the_slower_of_memory_and_arithmetic():
    row = {"flops": 4e6, "bytes": 1e6, "ms": {"kronbert": {"median_ms": 8.0}}}
    assert bench_gpu.floor_share(row, {"flop_per_s": 1e9, "bytes_per_s": 1e9}) == 0.5
    assert bench_gpu.floor_share(row, {"flop_per_s": 1e9, "bytes_per_s": 1e8}) == 1.25
    assert bench_gpu.floor_share(row, {}) is None
    assert bench_gpu.floor_share({}, {"flop_per_s": 1e9, "bytes_per_s": 1e9}) is None


def test_summary_shows_what_failed():
    rows = {"good": {"passed": True, "worst": 1.5}, "bad": {"passed": False, "worst": 3.0}}
    lines, failed = bench_gpu.summary({"correctness": {"rows": rows}})
    assert failed
    assert lines[0] == "correctness: 1 of 2 right, worst 3.0"
    assert "bad" in lines[1]
    assert bench_gpu.summary({"correctness": {"rows": {"good": rows["good"]}}})[1] is False


def test_bytes_saved_for_backward_by_hand():
    linear = torch.nn.Linear(3, 4)
    x = torch.randn(5, 3, requires_grad=True)  # so that the product keeps its weight, too
    with saved_for_backward(linear) as kept:
        y = linear(x).relu()
    # The product keeps x (5 x 3), relu its result (5 x 4); the weight is the model's.
    assert kept["bytes"] == 4 * (5 * 3 + 5 * 4)
    with saved_for_backward(linear) as kept:
        y.sum()
    assert kept["bytes"] == 0


def test_training_step_trains():
    model = bert_base(layers=1, labels=2)
    given = inputs(model, 2, 8)
    before = model.classifier.weight.detach().clone()
    step = training_step(model, given)
    assert model.training
    step()
    assert not torch.equal(before, model.classifier.weight)
    assert model.classifier.weight.grad is None


def test_commit_is_known_or_said_to_be_unknown():
    assert current_commit() == "unknown" or len(current_commit().split(" + ")[0]) == 10
