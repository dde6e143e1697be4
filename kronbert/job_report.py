"""What `kronbert compress` leaves behind: report.md, report.json and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import pictures
from .job_folder import write_whole
from .job_models import model_name
from .reporting import report
from .weight_errors import weight_errors

SCHEMA = 1
SEQUENCE = 128
"""Tokens per row of the timed models, or what they take at most."""


def write_report(
    folder: Path,
    state: Mapping[str, Any],
    task: Any,
    source: str,
    answers: tuple[Mapping[str, Any], Mapping[str, Any]],
    student: Any,
    teacher: Any,
    base: Any,
    longest: int,
) -> dict[str, Any]:
    """Measure student and teacher, write the report of a finished job into ``folder``; its JSON.

    answers: the student's and the teacher's, dev set -> logits and labels. base: the dense model
    that the student was made of. longest: tokens that both take in a row, at least."""
    from .distill.fidelity import fidelity
    from .distill.retention import retention_error, share_kept

    steps = state["steps"]
    measured = report(student, teacher, sequence_length=min(SEQUENCE, longest))
    errors, unmatched = weight_errors(student, base)
    measured = replace(measured, errors=errors, unmatched=unmatched)
    first = next(iter(steps["task"]["scores"]))
    before = steps.get("intermediate", steps["task"])
    scores = {
        "teacher": steps["teacher"]["scores"],
        "student": steps["task"]["scores"],
        "student_before_distillation": before["scores_before"],
        "commonest_class": steps["teacher"]["commonest"],
    }
    teacher_score = scores["teacher"][first][task.primary]
    student_score = scores["student"][first][task.primary]
    own, theirs = answers
    content = {
        "schema": SCHEMA,
        "settings": state["settings"],
        "task": task.to_dict(),
        "data": source,
        "rows": state["data"],
        "cut": state.get("cut"),
        "teacher_fine_tuned_here": steps["teacher"]["fine_tuned_here"],
        "synthetic": source.startswith("synthetic"),
        "scores": scores,
        "metric": f"{first} {task.primary}",
        "fidelity": {k: fidelity(own[k].predictions, theirs[k].predictions) for k in own},
        "retention": share_kept(student_score, teacher_score),
        "retention_error": retention_error(task, own[first], theirs[first]),
        "seconds": {name: step["seconds"] for name, step in steps.items()},
        "start": steps.get("start", {}).get("start"),
        "hidden_errors": steps.get("start", {}).get("hidden_errors"),
        "stages": {name: step["stage"] for name, step in steps.items() if "stage" in step},
        "measured": measured.to_json(),
        "history": {name: step["history"] for name, step in steps.items()},
    }
    drawn = _draw(folder, content, measured, teacher_score, student_score)
    write_whole(folder / "report.md", _markdown(content, measured, drawn, first, task))
    write_whole(folder / "report.json", json.dumps(content, indent=1) + "\n")
    return content


def _draw(
    folder: Path, content: Mapping[str, Any], measured: Any, teacher: float, student: float
) -> list[tuple[str, str]]:
    """The pictures, as (title, file name)."""
    drawn = []
    pictures.learning_curve(
        _one_history(content["history"]),
        folder / "learning_curve.png",
        metric=content["task"]["primary"],
        teacher_score=teacher,
    )
    drawn.append(("Learning curve", "learning_curve.png"))
    batch = min(measured.student.latency, default=None)
    if batch is not None and measured.teacher is not None:
        points = [
            {
                "name": name,
                "parameters": side.parameters,
                "latency_ms": side.latency[batch].median_ms,
                "score": score,
                "kind": name,
            }
            for name, side, score in (
                ("teacher", measured.teacher, teacher),
                ("student", measured.student, student),
            )
        ]
        pictures.size_speed_score(points, folder / "size_speed_score.png", metric=content["metric"])
        drawn.append(("Size, speed, score", "size_speed_score.png"))
    if measured.errors:
        pictures.error_per_layer(measured.errors, folder / "error_per_layer.png")
        drawn.append(("Distance from the teacher's weights", "error_per_layer.png"))
    return drawn


def _markdown(
    content: Mapping[str, Any],
    measured: Any,
    drawn: list[tuple[str, str]],
    first: str,
    task: Any,
) -> str:
    settings = content["settings"]
    lines = [f"# {model_name(settings['model'])} on {task.name}, compressed with kronbert", ""]
    if content["synthetic"]:
        lines += ["> The data is synthetic: generated sentences. Its scores say nothing about "
                  "real text.", ""]  # fmt: skip
    wanted = f"factor {settings['factor']:g}" if settings["factor"] else settings["preset"]
    if settings.get("layers") is not None:
        wanted += f", {settings['layers']} layers"
    lines += [
        _summary(content, measured, first, task),
        "",
        f"Asked for: {wanted}. Data: {content['data']}. Seed {settings['seed']}.",
        "",
        _training(content["stages"]) + (f" {content['cut']}." if content["cut"] else ""),
        "",
        "## Score (dev set)",
        "",
        "| | " + " | ".join(f"{s} {m}" for s in content["scores"]["student"] for m in task.metrics)
        + " |",
        "|---|" + "---|" * (len(content["scores"]["student"]) * len(task.metrics)),
    ]  # fmt: skip
    fitted = "fitted" in (content["hidden_errors"] or ())
    before = "student, fitted to the teacher" if fitted else "student, converted only"
    if content["start"]:
        before = f"student, from {content['start']['name']}"
    elif "stage1" in content["stages"]:
        before = "student, after stage 1"
    for name, title in (
        ("teacher", "teacher"),
        ("student_before_distillation", before),
        ("student", "student, distilled"),
        ("commonest_class", "always the commonest class"),
    ):
        if content["scores"][name] is None:
            continue
        cells = [
            f"{100 * value:.1f}"
            for values in content["scores"][name].values()
            for value in values.values()
        ]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", _agreement(content["fidelity"]), "", measured.to_markdown(), ""]
    for title, file in drawn:
        lines += [f"![{title}]({file})", ""]
    minutes = ", ".join(f"{name} {s / 60:.1f} min" for name, s in content["seconds"].items())
    lines += [
        "A distilled weight is the student's own: its distance from the teacher's says how far it "
        "went, not how good it is.",
        "",
        f"Time, each step from its last start: {minutes}.",
        "",
        "Load the student: `import kronbert`, then "
        "`AutoModelForSequenceClassification.from_pretrained('student')`.",
        "",
    ]
    return "\n".join(lines)


def _one_history(history: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Both steps of stage 2, one after another; the first is logged from step 0 on."""
    rows: list[dict[str, Any]] = []
    for name in ("intermediate", "task"):
        behind = max((row["step"] for row in rows), default=0)
        rows += [{**row, "step": behind + row["step"]} for row in history.get(name, ())]
    return rows


