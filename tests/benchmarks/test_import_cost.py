"""What `import kronbert` costs beside `import torch, transformers`, each in a fresh interpreter."""

import statistics
import subprocess
import sys
import time

import pytest

ROUNDS = 5
AT_MOST = 1.3  # ARCHITECTURE, "Folders"
BASE = "import torch, transformers"
ALL = "from kronbert import *"  # loads the home of every public name: what a first use may cost


def run_s(code: str, folder) -> float:
    """Seconds for ``code``, start of the interpreter included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    return time.perf_counter() - start


@pytest.mark.benchmark(group="import")
@pytest.mark.parametrize(("code", "at_most"), [("import kronbert", AT_MOST), (ALL, None)])
def test_import_cost(benchmark, tmp_path, code, at_most):
    for each in (BASE, code):  # bytecode and file cache
        run_s(each, tmp_path)
    base_s = []

    def base_first():
        # In turn with ours, so that a busy machine slows both.
        base_s.append(run_s(BASE, tmp_path))

    benchmark.pedantic(run_s, args=(code, tmp_path), setup=base_first, rounds=ROUNDS)
    ratio = benchmark.stats.stats.median / statistics.median(base_s)
    benchmark.extra_info.update(base_s=statistics.median(base_s), ratio=ratio)
    if at_most is not None:
        assert ratio <= at_most, f"`{code}` costs {ratio:.2f}x of `{BASE}`"
