"""The command that measures this machine for the CPU engine."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import PlanError
from .job_folder import writable

out = Console(markup=False, highlight=False)


def calibrate(
    output: Annotated[
        Path | None, typer.Option(help="file; default: where every later process looks for it")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch's; default: those of this process")
    ] = None,
) -> None:
    """Measure this machine's products, so that layers on its CPU run in their fastest form."""
    import torch

    from .cpu_calibrate import cache_file, machine
    from .cpu_calibrate import calibrate as measure

    if output is not None and output.is_dir():
        raise PlanError(f"--output {output}: is a folder. Name a file in it.")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        path = output or cache_file()
        writable(path.parent)
        out.print("measuring; let nothing else run for about half a minute")
        start = perf_counter()
        measure(path)
        seconds, on = perf_counter() - start, machine()
    finally:
        torch.set_num_threads(before)
    out.print(f"wrote {path} in {seconds:.1f} s")
    out.print(
        f"for {on['cpu']} ({on['instructions']}), {on['threads']} threads, torch {on['torch']}"
    )
    out.print(chosen_forms(path))


def chosen_forms(times: Path, rows: int = 128) -> Table:
    """What these times choose for the papers' layers of BERT-base."""
    from .cpu_cost import load_tables
    from .presets import PRESETS

    found: dict[tuple[str, Any], list[str]] = {}
    for name, preset in PRESETS.items():
        for part, small, size in (
            ("attention", preset.attention, (768, 768)),
            ("expand", preset.expand, (3072, 768)),
            ("contract", preset.contract, (768, 3072)),
        ):
            found.setdefault((part, small.shape(*size, name)), []).append(name)
    tables = load_tables(times)
    table = Table(title=f"chosen for BERT-base's layers at {rows} rows")
    for column in ("preset", "layer", "shape", *tables):
        table.add_column(column)
    for (part, shape), names in found.items():
        forms = [str(costs.choose((shape,), rows)[0]) for costs in tables.values()]
        table.add_row(", ".join(names), part, str(shape), *forms)
    return table