def _summary(content: Mapping[str, Any], measured: Any, first: str, task: Any) -> str:
    """Size, speed and score in one sentence each."""
    said = f"The student is {measured.factor:.1f} times smaller than its teacher"
    ratio = measured.latency_ratio.get(min(measured.latency_ratio, default=0))
    if ratio is not None:
        batch = min(measured.latency_ratio)
        pace = f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"
        said += f" and {pace} at batch {batch}"
    kept = content["retention"]
    if kept is None:
        teacher = 100 * content["scores"]["teacher"][first][task.primary]
        said += f". What it keeps of the {task.primary} is not defined"
        return f"{said}: its teacher has {teacher:.1f}."
    said += f"; it keeps {100 * kept:.1f} % of the {task.primary} on {first}"
    error = content["retention_error"]
    if error is None:
        return f"{said}."
    return f"{said}, ± {100 * error:.1f} for want of more rows (standard error)."


def _agreement(found: Mapping[str, Mapping[str, float]]) -> str:
    said = [
        f"on {100 * one['agreement']:.1f} % of the rows of {name} (KL {one['kl']:.3f})"
        if "agreement" in one
        else f"on {name} with a correlation of {one['correlation']:.3f}, {one['rmse']:.2g} off"
        for name, one in found.items()
    ]
    return f"Right or wrong, the student answers as its teacher does {', '.join(said)}."


def _training(stages: Mapping[str, Any]) -> str:
    parts = [
        f"{name}: {stage['epochs']:.3g} epochs at {stage['learning_rate']:g}, batch "
        f"{stage['batch_size']}, up to {stage['max_length']} tokens"
        for name, stage in stages.items()
    ]
    return "Training: " + "; ".join(parts) + "."
