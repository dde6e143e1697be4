"""The kernels' own tests once more under NVIDIA's compute-sanitizer: no access outside a tensor."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FILES = (
    "test_kernel_linear.py",
    "test_kernel_blocks.py",
    "test_kernel_gated.py",
    "test_kernel_embedding.py",
    "test_op_blocks.py",
    "test_op_embedding.py",
    "test_op_gated.py",
)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_memcheck(file):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH: it comes with the CUDA toolkit")
    # Without torch's cache each tensor has its own bounds.
    tests = [sys.executable, "-m", "pytest", "-q", "-x", str(HERE / file)]
    done = subprocess.run(
        [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *tests],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:]
