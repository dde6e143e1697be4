"""ONNX Runtime with the dense encoder, in fp32 and dynamically quantised to int8."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Hidden(nn.Module):
    """The encoder with tensors in and one tensor out, as the exporter wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def session(model: nn.Module, given: dict[str, Tensor], folder: Path, kind: str) -> Any:
    """An inference session for inputs of this size; the files in ``folder`` are made once.

    kind: "fp32", or "int8" (`quantize_dynamic`: int8 weights, activations at run time). As many
    threads as torch has, none of which spins: spinning threads slow the process beside them."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    batch, sequence = given["input_ids"].shape
    plain = folder / f"dense-{batch}x{sequence}.onnx"
    if not plain.is_file():
        export(model, given, plain)
    chosen = plain
    if kind == "int8":
        chosen = plain.with_name(f"{plain.stem}-int8.onnx")
        if not chosen.is_file():
            quantize_dynamic(plain, chosen, weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(chosen, options, providers=["CPUExecutionProvider"])


def run(session: Any, given: dict[str, Tensor]) -> Any:
    """The last hidden state (batch, sequence, width), a numpy array."""
    feed = {name: value.numpy() for name, value in given.items()}
    return session.run(None, feed)[0]


def export(model: nn.Module, given: dict[str, Tensor], file: Path) -> None:
    """The model for inputs of exactly this size: fixed shapes are the exporter's best case."""
    wrapped = Hidden(model).eval()
    torch.onnx.export(
        wrapped,
        (given["input_ids"], given["attention_mask"]),
        file,
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime")}
