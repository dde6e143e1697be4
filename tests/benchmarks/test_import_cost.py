"""What `import kronbert` costs beside `import torch, transformers`, each in a fresh interpreter."""

import statistics
import subprocess
import sys
import time

import pytest

ROUNDS = 5
AT_MOST = 1.3  # ARCHITECTURE, "Folders"
BASE = "torch, transformers"


def import_s(names: str, folder) -> float:
    """Seconds for `import names`, start of the interpreter included."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {names}"], cwd=folder, check=True)
    return time.perf_counter() - start


@pytest.mark.benchmark(group="import")
def test_import_cost(benchmark, tmp_path):
    for names in (BASE, "kronbert"):  # bytecode and file cache
        import_s(names, tmp_path)
    base_s = []

    def base_first():
        # In turn with ours, so that a busy machine slows both.
        base_s.append(import_s(BASE, tmp_path))

    benchmark.pedantic(import_s, args=("kronbert", tmp_path), setup=base_first, rounds=ROUNDS)
    ratio = benchmark.stats.stats.median / statistics.median(base_s)
    benchmark.extra_info.update(base_s=statistics.median(base_s), ratio=ratio)
    assert ratio <= AT_MOST, f"import kronbert costs {ratio:.2f}x of import {BASE}"
