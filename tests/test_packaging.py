"""What is installed: one top-level package, with every code folder in it and nothing else."""

import ast
import importlib
import importlib.metadata
import inspect
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
# Where the code lies, and the package it is installed as.
CODE = {"kronbert": "kronbert", "kernels": "kronbert/kernels", "distill": "kronbert/distill"}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def code_files() -> dict[str, Path]:
    """Path in the wheel -> file in the tree, of everything that must be shipped."""
    files = {}
    for folder, package in CODE.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            linked = folder == "kronbert" and inside.parts[0] in CODE
            if path.is_file() and not linked and "__pycache__" not in inside.parts:
                # The folders' own are for readers of the tree; a student's is its model card.
                if path.name != "README.md" or inside.parts[0] == "students":
                    files[f"{package}/{inside.as_posix()}"] = path
    return files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the tree, built from a copy: a stale `build/` would add what is long gone."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for folder in CODE:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.mark.parametrize("folder", ["kernels", "distill"])
def test_folder_is_linked_into_the_package(folder):
    link = ROOT / "kronbert" / folder
    assert link.is_symlink(), f"make it again: ln -s ../{folder} kronbert/{folder}"
    assert os.readlink(link) == f"../{folder}"
    assert link.resolve() == ROOT / folder


def test_kernels_shadows_nobody():
    # With an __init__.py, transformers takes this folder for Hugging Face's package of that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_every_code_folder_is_shipped(project):
    tool = project["tool"]["setuptools"]
    assert set(tool["packages"]) == set(tool["package-dir"])
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for path in code_files().values()
        if path.suffix == ".py"
    }
    missing = folders - set(tool["package-dir"].values())
    assert not missing, f"add to packages and package-dir in pyproject.toml: {sorted(missing)}"
    gone = [name for name in tool["package-dir"].values() if not (ROOT / name).is_dir()]
    assert not gone, f"named in pyproject.toml, not in the tree: {gone}"


def test_package_dir_matches_package_names(project):
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        top, _, rest = folder.partition("/")
        expected = CODE[top] + (f"/{rest}" if rest else "")
        assert package == expected.replace("/", ".")


@pytest.mark.slow
def test_wheel_holds_the_tree_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"kronbert"}
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == set(code_files())
    assert "kronbert/py.typed" in shipped
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_metadata(wheel, project):
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {project['project']['version']}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "kronbert = kronbert.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert archive.read(f"{info}/top_level.txt").decode().split() == ["kronbert"]


def test_every_dependency_is_pinned(project):
    """Each requirement, of every extra, has an exact version in constraints.txt."""
    pins = set()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        pin = line.partition("#")[0].partition(";")[0].strip()
        if pin:
            name, _, version = pin.partition("==")
            assert version, f"constraints.txt: {pin!r} is no exact version"
            assert "+" not in version, f"constraints.txt: {pin!r} names a local build"
            pins.add(name.lower().replace("_", "-"))
    requirements = [*project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        requirements += extra
    names = {r.partition(";")[0].partition(">")[0].partition("[")[0].strip() for r in requirements}
    assert names - pins == {"kronbert"}


def test_public_names_exist_and_say_what_they_are():
    kronbert = importlib.import_module("kronbert")
    assert sorted(set(kronbert.__all__)) == sorted(kronbert.__all__), "a name twice in __all__"
    for name in kronbert.__all__:
        thing = getattr(kronbert, name)
        if inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing):
            assert inspect.getdoc(thing), f"kronbert.{name} has no docstring"


def test_no_module_is_hidden_by_a_public_name():
    """With a file convert.py, `import kronbert.convert as c` would yield the function."""
    kronbert = importlib.import_module("kronbert")
    modules = {path.stem for path in (ROOT / "kronbert").glob("*.py")}
    assert modules & set(kronbert.__all__) == set()


def test_type_checkers_see_the_public_names():
    """Names loaded on first use are invisible to mypy and editors unless imported for them."""
    kronbert = importlib.import_module("kronbert")
    tree = ast.parse((ROOT / "kronbert" / "__init__.py").read_text(encoding="utf-8"))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    names = {alias.asname for node in imported for alias in node.names if alias.asname}
    assert {name for name in names if not name.startswith("_")} == set(kronbert.__all__)


def test_version_is_the_installed_one(project):
    kronbert = importlib.import_module("kronbert")
    assert kronbert.__version__ == project["project"]["version"]
    try:
        installed = importlib.metadata.version("kronbert")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("kronbert is not installed, only on the path")
    assert installed == kronbert.__version__
