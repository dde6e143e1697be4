"""The modules of kronbert, and what their source imports."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Import(NamedTuple):
    """One imported module, e.g. `kernels.linear` (ours, relative to kronbert) or `torch.nn`."""

    target: str
    name: str | None  # what is taken from it, None for `import target`
    ours: bool
    lazy: bool
    line: int


def files() -> dict[str, Path]:
    """Module name relative to kronbert -> its file."""
    found = {}
    for folder, prefix in (("kronbert", ""), ("kernels", "kernels."), ("distill", "distill.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "kronbert" and parts[0] in ("kernels", "distill"):
                continue  # seen through the link
            found[prefix + ".".join(parts)] = path
    return found


FILES = files()


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Every import statement that can run, with whether a call is needed to run it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                yield from statements(ast.Module([other], []), lazy)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from statements(child, lazy or inside)


def resolve(target: str, name: str | None, lazy: bool, line: int) -> Import:
    """An absolute import, with our modules told from names defined in them."""
    if target.partition(".")[0] != "kronbert":
        return Import(target, name, False, lazy, line)
    inner = target.partition(".")[2]
    if name is not None:
        module = f"{inner}.{name}".strip(".")
        if module in FILES or f"{module}.__init__" in FILES:
            inner, name = module, None
    if f"{inner}.__init__".strip(".") in FILES and inner not in FILES:
        inner = f"{inner}.__init__".strip(".")
    return Import(inner or "__init__", name, True, lazy, line)


def imports(module: str, source: str) -> list[Import]:
    """The imports of ``source``, the text of ``module``."""
    package = ["kronbert", *module.split(".")[:-1]]
    found = []
    for node, lazy in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [resolve(alias.name, None, lazy, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found += [resolve(base, alias.name, lazy, node.lineno) for alias in node.names]
    return found
