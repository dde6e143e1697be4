"""What whole-model benchmarks run: BERT-base with random weights, its students, one training step.

Random weights cost what trained ones do, and need no download.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

import kronbert

from .latency import random_inputs

SEED = 0

MINILM: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
"""Sizes of all-MiniLM-L6-v2: for a `BertConfig`."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def bert_base(*, layers: int = 12, labels: int | None = None) -> nn.Module:
    """BERT-base, random and in evaluation mode: the encoder without a pooler, or with labels a
    classifier. Attention is Hugging Face's default, SDPA."""
    torch.manual_seed(SEED)
    config = BertConfig(num_hidden_layers=layers)
    if labels is None:
        return BertModel(config, add_pooling_layer=False).eval()
    config.num_labels = labels
    return BertForSequenceClassification(config).eval()


def student(dense: nn.Module, preset: str) -> nn.Module:
    """The preset's student of ``dense``, fused."""
    return kronbert.fuse(kronbert.convert(dense, preset=preset).eval())


def cast(model: nn.Module, dtype: torch.dtype, device: str | torch.device = "cpu") -> nn.Module:
    """A copy in this dtype, on this device."""
    return copy.deepcopy(model).to(device=device, dtype=dtype)


def inputs(
    model: nn.Module, batch: int, sequence: int, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Random ids (batch, sequence) and a mask of ones."""
    made = random_inputs({"model": model}, sequence, batch, SEED)
    return {name: value.to(device) for name, value in made.items()}


def training_step(model: nn.Module, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """One step of fine-tuning ``model``, in training mode: forward, backward, AdamW."""
    model.train()
    first = next(model.parameters())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    labels = torch.zeros(given["input_ids"].shape[0], dtype=torch.long, device=first.device)

    def step() -> Tensor:
        loss = model(**given, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    return step


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[dict[str, int]]:
    """Counts the bytes that autograd keeps between forward and backward, as ``kept["bytes"]``.

    Each storage once; the model's own parameters and buffers, kept anyway, are left out.
    What an op keeps without autograd's `save_for_backward` would be missed."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    own |= {tensor.untyped_storage().data_ptr() for tensor in model.buffers()}
    kept = {"bytes": 0}
    # The storages are held: a freed one's address would be given out again and not be counted.
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage
            kept["bytes"] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
    seen.clear()
