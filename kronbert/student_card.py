"""The report of a pre-distilled student, and its model card: every number is the report's."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .job_models import model_name

SCHEMA = 1
PATHS = ("text", "valid")


def student_report(
    settings: Mapping[str, Any], trained: Mapping[str, Any], data: str
) -> dict[str, Any]:
    """The content of report.json: no folder of this machine stands in it.

    seconds and tokens_per_second: of the last start, if the run was interrupted (None where only
    the saving was left); held_out_seconds are part of the seconds but not of the speed."""
    import torch
    import transformers

    from . import __version__

    stage = trained["stage"]
    first = trained["steps"] - trained["steps_of_last_start"]
    aside = sum(
        row.get("held_out_seconds", 0)
        for row in trained["history"]
        if row["step"] > first or not first
    )
    busy, read = trained["training_seconds"] - aside, trained["tokens_of_last_start"]
    return {
        "schema": SCHEMA,
        "settings": _without_folders(settings),
        "asked": trained["asked"],
        "before": trained["before"],
        "data": data,
        "teacher": trained["teacher"],
        "student": trained["student"],
        "licence": settings["licence"],
        "steps": trained["steps"],
        "tokens": trained["tokens"],
        "seconds": trained["training_seconds"],
        "held_out_seconds": round(aside, 2),
        "tokens_per_second": round(read / max(busy, 1e-3), 1) if read else None,
        "stage": stage,
        "held_out": None,
        "versions": {
            "kronbert": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "history": trained["history"],
    }


def _without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    shown = {key: value for key, value in settings.items() if key not in ("output", "licence")}
    for key in ("model", "student"):
        if shown[key] is not None:
            shown[key] = model_name(shown[key])
    for key in PATHS:
        if shown[key] is not None and Path(shown[key]).is_file():
            shown[key] = Path(shown[key]).name
    return shown


def student_card(report: Mapping[str, Any]) -> str:
    """README.md of a student's folder, as the Hugging Face hub shows it."""
    teacher, student, settings = report["teacher"], report["student"], report["settings"]
    stage, speed = report["stage"], report["tokens_per_second"]
    head = ["library_name: transformers", "tags: [kronbert, kronecker, distillation]"]
    if report["licence"]:
        head.insert(0, f"license: {report['licence']}")
    if "/" in teacher["name"]:
        head.append(f"base_model: {teacher['name']}")
    terms = " + ".join(
        term["tap"] if term["weight"] == 1 else f"{term['weight']:g} {term['tap']}"
        for term in stage["objective"]["terms"]
    )
    lines = [
        "---",
        *head,
        "---",
        "",
        f"# {teacher['name']}, {student['factor']:.1f} times smaller",
        "",
        f"{student['parameters']:,} parameters for the teacher's {teacher['parameters']:,}"
        f"{_depth(report)}; its "
        f"weights are sums of Kronecker products, stored as {student['dtype']}. {_learnt(report)}",
        "",
        "```python",
        "import kronbert  # tells transformers about the format",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'name = "this folder or its hub name"',
        "tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name)",
        *(_EMBEDDINGS if settings.get("sentences") else ()),
        "```",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        f"| text | {settings['text']}: {report['data']} |",
        f"| objective | {terms} |",
        f"| steps | {report['steps']:,} of {stage['batch_size']} {_rows(settings)}, "
        f"{report['tokens']:,} tokens |",
        f"| learning rate | {stage['learning_rate']:g}, {stage['scheduler']} |",
        f"| optimiser | {_optimiser(stage)} |",
        f"| seed | {stage['seed']} |",
        *_before(report),
        *([f"| tokens per second | {speed:,.0f} |"] if speed else []),
        "| versions | " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + " |",
        "",
    ]
    if report["held_out"]:
        start, end = report["held_out"]["start"], report["held_out"]["end"]
        before = "converted only" if settings["student"] is None else "before this run"
        lines += [
            f"## Losses on held-out text ({settings['valid']})",
            "",
            f"| term | {before} | distilled |",
            "|---|---|---|",
            *(
                f"| {key.removeprefix('loss_')} | {start[key]:.4g} | {end[key]:.4g} |"
                for key in start
                if key.startswith("loss_")
            ),
            "",
        ]
    lines += ["Every number on this page is in report.json. Task scores: not measured here.", ""]
    return "\n".join(lines)


_EMBEDDINGS = (
    'batch = tokenizer(["A sentence."], padding=True, truncation=True, return_tensors="pt")',
    "states, mask = model(**batch).last_hidden_state, batch.attention_mask[..., None]",
    "embeddings = (states * mask).sum(1) / mask.sum(1)  # of unpadded tokens",
)


def _depth(report: Mapping[str, Any]) -> str:
    """How many layers it has, if they are fewer than the teacher's."""
    deep = report["teacher"]["sizes"]["num_hidden_layers"]
    has = report["student"].get("layers", deep)
    return "" if has == deep else f", in {has} layers for its {deep}"


def _learnt(report: Mapping[str, Any]) -> str:
    if report["settings"].get("sentences"):
        return (
            "Distilled on general text, its sentence embeddings last: means over tokens, to be "
            "compared by their cosines as the teacher's are; sentence-transformers opens it too, "
            "after `import kronbert`. For a task fine-tune it, or let `kronbert compress` start "
            "from it."
        )
    return (
        "Distilled on general text, not yet on a task: fine-tune it, or let `kronbert compress` "
        "start from it."
    )


def _rows(settings: Mapping[str, Any]) -> str:
    return "sentences" if settings.get("sentences") else "blocks"


def _before(report: Mapping[str, Any]) -> list[str]:
    """The run whose student this one went on from, and what came before that."""
    earlier, lines = report.get("before"), []
    while earlier is not None:
        lines.append(
            f"| before | {earlier['steps']:,} steps of {earlier['stage']['batch_size']} "
            f"{_rows(earlier['settings'])}, {earlier['tokens']:,} tokens of "
            f"{earlier['settings']['text']} |"
        )
        earlier = earlier.get("before")
    return lines


def _optimiser(stage: Mapping[str, Any]) -> str:
    rate = stage.get("muon_rate")
    return f"AdamW; Muon at {rate:g} times the rate for layers' matrices" if rate else "AdamW"
