"""Timing with a clock of our own: turns, rounds, samples, and the garbage collector."""

import gc

import pytest
import torch
from torch import nn

from kronbert import latency
from kronbert.errors import ReportError
from kronbert.latency import Timing, compare, paired_ratio


class Clock:
    """Seconds that pass only when a function says so."""

    def __init__(self):
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self):
        return self.now

    def function(self, name, *seconds):
        def run():
            self.calls.append(name)
            self.now += seconds[self.calls.count(name) % len(seconds)]

        return run


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(latency, "perf_counter", made)
    return made


def test_compare_takes_turns_and_reports_milliseconds(clock):
    functions = {"a": clock.function("a", 0.002), "b": clock.function("b", 0.004)}
    timings = compare(functions, seconds=0.06)
    assert timings["a"].median_ms == pytest.approx(2)
    assert (timings["b"].p20_ms, timings["b"].p80_ms) == pytest.approx((4, 4))
    assert paired_ratio(timings["b"], timings["a"]) == pytest.approx(2)
    assert clock.calls[:6] == ["a"] * 3 + ["b"] * 3  # warm-up and one to choose the calls
    assert clock.calls[6:] == ["a", "b"] * 10
    assert len(timings["a"].samples_ms) == 10


def test_compare_stops_after_rounds_and_never_before_five(clock):
    assert len(compare({"a": clock.function("a", 1.0)}, seconds=0.1)["a"].samples_ms) == 5
    once = compare({"b": clock.function("b", 1.0)}, rounds=1)["b"]
    assert (once.median_ms, once.p20_ms, once.samples_ms) == (1000, 1000, (1000.0,))


def test_fast_functions_are_called_several_times_per_sample(clock):
    timing = compare({"a": clock.function("a", 0.0001)}, rounds=5)["a"]
    assert timing.median_ms == pytest.approx(0.1)
    assert len(clock.calls) == 3 + 5 * 5


def test_spread_and_pairs(clock):
    timing = Timing.of((1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    assert (timing.p20_ms, timing.median_ms, timing.p80_ms) == pytest.approx((2.0, 3.5, 5.0))
    # The machine slows down half way: the medians say 8 / 2, the pairs 2.
    slow, fast = Timing.of((2.0, 2.0, 8.0, 30.0, 30.0)), Timing.of((1.0, 1.0, 2.0, 15.0, 15.0))
    assert paired_ratio(slow, fast) == 2
    with pytest.raises(ReportError, match="are no pairs"):
        paired_ratio(slow, timing)


def test_the_garbage_collector_rests_and_comes_back(clock):
    seen = []
    compare({"a": lambda: seen.append(gc.isenabled())}, rounds=1, seconds=1)
    assert set(seen) == {False}
    assert gc.isenabled()

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        compare({"a": fails})
    assert gc.isenabled()
    with pytest.raises(ReportError, match="at least one function"):
        compare({})


def test_a_collector_that_was_off_stays_off(clock):
    gc.disable()
    try:
        compare({"a": clock.function("a", 1.0)}, rounds=1)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"seconds": float("nan")}, {"rounds": 0}])
def test_no_time_and_no_rounds_are_refused(wrong, clock):
    with pytest.raises(ReportError, match=r"expected seconds > 0, rounds >= 1"):
        compare({"a": clock.function("a", 1.0)}, **wrong)
    assert not clock.calls


def test_timings_without_samples_are_no_pairs():
    bare = Timing(median_ms=1.0, p20_ms=1.0, p80_ms=1.0)
    with pytest.raises(ReportError, match="0 and 0 samples are no pairs"):
        paired_ratio(bare, bare)


class Watched(nn.Linear):
    def forward(self, x):
        self.seen = (torch.is_inference_mode_enabled(), self.training, x.dtype, x.is_contiguous())
        return super().forward(x)


def test_models_are_timed_in_evaluation_without_gradients_in_their_own_dtype():
    models = {"a": Watched(4, 2), "b": Watched(4, 2, dtype=torch.bfloat16)}
    latency.compare_models(models, {"x": torch.ones(1, 4)}, 3, seconds=0.001, rounds=1)
    for model in models.values():
        assert model.seen == (True, False, model.weight.dtype, True)
        assert model.training
