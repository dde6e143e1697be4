"""Building the row kernels: where they lie, who goes without, and that plain PyTorch runs then."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kronbert import native

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="built on Linux only"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.skipif(not native._shares_openmp(), reason="torch runs on another OpenMP"),
]

# A feed-forward half and an attention, with the kernels if there are any.
MODEL = """
import hashlib, sys, warnings
import torch
from kronbert import KroneckerLinear, KroneckerShape, blocks, native
from kronbert.blocks import Linear, Norm

torch.manual_seed(0)
def layer(*sides):
    shape = KroneckerShape(*sides)
    made = KroneckerLinear(shape.in_features, shape.out_features, shape)
    return Linear(made.matrices("a"), made.matrices("b"), made.bias)
up, down, same = layer(6, 3, 32, 16), layer(3, 6, 16, 32), layer(6, 6, 8, 8)
norm, x = Norm(torch.rand(48), torch.rand(48), 1e-5), torch.randn(2, 9, 48)
with warnings.catch_warnings(record=True) as caught, torch.no_grad():
    warnings.simplefilter("always")
    y = blocks.ffn_norm(x, up, down, norm)
    y = blocks.linear_norm(y, same, x, norm)
    blocks.ffn_norm(x, up, down, norm)
said = [str(w.message) for w in caught if "kronbert" in str(w.message)]
torch.save((y, native.library() is not None, said), sys.argv[1])
"""


def start(tmp_path, name, **environment):
    """A process that runs `MODEL` with this environment; its results go to a file of that name."""
    own = {"OMP_NUM_THREADS": "1", "KRONBERT_CACHE": str(tmp_path / "cache")}
    dropped = {"KRONBERT_NATIVE", "CC"}
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return subprocess.Popen(
        [sys.executable, "-c", MODEL, str(tmp_path / name)],
        env=kept | own | environment,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process, tmp_path, name):
    """(what the model gave, whether with the kernels, what it warned of)"""
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return torch.load(tmp_path / name)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """`native.library` without what it remembers, and an empty cache folder of this test's own."""
    monkeypatch.delenv("KRONBERT_NATIVE", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("KRONBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "library", native.cache(native.library.__wrapped__))
    return tmp_path / "cache"


def library():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return native.library()


@pytest.mark.slow
def test_processes_share_what_one_built(tmp_path):
    """Two at once build it safely; a third, later, builds nothing; without it the same numbers."""
    cache = tmp_path / "cache"
    both = [start(tmp_path, name) for name in ("one", "two")]
    made = [result(both[0], tmp_path, "one"), result(both[1], tmp_path, "two")]
    (built,) = cache.iterdir()  # one library, no scratch folder left
    before = built.stat()
    made.append(result(start(tmp_path, "three", CC="false"), tmp_path, "three"))
    made.append(result(start(tmp_path, "four", KRONBERT_NATIVE="0"), tmp_path, "four"))
    assert [kernels for _, kernels, _ in made] == [True, True, False, False]
    assert [len(said) for *_, said in made] == [0, 0, 1, 0]
    again = result(start(tmp_path, "five"), tmp_path, "five")
    assert again[1:] == (True, [])
    after = built.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert list(cache.iterdir()) == [built]
    for y, _, _ in (*made, again):
        torch.testing.assert_close(y, made[0][0], rtol=1e-5, atol=1e-5)
    assert torch.equal(again[0], made[0][0])
    assert not torch.equal(made[3][0], made[0][0])  # other code ran


def test_it_is_built_once(fresh, monkeypatch):
    assert library() is not None
    (built,) = fresh.iterdir()
    assert built.name.startswith("native-")
    assert built.suffix == ".so"
    monkeypatch.setattr(native.subprocess, "run", lambda *args, **more: pytest.fail("built again"))
    assert library() is not None
    native.library.cache_clear()
    assert library() is not None


@pytest.mark.parametrize("part", ["FLAGS", "WIDE", "source", "compiler", "processor"])
def test_what_is_built_anew(part, fresh, tmp_path, monkeypatch):
    """Another processor, compiler, source or flag has another file."""
    from kronbert import cpu_calibrate

    made = []
    monkeypatch.setattr(
        native.subprocess, "run", lambda args, **more: Path(args[args.index("-o") + 1]).touch()
    )
    made.append(native._build("cc"))
    assert native._build("cc") == made[0]
    compiler = "cc"
    if part == "source":
        for name in native._SOURCES:
            text = (ROOT / "kronbert" / name).read_text()
            (tmp_path / name).write_text(text + "/* another */")
        monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    elif part == "compiler":
        compiler = "gcc-99"
    elif part == "processor":
        other = cpu_calibrate.machine() | {"cpu": "another"}
        monkeypatch.setattr(cpu_calibrate, "machine", lambda: other)
    else:
        monkeypatch.setattr(native, part, (*getattr(native, part), "-g"))
    made.append(native._build(compiler))
    assert made[0] != made[1]
    assert sorted(fresh.iterdir()) == sorted(made)


def test_turned_off(fresh, monkeypatch):
    monkeypatch.setenv("KRONBERT_NATIVE", "0")
    assert library() is None
    assert not fresh.exists()


def test_without_a_compiler(fresh, monkeypatch):
    monkeypatch.setenv("CC", "/nonexistent/cc")
    assert library() is None  # as on many machines: no warning
    assert not fresh.exists()


def test_elsewhere(fresh, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert library() is None


def test_with_another_openmp(fresh, monkeypatch):
    monkeypatch.setattr(native, "_shares_openmp", lambda: False)
    assert library() is None
    assert not fresh.exists()


def compiler_that(tmp_path, does):
    script = tmp_path / "own-cc"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("echo 'no such header' >&2; exit 1", "no such header"),
        ("exit 1", "returned non-zero exit status 1"),
        ("exit 0", r"\.so"),
    ],
    ids=["says why", "silent", "writes nothing"],
)
def test_a_compiler_that_fails_is_warned_of_once(does, said, fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", compiler_that(tmp_path, does))
    sentence = rf"own-cc could not build the CPU row kernels, so plain PyTorch runs.*{said}"
    with pytest.warns(UserWarning, match=sentence):
        assert native.library() is None
    assert library() is None  # once
    assert not list(fresh.glob("*.so"))
    assert not list(fresh.iterdir())  # no scratch folder left


def test_a_damaged_file_is_warned_of(fresh):
    built = native._build(shutil.which("cc"))
    built.write_bytes(b"no library")
    with pytest.warns(UserWarning, match=r"could not build the CPU row kernels"):
        assert native.library() is None


def test_a_folder_that_cannot_be_written_is_warned_of(fresh, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KRONBERT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"KRONBERT_NATIVE=0 turns them off"):
        assert native.library() is None


STRANGER = """
import os, sys, warnings
import torch
import kronbert.cpu, kronbert.latency, kronbert.native
from kronbert import KroneckerLinear, KroneckerShape
if sys.argv[1] == "none":
    del os.environ["HOME"]
    os.setreuid(54321, 0)  # nobody's number; the files stay readable in a private checkout too
layer, x = KroneckerLinear(768, 768, KroneckerShape(2, 2, 384, 384)), torch.randn(8, 768)
with warnings.catch_warnings(record=True) as caught, torch.no_grad():
    warnings.simplefilter("always")
    for _ in range(2):
        y = layer(x)
expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
print(len(caught), *[w.message for w in caught])
"""


@pytest.mark.parametrize("home", ["none", "a file"])
def test_a_user_without_a_home_of_its_own(home, tmp_path):
    """As in a container that runs under any number: plain PyTorch, one warning."""
    if home == "none" and os.getuid() != 0:
        pytest.skip("only root becomes another user")
    (tmp_path / "home").touch()
    dropped = {"KRONBERT_NATIVE", "KRONBERT_CACHE", "XDG_CACHE_HOME", "CC"}
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, home],
        env=kept | {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("1 kronbert: "), run.stdout
    assert "KRONBERT_CACHE names the folder" in run.stdout
    assert {"none": "no home", "a file": "Not a directory"}[home] in run.stdout


MAPS = "7f00-7f01 r-xp 00000000 08:01 12 /somewhere/{}\n7f02-7f03 rw-p 00000000 00:00 0\n"
TORCH = "torch/lib/libgomp.so.1"


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        ([TORCH], True),
        ([TORCH, "scikit_learn.libs/libgomp-e985bcbb.so.1.0.0"], True),
        # Asked for by its usual name, another would be loaded beside these.
        (["torch/lib/libgomp-a34b3233.so.1"], False),
        ([TORCH, "torch/lib/libiomp5.so"], False),
        (["lib/libm.so.6"], False),
    ],
)
def test_only_torch_s_own_openmp_is_shared(names, shared, monkeypatch):
    maps = "".join(MAPS.format(name) for name in names)
    monkeypatch.setattr(native.Path, "read_text", lambda self: maps)
    assert native._shares_openmp() is shared
