"""Which structure learns most from general text: stage 1 of students of one size, side by side.

    python examples/stage1_study.py --model FOLDER_OR_HUB --text wiki.txt --valid held_out.txt

Every variant has the planner's number of parameters for the factor, or a little less where its
shapes allow no more, the same text in the same order and the same steps. Each is a folder below
--output, resumable; several processes may work on different variants (--variants).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from study_provenance import provenance  # type: ignore[import-not-found]
from study_structures import STRUCTURES, restructured  # type: ignore[import-not-found]
from transformers import AutoConfig

import kronbert
from kronbert.distill.begun import claim
from kronbert.errors import DistillError
from kronbert.job_folder import write_whole
from kronbert.pretrain import PretrainSettings, pretrain_student

OTHERS: dict[str, dict[str, Any]] = {
    "planned, weights init": {"init": "weights"},
    "planned, AdamW": {"optimizer": "adamw"},
    "planned, AdamW at 1e-3": {"optimizer": "adamw", "learning_rate": 1e-3},
}
"""The planner's structure with something else changed in `PretrainSettings`."""

VARIANTS = (*STRUCTURES, *OTHERS)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = made.add_argument
    add("--model", required=True, help="hub name or folder of the encoder that teaches")
    add("--text", required=True, help="as kronbert pretrain-student takes it")
    add("--valid", required=True, help="held-out text")
    add("--words", type=int, default=800_000, help="of the text, for every variant")
    add("--factors", nargs="+", type=float, default=[8.0, 19.0])
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    add("--output", default="runs/stage1", help="one folder per variant")
    add("--results", default="examples/results/stage1.json")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=42)
    return made


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    output = Path(options.output)
    for factor in options.factors:
        for variant in options.variants:
            folder = output / f"{factor:g}-{variant.replace(' ', '-').replace(',', '')}"
            row = made(options, factor, variant, folder)
            print(f"{factor:g}x {variant}: {row['parameters']:,}, {row['points'][-1]}", flush=True)
    collect(output, Path(options.results))


def made(options: Any, factor: float, variant: str, folder: Path) -> dict[str, Any]:
    """The variant's row: from its folder, or trained now."""
    path = folder / "row.json"
    told = {key: getattr(options, key) for key in ("model", "text", "valid", "words", "seed")}
    claim(folder, told, begun=path.is_file())
    if not path.is_file():
        plan = kronbert.plan(AutoConfig.from_pretrained(options.model), factor=factor)
        plan = restructured(plan, variant if variant in STRUCTURES else "planned")
        rules = {
            layer.size.name: " + ".join(shape.spec for shape in layer.groups)
            for layer in plan.converted
        }
        settings = PretrainSettings(
            model=options.model,
            text=options.text,
            valid=options.valid,
            valid_blocks=64,
            words=options.words,
            output=str(folder),
            rules=rules,
            seed=options.seed,
            **OTHERS.get(variant, {}),
        )
        report = pretrain_student(settings)
        points = json.loads((folder / "curve.json").read_text())["points"]
        row = {
            "factor": factor,
            "variant": variant,
            "parameters": report["student"]["parameters"],
            "flops_per_token": plan.linear_flops(1),
            "shapes": shapes_of(plan),
            "data": report["data"],
            "points": points,
            "seconds": report["seconds"],
            "words": options.words,
            "learning_rate": report["stage"]["learning_rate"],
            "muon_rate": report["stage"]["muon_rate"],
            "seed": options.seed,
            **provenance("unknown"),
        }
        write_whole(path, json.dumps(row, indent=1) + "\n")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def shapes_of(plan: Any) -> dict[str, str]:
    """Group and size of a layer -> its shapes; layers of one size share them."""
    return {
        f"{layer.size.group} {layer.size.out}x{layer.size.inner}": " + ".join(
            shape.spec for shape in layer.groups
        )
        for layer in plan.converted
    }


def collect(output: Path, results: Path) -> None:
    """Every variant that is done, in one file."""
    rows = [json.loads(path.read_text()) for path in output.glob("*/row.json")]
    if len(words := {row["words"] for row in rows}) > 1:
        raise DistillError(
            f"{output}: rows of {sorted(words)} words do not compare. Use one --output each."
        )
    order = list(VARIANTS)
    rows.sort(key=lambda row: (row["factor"], order.index(row["variant"])))
    command = "python examples/stage1_study.py --model MODEL --text TEXT --valid VALID"
    content = {"command": f"{command} --words {rows[0]['words']}", "rows": rows}
    write_whole(results, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
