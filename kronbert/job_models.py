"""Opens models and tokenizers by name, and asks whether a teacher suits its task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DataError, DistillError, KronbertError
from .shipped import find_shipped


def open_pretrained(auto: Any, name: str, **kwargs: Any) -> Any:
    """``auto.from_pretrained(name)``, of a student of `kronbert.list_students` by its name too;
    `DataError` in plain words where there is nothing to load."""
    from safetensors import SafetensorError

    name = str(find_shipped(name) or name)
    folder = Path(name).expanduser()
    by_path = name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name
    if by_path and not folder.exists():
        raise DataError(f"model {name!r}: no such folder.")
    if by_path and not folder.is_dir():
        raise DataError(f"model {name!r}: a file; expected the folder that save_pretrained wrote.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        why = "Expected what save_pretrained wrote."
        if (folder / "modules.json").is_file():
            why = (
                "Its encoder lies in a folder of its own, as early sentence-transformers saved it; "
                "save it again: SentenceTransformer(folder).save_pretrained(another)."
            )
        raise DataError(f"model {name!r}: the folder holds no config.json. {why}")
    try:
        return auto.from_pretrained(str(folder) if folder.is_dir() else name, **kwargs)
    except KronbertError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if folder.is_dir():
            raise DataError(
                f"model {name!r}: the folder cannot be read ({reason}). Expected what "
                "save_pretrained wrote, of the model and of its tokenizer."
            ) from error
        raise DataError(
            f"model {name!r}: no such folder here, and the Hugging Face hub does not give it "
            f"({reason})."
        ) from error


def open_tokenizer(name: str) -> Any:
    """The model's tokenizer.

    From a folder without one, transformers makes an empty tokenizer that knows no word."""
    from transformers import AutoTokenizer

    tokenizer = open_pretrained(AutoTokenizer, name)
    files = set(type(tokenizer).vocab_files_names.values()) | {"tokenizer.json"}
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).is_file() for file in files):
        raise DataError(
            f"model {name!r}: the folder holds no tokenizer ({', '.join(sorted(files))}). Save "
            "it there: tokenizer.save_pretrained(folder)."
        )
    return tokenizer


def model_name(name: str) -> str:
    """The name for a reader: a hub name, or the end of a folder's path."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    parts = folder.resolve().parts
    return parts[-2] if parts[-1] == "model" and len(parts) > 2 else parts[-1]


def open_model(name: str) -> Any:
    """A model with the class that saved it; a student of `kronbert.list_students` by its name.

    The encoder alone where the config names a masked LM and no weight is its head's, as many
    sentence encoders are saved. `DistillError` where a weight is missing from the checkpoint."""
    import transformers

    config = open_pretrained(transformers.AutoConfig, name)
    saved_as = (config.architectures or ["AutoModel"])[0]
    auto = getattr(transformers, saved_as, transformers.AutoModel)
    if saved_as.endswith("ForMaskedLM") and not masked_lm_saved(name):
        auto = transformers.AutoModel
    return _open_whole(auto, name)


def masked_lm_saved(name: str) -> bool:
    """Whether a checkpoint holds weights of a masked-LM head, whatever its config says."""
    from transformers import AutoModelForMaskedLM

    with quiet():
        model, loaded = open_pretrained(AutoModelForMaskedLM, name, output_loading_info=True)
    body = f"{model.base_model_prefix}."
    tied = model.get_input_embeddings().weight  # XLM-R's head comes first, and names it
    named = [key for key, one in model.named_parameters() if one is not tied]
    head = {key for key in named if not key.startswith(body)}
    return not head <= set(loaded["missing_keys"])


def open_encoder(name: str, *, masked: bool = False) -> Any:
    """The encoder without a task's head, in float32: with its masked-LM head, or with the pooler it
    was saved with, if any. `DistillError` where a weight is missing from the checkpoint."""
    import torch
    from transformers import AutoModel, AutoModelForMaskedLM

    auto: Any = AutoModelForMaskedLM if masked else AutoModel
    return _open_whole(auto, name, dtype=torch.float32)


def _open_whole(auto: Any, name: str, **how: Any) -> Any:
    import inspect

    with quiet():
        model, loaded = open_pretrained(auto, name, output_loading_info=True, **how)
        missing = sorted(loaded["missing_keys"])
        bare = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
        if missing and bare and all("pooler." in key for key in missing):
            return open_pretrained(auto, name, add_pooling_layer=False, **how)
    _refuse_random(f"{name}:", missing, "Give a complete checkpoint.")
    return model


OTHER_CLASSIFIERS = ("ForTokenClassification", "ForMultipleChoice")
"""Endings of classes whose head would be taken for a new one: it has its name."""


