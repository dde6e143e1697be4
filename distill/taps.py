"""Where a model's intermediate outputs are read: module names, and forward hooks on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.utils import ModelOutput

from kronbert.errors import DistillError

TAPS = ("embedding", "scores", "ffn", "sentence", "logits")


@dataclass(frozen=True, kw_only=True)
class TapMap:
    """Module names under ``model.base_model``; ``{}`` is the layer, counted from 0; of ``a|b`` the
    first that exists.

    embedding: its output is what the first layer reads, (batch, tokens, hidden).
    layer: its output, or the first of its outputs, is the hidden state of the layer.
    query, key: projections to (batch, tokens, heads * d).
    fused: instead of query and key, one projection to query, key and value side by side.
    rotary: the module that is called with ``position_embeddings=(cos, sin)`` for query and key.
    no_scores: why attention scores cannot be compared here, when query, key and fused are absent.
    """

    embedding: str
    layer: str
    query: str | None = None
    key: str | None = None
    fused: str | None = None
    rotary: str | None = None
    no_scores: str = "its TapMap names no query and key"


_BERT = TapMap(
    embedding="embeddings",
    layer="encoder.layer.{}",
    query="encoder.layer.{}.attention.self.query",
    key="encoder.layer.{}.attention.self.key",
)

# Keyed by `config.model_type`; add an entry to teach the library another architecture.
TAP_MAPS: dict[str, TapMap] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "mobilebert": _BERT,
    # The projection exists where the embedding is narrower than the layers.
    "electra": TapMap(
        embedding="embeddings_project|embeddings",
        layer=_BERT.layer,
        query=_BERT.query,
        key=_BERT.key,
    ),
    "distilbert": TapMap(
        embedding="embeddings",
        layer="transformer.layer.{}",
        query="transformer.layer.{}.attention.q_lin",
        key="transformer.layer.{}.attention.k_lin",
    ),
    # The content-to-content part of the scores; the model divides it by sqrt(3 d), not sqrt(d),
    # when it adds both position parts: a constant weight.
    "deberta-v2": TapMap(
        embedding="embeddings",
        layer="encoder.layer.{}",
        query="encoder.layer.{}.attention.self.query_proj",
        key="encoder.layer.{}.attention.self.key_proj",
    ),
    "vit": TapMap(
        embedding="embeddings",
        layer="layers.{}|encoder.layer.{}",
        query="layers.{}.attention.q_proj|encoder.layer.{}.attention.attention.query",
        key="layers.{}.attention.k_proj|encoder.layer.{}.attention.attention.key",
    ),
    "modernbert": TapMap(
        embedding="embeddings",
        layer="layers.{}",
        fused="layers.{}.attn.Wqkv",
        rotary="layers.{}.attn",
    ),
    "gpt2": TapMap(
        embedding="drop",
        layer="h.{}",
        no_scores="its attention is causal, so half of the (query, key) pairs are never used",
    ),
}


@dataclass(kw_only=True)
class Captured:
    """One forward pass as its taps saw it. Layers count from 1.

    embedding (batch, tokens, hidden); query, key: layer -> (batch, heads, tokens, d), before
    softmax, unscaled, rotary embedding applied; ffn: layer -> (batch, tokens, hidden); last: the
    base model's own output (batch, tokens, hidden), after its last norm; outputs: what the model
    returned.
    """

    embedding: Tensor | None = None
    last: Tensor | None = None
    query: dict[int, Tensor] = field(default_factory=dict)
    key: dict[int, Tensor] = field(default_factory=dict)
    ffn: dict[int, Tensor] = field(default_factory=dict)
    outputs: Any = None

    @property
    def logits(self) -> Tensor:
        """Logits, (batch, classes), (batch, tokens, classes), or (batch, 2, tokens) for question
        answering."""
        outputs = self.outputs
        for name in ("logits", "prediction_logits"):
            logits: Tensor | None = getattr(outputs, name, None)
            if logits is not None:
                return logits
        if getattr(outputs, "start_logits", None) is not None:
            return torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
        raise DistillError(
            f"{type(outputs).__name__} has no logits: the model has no head. Load it with a head "
            "(AutoModelFor...), or drop the logits term from the objective."
        )

    def logits_mask(self, mask: Tensor | None) -> Tensor | None:
        """The attention mask (batch, tokens) in a shape that broadcasts to `logits`; None where all
        logits count."""
        if mask is None or self.logits.dim() == 2:
            return None
        spans = getattr(self.outputs, "start_logits", None) is not None
        return mask[:, None, :] if spans else mask[:, :, None]


Finish = Callable[[Captured], Any]


class Taps:
    """The taps of one model: which modules are read, found and checked at construction.

    needs: any of `TAPS`. layers: the layers to read, from 1; None means all. tap_map: for an
    architecture that `TAP_MAPS` does not know. Hooks exist only inside `capture`, on the inner
    modules, so any wrapper (DistributedDataParallel, accelerate) may be the one that is called.
    """

    def __init__(
        self,
        model: nn.Module,
        needs: Collection[str],
        layers: Sequence[int] | None = None,
        tap_map: TapMap | None = None,
    ) -> None:
        unknown = sorted(set(needs) - set(TAPS))
        if unknown:
            raise DistillError(f"Taps(needs={unknown}): expected any of {', '.join(TAPS)}.")
        self.model = model
        self.needs = frozenset(needs)
        config: Any = model.config
        inner = self.needs - {"logits", "sentence"}
        self.map = (tap_map or known_map(config.model_type)) if inner else None
        self.heads = getattr(config, "num_attention_heads", 0)
        depth = getattr(config, "num_hidden_layers", 0)
        self.layers = tuple(layers if layers is not None else range(1, depth + 1))
        self._modules: dict[tuple[str, int], nn.Module] = {}
        self._rotary: dict[int, nn.Module] = {}
        if "sentence" in self.needs:
            self._modules["sentence", 0] = getattr(model, "base_model", model)
        if self.map is not None:
            self._find(self.map)

    def _find(self, tap_map: TapMap) -> None:
        if "embedding" in self.needs:
            self._modules["embedding", 0] = self._module(tap_map.embedding)
        for layer in self.layers:
            if "ffn" in self.needs:
                self._modules["ffn", layer] = self._module(tap_map.layer, layer)
            if "scores" not in self.needs:
                continue
            if tap_map.fused:
                self._modules["fused", layer] = self._module(tap_map.fused, layer)
            elif tap_map.query and tap_map.key:
                self._modules["query", layer] = self._module(tap_map.query, layer)
                self._modules["key", layer] = self._module(tap_map.key, layer)
            else:
                raise DistillError(
                    f"{type(self.model).__name__}: attention scores cannot be compared: "
                    f"{tap_map.no_scores}. Use the terms embedding, ffn, logits and labels."
                )
            if tap_map.rotary:
                self._rotary[layer] = self._module(tap_map.rotary, layer)
        read = [(tap, module) for (tap, layer), module in self._modules.items() if layer]
        if len(set(read)) < len(read):
            raise DistillError(
                f"{type(self.model).__name__}: its layers share one module ({tap_map.layer}), so "
                "they cannot be told apart. Use the terms embedding, sentence, logits and labels."
            )

    def _module(self, names: str, layer: int = 1) -> nn.Module:
        base = getattr(self.model, "base_model", self.model)
        tried = [name.replace("{}", str(layer - 1)) for name in names.split("|")]
        for name in tried:
            try:
                return base.get_submodule(name)
            except AttributeError:
                continue
        raise DistillError(
            f"{type(base).__name__} has no module {' or '.join(map(repr, tried))}, named in its "
            "TapMap. Another layout needs another entry in kronbert.distill.taps.TAP_MAPS."
        )

    @contextmanager
    def capture(self, finish: Finish | None = None) -> Iterator[Captured]:
        """Fill a `Captured` during the forward pass inside the ``with``; the last pass wins.

        finish: called at the end of the model's own forward with the `Captured`; what it returns
        becomes the model's output. A loss computed there is an output of the forward pass, which is
        how DistributedDataParallel learns which parameters take part.
        """
        captured = Captured()
        raw: dict[tuple[str, int], Tensor] = {}
        rotary: dict[int, tuple[Tensor, Tensor]] = {}
        wants_grad = False

        def read(key: tuple[str, int]) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                # The first call: DeBERTa calls query_proj again for its relative positions.
                if key not in raw:
                    raw[key] = output if isinstance(output, Tensor) else output[0]
                    if wants_grad:
                        require_grad(module, raw[key], key)

            return hook

        def read_rotary(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                rotary[layer] = kwargs["position_embeddings"]

            return hook

        def begin(module: nn.Module, args: Any) -> None:
            nonlocal wants_grad
            wants_grad = torch.is_grad_enabled()
            raw.clear()

        def end(module: nn.Module, args: Any, outputs: Any) -> Any:
            self._fill(captured, raw, rotary)
            captured.outputs = ModelOutput(outputs) if type(outputs) is dict else outputs
            return None if finish is None else finish(captured)

        handles = [self.model.register_forward_pre_hook(begin)]
        handles += [m.register_forward_hook(read(key)) for key, m in self._modules.items()]
        handles += [
            m.register_forward_pre_hook(read_rotary(layer), with_kwargs=True)
            for layer, m in self._rotary.items()
        ]
        handles.append(self.model.register_forward_hook(end))
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def _fill(
        self,
        captured: Captured,
        raw: dict[tuple[str, int], Tensor],
        rotary: dict[int, tuple[Tensor, Tensor]],
    ) -> None:
        # Here and not in the hooks: an operation inside a checkpointed layer would be missing from
        # its recomputation.
        missing = [
            f"{tap} of layer {layer}" if layer else tap
            for tap, layer in self._modules.keys() - raw.keys()
        ]
        if missing:
            raise DistillError(
                f"{type(self.model).__name__}: the modules that give {', '.join(sorted(missing))} "
                "were not called in the forward pass. Compile the model after training, not before."
            )
        captured.embedding, captured.last = raw.get(("embedding", 0)), raw.get(("sentence", 0))
        for layer in self.layers:
            if "ffn" in self.needs:
                captured.ffn[layer] = raw["ffn", layer]
            if "scores" not in self.needs:
                continue
            if ("fused", layer) in raw:
                query, key, _ = raw["fused", layer].chunk(3, dim=-1)
            else:
                query, key = raw["query", layer], raw["key", layer]
            query, key = self._split(query), self._split(key)
            if layer in rotary:
                query, key = rotate(query, *rotary[layer]), rotate(key, *rotary[layer])
            captured.query[layer], captured.key[layer] = query, key

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "batch tokens (heads d) -> batch heads tokens d", heads=self.heads)


def known_map(model_type: str) -> TapMap:
    """The `TapMap` of an architecture; `DistillError` that lists the known ones."""
    if model_type not in TAP_MAPS:
        raise DistillError(
            f"model_type {model_type!r} has no tap map. Known: {', '.join(sorted(TAP_MAPS))}. "
            f"Describe it with kronbert.distill.taps.TAP_MAPS[{model_type!r}] = TapMap("
            "embedding=..., layer=..., query=..., key=...), module names under model.base_model "
            "with {} for the layer from 0, or use the terms logits and labels only."
        )
    return TAP_MAPS[model_type]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with rotary positions: x (batch, heads, tokens, d), cos, sin (batch or 1, tokens, d)."""
    left, right = x.float().chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return (x.float() * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def require_grad(module: nn.Module, output: Tensor, key: tuple[str, int]) -> None:
    """Refuse an output that has no gradient although its module is trained."""
    if not output.requires_grad and any(p.requires_grad for p in module.parameters()):
        raise DistillError(
            f"the {key[0]} of layer {key[1]} has no gradient: gradient checkpointing with "
            "use_reentrant=True hides it. Pass gradient_checkpointing_kwargs="
            "{'use_reentrant': False}."
        )


def inputs_of(model: nn.Module) -> frozenset[str]:
    """The names of what ``model`` takes, also behind `torch.compile` and PEFT's adapters, whose own
    ``forward`` leaves some unnamed. Raises `DistillError` where none is named at all."""
    inner: Any = getattr(model, "_orig_mod", model)
    if callable(getattr(inner, "get_base_model", None)):
        inner = inner.get_base_model()
    names = frozenset(inspect.signature(inner.forward).parameters) - {"args", "kwargs"}
    if not names:
        raise DistillError(
            f"{type(inner).__name__}.forward names no inputs (*args, **kwargs), so nothing says "
            "which columns of a batch it takes. Name them, or pass the model inside."
        )
    return names
