"""How a job trains: the recipe's stages, with what its settings change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .errors import DataError
from .job_depth import at_depth
from .job_models import masked_lm_saved
from .job_rows import tokens_in
from .job_settings import CompressSettings


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """for_teacher: the stage that fine-tunes it; general: stage 1 on text; on_task: stage 2's
    steps. tokens_wanted: in the rows of stage 2, 0: as they are. max_length: tokens per row.
    masked: whether the checkpoint has a masked-LM head. scale: mean and standard deviation of the
    training rows' scores, None for classes."""

    for_teacher: Any
    general: Any
    on_task: list[Any]
    tokens_wanted: int
    max_length: int
    masked: bool
    scale: tuple[float, float] | None

    @classmethod
    def of(
        cls, settings: CompressSettings, data: Any, config: Any, tokenizer: Any, most: int
    ) -> Schedule:
        """For these rows and the checkpoint of ``config``. most: tokens that it takes in a row."""
        from .distill.checks import has_masked_lm
        from .distill.finetune import labels_only, use_bf16
        from .distill.recipes.kronbert import kronbert
        from .distill.recipes.kroneckerbert import kroneckerbert
        from .distill.score_scale import scale_of
        from .distill.stages import Stage

        task = data.task
        use_bf16(settings.precision)
        if settings.max_length is not None and settings.max_length > most:
            raise DataError(
                f"max_length={settings.max_length}: {settings.model} takes {most} tokens at most."
            )
        length = settings.max_length
        if length is None:
            length = min(task.max_length, most)
        masked = has_masked_lm(config, tokenizer) and masked_lm_saved(settings.model)
        # A folder may be named like one of GLUE's tasks, and hold a part of one.
        name = task.name if task.hub else None
        tokens = tokens_in(data, tokenizer, length)
        scale = scale_of(data) if task.labels is None else None
        if settings.preset is not None:
            recipe = kroneckerbert(settings.preset, task=name, mlm=masked)
        else:
            recipe = kronbert(
                task=name,
                tokens=tokens,
                regression=scale is not None,
                spread=scale and scale[1] ** 2,
                mlm=masked,
                max_length=length,
            )
        steps = [stage for stage in recipe.stages if stage.name != "general"]
        passes, rate = sum(stage.epochs for stage in steps), steps[0].learning_rate
        on_task = [
            _changed(
                at_depth(stage),
                epochs=settings.epochs and settings.epochs * stage.epochs / passes,
                learning_rate=settings.learning_rate
                and settings.learning_rate * stage.learning_rate / rate,
                batch_size=settings.batch_size,
                max_length=length,
                seed=settings.seed,
                cache_teacher=settings.cache_teacher,
            )
            for stage in steps
        ]
        general = _changed(
            at_depth(recipe.stage("general")),
            epochs=settings.stage1_epochs,
            learning_rate=settings.stage1_learning_rate,
            batch_size=settings.batch_size,
            max_length=length,
            seed=settings.seed,
        )
        small = getattr(config, "hidden_size", 768) < 512
        for_teacher = Stage(
            name="teacher",
            objective=labels_only(),
            learning_rate=1e-4 if small else 3e-5,
            epochs=settings.teacher_epochs,
            batch_size=on_task[-1].batch_size,
            max_length=length,
            seed=settings.seed,
        )
        return cls(
            for_teacher=_changed(for_teacher, learning_rate=settings.teacher_learning_rate),
            general=general,
            on_task=on_task,
            tokens_wanted=recipe.tokens_wanted,
            max_length=length,
            masked=masked,
            scale=scale,
        )


def _changed(stage: Any, **values: Any) -> Any:
    return replace(stage, **{key: value for key, value in values.items() if value is not None})
