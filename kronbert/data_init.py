"""Initialisation that knows the data: every layer fitted to its teacher's outputs on a text.

Layers are fitted in the order in which the student meets them, each on the student's own inputs
(those that its fitted predecessors give) against the teacher's outputs, so errors are corrected
rather than piled up. All batches walk through both models side by side and pause at every layer
(see `kronbert.walk`): each forward pass is paid once.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import check_sides, mask_of, moved, tokens_of
from .embedding import KroneckerEmbedding
from .errors import PlanError
from .fit_report import FitReport, LayerFit
from .head import KroneckerLMHead
from .linear import KroneckerLinear, dense_weight
from .memory import release_freed
from .moments import Inputs, Moments, TokenRows, input_moments, pair_moments, token_rows
from .planning import Plan
from .walk import Stop, Walk, watched
from .weighted_fit import Objective, Pair, nearest_outputs, nearest_rows

RIDGE = 3e-2
"""Pull to the teacher's own weight, as a share of the mean variance of a layer's inputs.

Flat: the last hidden state's relative error on held-out text (MiniLM-L6, SVD of rank 28, table of
rank 48, 8,504 tokens) is 1.00 / 0.98 / 0.98 / 0.97 for 1e-3 / 1e-2 / 3e-2 / 1e-1, that of the third
layer 0.80 / 0.80 / 0.79 / 0.81."""

SMOOTHING = 0.1
"""Added to how often each row of a table occurs in the calibration.

