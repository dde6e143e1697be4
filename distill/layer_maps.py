"""Which teacher layer each student layer learns from: tuples of integers, layers counted from 1."""

from __future__ import annotations

from collections.abc import Sequence

from kronbert.depth import spread_layers
from kronbert.errors import DistillError, near

LayerMap = str | tuple[int | None, ...]


def identity(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Layer m learns from layer m: (1, 2, ..., student_layers), in models of equal depth."""
    if student_layers != teacher_layers:
        raise DistillError(
            f"layer map 'identity': the student has {student_layers} layers, the teacher "
            f"{teacher_layers}. Use 'uniform' or a tuple with one teacher layer (from 1; 0 = none) "
            "per student layer."
        )
    return tuple(range(1, student_layers + 1))


def uniform(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Layer m learns from m * teacher_layers / student_layers, rounded down: in TinyBERT one is a
    multiple of the other (Jiao et al. 2020). Students of `kronbert.fewer_layers` have these."""
    if student_layers > teacher_layers:
        raise DistillError(
            f"layer map 'uniform': {student_layers} student layers, but {teacher_layers} teacher "
            "layers. Pass a tuple with one teacher layer (from 1; 0 = none) per student layer."
        )
    return spread_layers(student_layers, teacher_layers)


def explicit(
    layers: Sequence[int | None], student_layers: int, teacher_layers: int
) -> tuple[int, ...]:
    """One teacher layer per student layer, checked; 0 or None (0 in the result) is unsupervised."""
    if len(layers) != student_layers:
        raise DistillError(
            f"layer map {tuple(layers)}: {len(layers)} entries for {student_layers} student "
            "layers. Give one teacher layer per student layer, 0 where there is none."
        )
    plain = tuple(layer or 0 for layer in layers)
    for m, layer in enumerate(plain, start=1):
        if not 0 <= layer <= teacher_layers:
            raise DistillError(
                f"layer map {tuple(layers)}: student layer {m} points at teacher layer {layer}; "
                f"the teacher has layers 1 to {teacher_layers}, 0 means none."
            )
    if not any(plain):
        raise DistillError(
            f"layer map {tuple(layers)} supervises no layer: drop the layer terms instead."
        )
    return plain


NAMED = {"identity": identity, "uniform": uniform}


def check(layer_map: LayerMap) -> None:
    """Refuse what cannot be a layer map whatever the depths are."""
    if isinstance(layer_map, str):
        if layer_map not in NAMED:
            raise DistillError(
                f"layer map {layer_map!r} is not known. {near(layer_map, list(NAMED))}"
            )
    elif not all(v is None or (type(v) is int and v >= 0) for v in layer_map):
        raise DistillError(
            f"layer map {layer_map!r}: expected teacher layers from 1, 0 or None for none."
        )


def resolve(layer_map: LayerMap, student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The map as integers, one per student layer: teacher layer from 1, 0 = unsupervised."""
    check(layer_map)
    if isinstance(layer_map, str):
        return NAMED[layer_map](student_layers, teacher_layers)
    return explicit(layer_map, student_layers, teacher_layers)
