"""Speed beside the peers, quickly: one linear map, BERT-base at batch 1, a small training step.

The full tables come from examples/bench_cpu.py. Each row's extra_info holds how many times faster
kronbert is than each peer, from calls taken in turns; the benchmark's own columns are kronbert's
time alone.
"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from kronbert.bench_models import DTYPES, bert_base, cast, inputs, student, training_step
from kronbert.bench_results import timed_row
from kronbert.latency import compare

sys.path.insert(0, str(Path(__file__).resolve().parent))
import peers  # type: ignore[import-not-found]

# What tensorly-torch, PEFT and pyfastkron warn of while being imported is theirs to mend.
pytestmark = pytest.mark.filterwarnings("default")

LEAST = 1.0
"""K21 in float32 has 15 times fewer FLOPs than dense: below this something is broken, however busy
the machine."""


@pytest.fixture(scope="module")
def dense():
    return bert_base()


@pytest.mark.benchmark(group="one linear map, 128 rows")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layer", list(peers.LAYERS))
@pytest.mark.parametrize("name", ["k8", "k21"])
def test_linear_map(benchmark, name, layer, dtype):
    problem = peers.Problem.random(peers.layer_shape(name, layer), 128, DTYPES[dtype])
    calls, absent = peers.ready(problem)
    timings, ratios = peers.timed(calls, seconds=0.2)
    benchmark.extra_info.update(times_faster_than=ratios, absent=absent, shape=problem.shape.spec)
    benchmark.pedantic(calls[peers.OURS], rounds=20, iterations=5, warmup_rounds=2)
    assert set(timings) | set(absent) == set(peers.PEERS)
    assert set(absent) <= {"pyfastkron", "tensorly-torch BlockTT", "PEFT LoKr"}
    if (name, dtype) == ("k21", "fp32"):
        assert ratios["nn.Linear"] > LEAST


@pytest.mark.benchmark(group="BERT-base, batch 1, sequence 128")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["k8", "k21"])
def test_encoder(benchmark, dense, name, dtype):
    models = {"dense": dense, name: student(dense, name)}
    given = inputs(dense, 1, 128)
    calls = {}
    with torch.inference_mode():
        for key, model in models.items():
            calls[key] = partial(cast(model, DTYPES[dtype]), **given)
        row = timed_row(compare(calls, seconds=3), "dense")
        benchmark.extra_info.update(row)
        benchmark.pedantic(calls[name], rounds=5, warmup_rounds=1)
    if (name, dtype) == ("k21", "fp32"):
        assert row["ratio"][name] > LEAST


@pytest.mark.benchmark(group="training step of two layers, batch 4, sequence 128, fp32")
@pytest.mark.parametrize("name", ["k8", "k21"])
def test_training_step(benchmark, name):
    model = bert_base(layers=2, labels=2)
    given = inputs(model, 4, 128)
    steps = {"dense": training_step(model, given)}
    steps[name] = training_step(student(model, name), given)
    row = timed_row(compare(steps, seconds=3), "dense")
    benchmark.extra_info.update(row)
    benchmark.pedantic(steps[name], rounds=5, warmup_rounds=1)
    if name == "k21":
        assert row["ratio"][name] > LEAST


def test_a_wrong_peer_is_not_timed(monkeypatch):
    """A peer's matrices swapped: its answer is refused before any clock starts."""
    problem = peers.Problem.random(peers.KroneckerShape(4, 6, 10, 3), 5, torch.float32)

    def swapped(p):
        weight = torch.kron(p.b[0], p.a[0])
        return peers.Layer(lambda x: x @ weight.T + p.bias, (p.a, p.b, p.bias))

    monkeypatch.setitem(peers.PEERS, "swapped", swapped)
    with pytest.raises(ArithmeticError, match="swapped: y of 4x6⊗10x3 is off by"):
        peers.ready(problem, only=("swapped",))


def test_a_missing_peer_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyfastkron", None)
    problem = peers.Problem.random(peers.KroneckerShape(4, 6, 10, 3), 5, torch.float32)
    calls, absent = peers.ready(problem, only=("pyfastkron", "nn.Linear"))
    assert absent == {"pyfastkron": "not installed"}
    assert list(calls) == ["nn.Linear"]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_peer_is_right_at_odd_sizes(rank, dtype):
    shape = peers.KroneckerShape(4, 6, 10, 3, rank)
    calls, absent = peers.ready(peers.Problem.random(shape, 5, dtype, backward=True))
    assert {"nn.Linear", "torch.kron", "einsum", "two matmuls"} <= set(calls)
    assert rank == 1 or absent["PEFT LoKr"]
    for call in calls.values():
        gradients = call()
        assert len(gradients) >= 3
        assert all(torch.isfinite(one).all() for one in gradients)


def test_a_hopelessly_slow_peer_is_timed_once(monkeypatch):
    called = []
    monkeypatch.setattr(peers, "HOPELESS_MS", 5.0)
    monkeypatch.setattr(peers, "SLOW_MS", 5.0)

    def slow():
        called.append(1)
        torch.randn(2000, 2000) @ torch.randn(2000, 2000)

    timings, ratios = peers.timed({peers.OURS: lambda: None, "slow": slow}, seconds=0.01)
    assert len(called) == 1
    assert ratios["slow"] > 10
    assert len(timings["slow"].samples_ms) == 1