Relative error of the embeddings' output on held-out text, same model and tokens: 0.76 / 0.77 /
0.79 / 0.84 for 0.05 / 0.1 / 0.5 / 5. Words that never occurred keep a vote."""


def fit_to_data(
    model: nn.Module, new: Mapping[str, nn.Module], plan: Plan, batches: Sequence[Any]
) -> FitReport:
    """Fit ``new`` (full name -> the module that will replace it), in place, to ``model``'s outputs
    on ``batches``. The model keeps its values, but for biases that ``new`` shares with it, which
    are written last: an error leaves everything as it was, apart from ``new``'s own matrices.

    A layer that the batches never reach, a table of positions, and one whose rows share rows of a
    (b_out > 1), keep the fit to the weight; the report says so. Positions lie on one smooth curve,
    of which short texts would leave the far end out."""
    names = [
        layer.size.name
        for layer in plan.converted
        if not isinstance(new[layer.size.name], KroneckerLMHead)
    ]
    biases = {name: new[name].bias for name in names if isinstance(new[name], KroneckerLinear)}
    kept = {name: bias for name, bias in biases.items() if isinstance(bias, nn.Parameter)}
    try:
        for name, bias in kept.items():
            new[name].bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        places = {layer.size.name for layer in plan.converted if layer.size.kind == "position"}
        report = _Fit(model, new, names, batches, places).run()
        fitted = {name: new[name].bias for name in kept}
    finally:
        for name, bias in kept.items():
            new[name].bias = bias
    with torch.no_grad():
        for name, bias in kept.items():
            value = fitted[name]
            assert isinstance(value, Tensor)
            bias.copy_(value)
    return report


class _Fit:
    """One walk of all batches through the teacher and the student."""

    def __init__(
        self,
        teacher: nn.Module,
        new: Mapping[str, nn.Module],
        names: Sequence[str],
        batches: Sequence[Any],
        places: Set[str],
    ) -> None:
        check_sides(teacher, batches)
        self._places = places
        modules = dict(teacher.named_modules())
        self._teacher = teacher
        self._student = _beside(teacher, {modules[name]: module for name, module in new.items()})
        self._dense = {name: modules[name] for name in names}
        self._new = {name: new[name] for name in names}
        device = next(iter(teacher.parameters())).device
        self._batches = [moved(batch, device) for batch in batches]
        self._masks = [mask_of(batch, i) for i, batch in enumerate(self._batches)]
        self._shared: tuple[list[weakref.ref[Tensor]], Inputs] | None = None

    def run(self) -> FitReport:
        with ExitStack() as stack:
            stack.enter_context(_evaluating(self._teacher))
            stack.enter_context(_evaluating(self._student))
            stack.enter_context(watched(self._dense, outputs=True))
            stack.enter_context(watched(self._new, outputs=False))
            order = self._order()
            fits = self._walk(order, stack)
        for name in self._new:
            if name not in fits:
                fits[name] = LayerFit(kept="the calibration never reaches it")
        tokens = sum(tokens_of(batch, i) for i, batch in enumerate(self._batches))
        return FitReport(layers=fits, tokens=tokens)

    def _order(self) -> list[str]:
        """The layers in the order in which the first batch meets them; a shared one, often."""
        walk = Walk(self._teacher, self._batches[0])
        order = []
        try:
            while (stop := walk.advance()) is not None:
                order.append(stop.name)
        finally:
            walk.close()
        return order

    def _walk(self, order: Sequence[str], stack: ExitStack) -> dict[str, LayerFit]:
        walks = []
        for batch in self._batches:
            pair = Walk(self._teacher, batch), Walk(self._student, batch)
            for walk in pair:
                stack.callback(walk.close)
            walks.append(pair)
        left = Counter(order)
        found: dict[str, Moments] = {}
        counts: dict[str, Tensor] = {}
        fits: dict[str, LayerFit] = {}
        for name in order:
            # Nothing here holds what the walks have given once they go on.
            met = self._meet(name, walks)
            left[name] -= 1
            module = self._new[name]
            if isinstance(module, KroneckerEmbedding):
                assert isinstance(met, Tensor)
                counts[name] = counts.get(name, 0) + met
                if not left[name]:
                    fits[name] = self._fit_table(name, module, counts.pop(name))
                continue
            assert isinstance(module, KroneckerLinear)
            assert isinstance(met, Moments)
            found[name] = found[name] + met if name in found else met
            if not left[name]:
                fits[name] = self._fit_layer(name, module, found.pop(name))
            release_freed()
        return fits

    def _meet(self, name: str, walks: Sequence[tuple[Walk, Walk]]) -> Tensor | Moments:
        """Let all walks reach the layer: how often its rows occur, or the moments of what it reads
        and should give."""
        wanted, given = [], []
        for i, (teacher, student) in enumerate(walks):
            wanted.append(self._reach(teacher, name, i))
            given.append(self._reach(student, name, i))
        module = self._new[name]
        if isinstance(module, KroneckerEmbedding):
            return self._count(module, given)
        return self._moments(name, given, wanted)

    def _reach(self, walk: Walk, name: str, batch: int) -> Tensor:
        stop: Stop | None = walk.advance()
        if stop is None or stop.name != name:
            met = "ends" if stop is None else f"meets {stop.name!r}"
            raise PlanError(
                f"convert(calibration=...): batch {batch} {met} where the first one meets "
                f"{name!r}. Give batches that take one way through the model."
            )
        return stop.value

    def _moments(self, name: str, given: Sequence[Tensor], wanted: Sequence[Tensor]) -> Moments:
        x, y = TokenRows(given, self._masks), TokenRows(wanted, self._masks)
        if any(one.shape[0] != other.shape[0] for one, other in zip(x, y, strict=True)):
            raise PlanError(
                f"{name!r}: teacher and student send it different rows, there is nothing to "
                "compare. Use init='weights', or keep the layer dense (keep=[its name])."
            )
        shared = self._shared
        if shared is None or any(z() is not one for one, z in zip(given, shared[0], strict=True)):
            # Query, key and value read one tensor.
            shared = self._shared = [weakref.ref(one) for one in given], input_moments(x)
        moments = pair_moments(shared[1], x, y)
        if not moments.finite():
            raise PlanError(
                f"{name!r}: its inputs or outputs on the calibration hold NaN or infinity. Check "
                "the batches and the teacher, or run it in float32."
            )
        return moments

    def _fit_layer(self, name: str, module: KroneckerLinear, moments: Moments) -> LayerFit:
        dense = self._dense[name].weight
        assert isinstance(dense, Tensor)
        weight = (dense.T if module.conv1d else dense).detach().double().cpu()
        a, b = ([one.detach().double().cpu() for one in module.matrices(x)] for x in "ab")
        before = _output_error(module, moments)
        if module.bias is not None:
            objective = Objective(moments.inputs.gram, moments.cross)
        else:
            objective = Objective(*moments.about_zero())
        objective = objective.ridged(weight, RIDGE)
        pairs = nearest_outputs(objective, module.groups, list(zip(a, b, strict=True)))
        _write(module, pairs)
        if module.bias is not None:
            fitted = dense_weight(module.matrices("a"), module.matrices("b")).cpu()
            with torch.no_grad():
                module.bias.copy_(moments.mean - fitted @ moments.inputs.mean)
        return LayerFit(weights_error=before, data_error=_output_error(module, moments))

    def _count(self, module: KroneckerEmbedding, ids: Sequence[Tensor]) -> Tensor:
        """How often each row occurs where the mask lets it count."""
        total = torch.zeros(module.num_embeddings, dtype=torch.float64, device="cpu")
        for one, mask in zip(ids, self._masks, strict=True):
            if mask is not None and one.shape[-1:] == mask.shape[-1:]:
                one = one.expand(mask.shape)  # positions come as one row for all sentences
            rows = token_rows(one[..., None], mask)
            total += torch.bincount(rows.flatten().cpu(), minlength=total.shape[0])
        return total

    def _fit_table(self, name: str, module: KroneckerEmbedding, count: Tensor) -> LayerFit:
        dense = self._dense[name].weight
        assert isinstance(dense, Tensor)
        before = _table_error(module, dense, count)
        kept = None
        if name in self._places:
            kept = "positions are fitted to the weight alone: short texts have no far ones"
        elif any(shape.b_out != 1 for shape in module.groups):
            kept = "rows that share rows of a (b_out > 1) are fitted to the weight alone"
        if kept:
            return LayerFit(weights_error=before, data_error=before, kept=kept)
        table = dense.detach().cpu()
        pairs = nearest_rows(table, count + SMOOTHING, module.groups)
        _write(module, [(a.transpose(0, 1), b) for a, b in pairs])
        return LayerFit(weights_error=before, data_error=_table_error(module, dense, count))


def _write(module: KroneckerLinear | KroneckerEmbedding, pairs: Sequence[Pair]) -> None:
    with torch.no_grad():
        for letter, values in zip("ab", zip(*pairs, strict=True), strict=True):
            for parameter, value in zip(module.matrices(letter), values, strict=True):
                parameter.copy_(value)


def _output_error(module: KroneckerLinear, moments: Moments) -> float:
    weight = dense_weight(module.matrices("a"), module.matrices("b")).cpu()
    bias = None if module.bias is None else module.bias.detach().double().cpu()
    return moments.output_error(weight, bias)


@torch.no_grad()
def _table_error(module: KroneckerEmbedding, dense: Tensor, count: Tensor) -> float:
    """As `Moments.output_error`, of looking up rows as often as they occur."""
    ids = count.nonzero()[:, 0]
    share = (count[ids] / count.sum())[:, None]
    wanted = dense[ids.to(dense.device)].double().cpu()
    missed = wanted - module(ids.to(dense.device)).double().cpu()
    spread = wanted - (share * wanted).sum(0)
    variance = (share * spread.square()).sum().item()
    return float(((share * missed.square()).sum().item() / (variance or 1.0)) ** 0.5)


def _beside(teacher: nn.Module, instead: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The teacher's structure with other modules in places; every other tensor is the teacher's."""
    for name, module in teacher.named_modules():
        if "forward" in vars(module):
            raise PlanError(
                f"{name!r}: its forward is replaced, and a student's would call the teacher's. "
                "Remove the replacement (accelerate's hooks, say), or use init='weights'."
            )
    memo: dict[int, Any] = {id(t): t for t in [*teacher.parameters(), *teacher.buffers()]}
    memo.update({id(old): module for old, module in instead.items()})
    return instead[teacher] if teacher in instead else copy.deepcopy(teacher, memo)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout; every module's mode comes back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
