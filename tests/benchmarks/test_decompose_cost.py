"""Time and peak memory of converting BERT-base, and of searching its plan."""

import json
import os
import subprocess
import sys

import pytest

AT_MOST_S = 15  # two cores
AT_MOST_MODEL = 2  # peak of model and conversion together, in sizes of the model

# Its own process: ru_maxrss never falls. Random weights: the worst case for an iterative solver.
CONVERT = """
import json, resource, sys, time, torch
from transformers import BertConfig, BertModel
import kronbert
from kronbert import conversion, decompose

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

# Everything lazily loaded is loaded, so that only tensors are counted.
tiny = BertModel(BertConfig(vocab_size=256, hidden_size=64, num_hidden_layers=1,
                            num_attention_heads=2, intermediate_size=128))
kronbert.convert(tiny, factor=2)
start = peak_bytes()
torch.manual_seed(0)
model = BertModel(BertConfig())
size = sum(p.numel() * p.element_size() for p in model.parameters())
made = peak_bytes() - start
begin = time.perf_counter()
student = kronbert.convert(model, **json.loads(sys.argv[1]))
seconds = time.perf_counter() - begin
print(json.dumps({
    "seconds": seconds,
    "model_bytes": size,
    "peak_model": (peak_bytes() - start) / size,
    "peak_before_model": made / size,
    "factor": student.kronecker_plan.factor,
    "threads": torch.get_num_threads(),
}))
"""


def convert(given):
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, json.dumps(given)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.benchmark(group="convert BERT-base")
@pytest.mark.parametrize("given", [{"preset": "k21"}, {"factor": 19}, {"factor": 8}], ids=str)
def test_converting_bert_base(benchmark, given):
    found = benchmark.pedantic(convert, args=(given,), rounds=1)
    benchmark.extra_info.update(found)  # its seconds leave the start of the process out
    assert found["seconds"] < AT_MOST_S, found
    assert found["peak_model"] < AT_MOST_MODEL, found


@pytest.mark.benchmark(group="plan BERT-base")
@pytest.mark.parametrize("factor", [2, 8, 30])
def test_searching_a_plan(benchmark, factor):
    from transformers import BertConfig

    from kronbert.config import KroneckerConfig
    from kronbert.inventory import inventory
    from kronbert.planning import make_plan
    from kronbert.search import shapes_of

    sizes = inventory(BertConfig())
    benchmark.pedantic(
        make_plan,
        args=(sizes, KroneckerConfig(factor=factor)),
        setup=shapes_of.cache_clear,
        rounds=5,
    )
    assert benchmark.stats.stats.median < 1
