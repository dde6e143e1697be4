"""`import kronbert` in a fresh interpreter: what it loads, leaves alone and registers."""

import json
import os
import subprocess
import sys

import pytest

# Loaded by the function that needs them, never by `import kronbert`.
HEAVY = [
    "accelerate",
    "datasets",
    "kernels",
    "kronbert.cli",
    "kronbert.distill",
    "kronbert.kernels",
    "matplotlib",
    "pandas",
    "rich",
    "scipy",
    "sentence_transformers",
    "sklearn",
    "tensorly",
    "transformers.trainer",
    "triton",
    "typer",
]


@pytest.fixture
def python(tmp_path):
    """Runs code in a fresh interpreter, in a folder that is not the repository; its JSON output."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if "PYTHONPATH" in env:  # relative entries would be looked up in tmp_path
        entries = env["PYTHONPATH"].split(os.pathsep)
        env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in entries)

    def run(code: str):
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize(
    ("names", "base"),
    [
        ("kronbert", "torch, transformers"),
        ("kronbert.conversion, kronbert.planning", "torch, transformers.models.auto.modeling_auto"),
        ("kronbert.checkpoint", "torch, transformers.quantizers.auto, transformers.modeling_utils"),
    ],
)
def test_import_is_light(python, names, base):
    """Nothing heavy beyond what torch and transformers load by themselves, at first use neither."""
    code = "import json, sys, {}; print(json.dumps(sorted(sys.modules)))"
    added = set(python(code.format(names))) - set(python(code.format(base)))
    assert sorted(added & set(HEAVY)) == []


def test_import_makes_no_cuda_call(python):
    code = "import json, kronbert, torch; print(json.dumps(torch.cuda.is_initialized()))"
    assert python(code) is False


def test_import_changes_nothing_global(python):
    code = """
import json, logging, os, random, sys, warnings
import torch, transformers

def state():
    return [
        torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(), torch.get_rng_state().tolist(),
        transformers.logging.get_verbosity(), logging.getLogger().level,
        len(logging.getLogger().handlers), repr(random.getstate()), sorted(os.environ.items()),
    ]

before = state()
import kronbert
print(json.dumps([i for i, (a, b) in enumerate(zip(before, state())) if a != b]))
"""
    assert python(code) == [], "the numbers are places in `state()` above"


@pytest.mark.parametrize(
    "imports",
    [
        "import kronbert",
        "import transformers.quantizers.auto, kronbert",
        "from transformers import AutoModel; import kronbert",
        "import kronbert; from transformers import AutoModel",
        # Looking for a module is not importing it.
        "import importlib.util, kronbert; importlib.util.find_spec('transformers.quantizers.auto')",
    ],
)
def test_transformers_knows_the_format(python, imports):
    code = f"""
import json
{imports}
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
known = ["kronecker" in AUTO_QUANTIZATION_CONFIG_MAPPING, "kronecker" in AUTO_QUANTIZER_MAPPING]
print(json.dumps(known))
"""
    assert python(code) == [True, True]


def test_importing_again_registers_once(python):
    """A notebook's autoreload executes the modules a second time."""
    code = """
import importlib, json
import kronbert, transformers.quantizers.auto, kronbert.hf
importlib.reload(kronbert.hf)
importlib.reload(kronbert)
print(json.dumps("kronecker" in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING))
"""
    assert python(code) is True


def test_bare_names_do_not_exist(python):
    """Neither `kernels` (Hugging Face's name) nor `distill` is installed at top level."""
    code = """
import importlib.util, json
import kronbert
names = [n for n in ("kernels", "distill") if importlib.util.find_spec(n)]
print(json.dumps([(n, str(importlib.util.find_spec(n).origin)) for n in names]))
"""
    if "PYTHONPATH" in os.environ:
        pytest.skip("PYTHONPATH may hold the repository's root, where both are folders")
    ours = [name for name, origin in python(code) if "kronbert" in origin or origin == "None"]
    assert ours == []