def open_teacher(name: str, task: Any) -> tuple[Any, bool]:
    """(model with a head for ``task``, whether it is fine-tuned already); in float32, whatever the
    checkpoint has.

    A checkpoint saved as ``...ForSequenceClassification`` is a fine-tuned teacher; its head must
    have the task's classes. The weights of a new head, and of a pooler that the checkpoint lacks,
    are random: set a seed before. `DistillError` where another weight is missing."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = open_pretrained(AutoConfig, name)
    full: dict[str, Any] = {"output_loading_info": True, "dtype": torch.float32}
    saved_as = (config.architectures or [""])[0]
    if saved_as.endswith(OTHER_CLASSIFIERS):
        raise DistillError(
            f"{name}: saved as {saved_as}, whose head classifies something else than rows. Give "
            f"its base model: AutoModel.from_pretrained({name!r}).save_pretrained(folder)."
        )
    if not saved_as.endswith("ForSequenceClassification"):
        head: dict[str, Any] = {"num_labels": task.num_labels}
        if task.labels is None:
            head["problem_type"] = "regression"
        else:
            head["problem_type"] = "single_label_classification"
            head["id2label"] = dict(enumerate(task.labels))
            head["label2id"] = {label: i for i, label in enumerate(task.labels)}
        with quiet():
            model, loaded = open_pretrained(
                AutoModelForSequenceClassification, name, **full, **head
            )
        body = f"{model.base_model_prefix}."
        missing = [k for k in loaded["missing_keys"] if k.startswith(body) and "pooler." not in k]
        _refuse_random(f"{name}:", missing, "Give a complete checkpoint.")
        return model, False
    if config.problem_type == "multi_label_classification":
        raise DistillError(
            f"{name}: its head gives every row any number of classes (problem_type "
            f"{config.problem_type!r}); expected one class a row, or a score."
        )
    if config.num_labels != task.num_labels:
        raise DistillError(
            f"{name}: its head has {_count(config.num_labels)}, task {task.name!r} has "
            f"{_count(task.num_labels)}. Give a model fine-tuned for the task, or, to compress, "
            "its base model; for a folder's numbers say whether they are scores (--regression)."
        )
    _check_labels(name, config, task)
    model, loaded = open_pretrained(AutoModelForSequenceClassification, name, **full)
    what = f"{name}: saved as {saved_as}, but"
    _refuse_random(what, loaded["missing_keys"], "Give a complete checkpoint, or its base model.")
    return model, True


def head_of(config: Any) -> tuple[bool, list[str] | None] | None:
    """Of a fine-tuned checkpoint's head: whether it gives a score, and `class_names`; else None."""
    saved_as = (config.architectures or [""])[0]
    if not saved_as.endswith("ForSequenceClassification"):
        return None
    return config.num_labels == 1, class_names(config)


def class_names(config: Any) -> list[str] | None:
    """A head's own names of its classes; None where it has the library's LABEL_0, LABEL_1."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    return None if all(name.lower().startswith("label_") for name in names) else names


def classes_said(config: Any, task: Any) -> str:
    """Which class of ``task`` each of a fine-tuned head's is taken for, where their names do not
    say so; else nothing."""
    own = [str(config.id2label[i]) for i in range(config.num_labels)]
    if task.labels is None or [n.lower() for n in own] == [n.lower() for n in task.labels]:
        return ""
    return f"; its classes {own} stand for {list(task.labels)}, in this order"


def check_finite(model: Any, name: str, what_to_do: str) -> None:
    """Raise `DistillError` for the first parameter with NaN or infinity in it."""
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise DistillError(f"{name}: {key!r} holds NaN or infinity. {what_to_do}")


def check_tokenizer(model: Any, tokenizer: Any, name: str) -> None:
    """Raise `DistillError` where the model cannot read what the tokenizer writes."""
    if tokenizer.pad_token is None:
        raise DistillError(
            f"{name}: its tokenizer has no padding token, so rows cannot be batched. Set "
            "tokenizer.pad_token and the model's config.pad_token_id, and save both."
        )
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise DistillError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens, its embedding {rows} rows. Give "
            "the model with the tokenizer it was trained with."
        )


def longest(config: Any, tokenizer: Any) -> int:
    """Tokens that model and tokenizer take in one row."""
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if config.model_type in ("roberta", "camembert", "xlm-roberta"):
        positions -= 2  # positions are counted from the padding index on
    return int(min(positions, tokenizer.model_max_length))


def _check_labels(name: str, config: Any, task: Any) -> None:
    """A fine-tuned head with the task's label names in another order would score nonsense."""
    own = [str(config.id2label[i]).lower() for i in range(config.num_labels)]
    asked = [label.lower() for label in task.labels or ()]
    if own != asked and sorted(own) == sorted(asked):
        raise DistillError(
            f"{name}: its classes are {own}, task {task.name!r} has them as {asked}. Fine-tune the "
            "base model here, or load the task's rows with the teacher's order of its classes."
        )


def _refuse_random(what: str, missing: Iterable[str], do: str) -> None:
    """Raise `DistillError` for weights that the checkpoint lacks, if any."""
    if named := ", ".join(sorted(missing)[:3]):
        raise DistillError(f"{what} without {named}, which would be random numbers. {do}")


def _count(labels: int) -> str:
    return "1 output (a score)" if labels == 1 else f"{labels} classes"


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bars for files and its list of a new head's weights."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
