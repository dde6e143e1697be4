"""Fused ModernBERT: windows and padding, dropout, biases, checkpointing, compile, export."""

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import kronbert
from kronbert import blocks, cuda
from kronbert.fusion import fuse, fused, unfuse
from tests.fusion_models import assert_same

CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "max_position_embeddings": 40,
    "local_attention": 6,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
RULES = {
    "re:.*tok_embeddings": {"factor": 2},
    r"re:.*\.(Wqkv|Wi)": "4:8x24*9x1",
    r"re:.*attn\.Wo": "4:2x12*12x2",
    r"re:.*mlp\.Wo": "6:1x18*24x2",
}
TOKENS = torch.tensor([[17], [9]])
MASK = (torch.arange(17) < TOKENS).long()
IDS = torch.randint(3, 96, (2, 17), generator=torch.Generator().manual_seed(3)) * MASK
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
CALLS = {True: Counter(add_norm=4, gated_ffn=4), False: Counter(add_norm=4)}
converted_or_dense = pytest.mark.parametrize("converted", [True, False], ids=["converted", "dense"])


def a_model(*, converted: bool = True, dropout: float = 0.0, **changes: Any) -> Any:
    """A model in training mode, whose weights are not the initialisation's near-zeros."""
    config = transformers.ModernBertConfig(
        **CONFIG | {"mlp_dropout": dropout, "attention_dropout": dropout} | changes
    )
    model = transformers.AutoModelForTokenClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return (kronbert.convert(model, rules=RULES) if converted else model).train()


def twins(**changes: Any) -> tuple[Any, Any]:
    """A fused model and its ordinary copy."""
    model = a_model(**changes)
    return fuse(copy.deepcopy(model)), model


def scores(model: nn.Module) -> Tensor:
    """Of real tokens."""
    return model(**INPUTS).logits[MASK.bool()]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    scores(model).square().mean().backward()
    return {
        n.removeprefix("_orig_mod."): p.grad.clone()
        for n, p in model.named_parameters()
        if p.grad is not None
    }


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often `add_norm` and `gated_ffn` ran."""
    seen: Counter[str] = Counter()
    for name in ("add_norm", "gated_ffn"):
        ordinary = getattr(blocks, name)

        def counted(*args: Any, _name: str = name, _call: Any = ordinary, **kwargs: Any) -> Any:
            seen[_name] += 1
            return _call(*args, **kwargs)

        monkeypatch.setattr(blocks, name, counted)
    return seen


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@converted_or_dense
def test_windows_and_padding(converted, attention, calls):
    ours, plain = twins(converted=converted, attn_implementation=attention)
    found, expected = scores(ours.eval()), scores(plain.eval())
    assert_same(found, expected)
    assert calls == CALLS[converted]
    for layer in plain.model.layers:
        if layer.attn.sliding_window is not None:
            layer.attn.sliding_window = 40
    plain.config.local_attention = 40
    assert (scores(plain) - expected).abs().max() > 1e-3, "the window cuts nothing off"
    alone = {name: value[1:, :9] for name, value in INPUTS.items()}
    assert_same(ours(**alone).logits[0], found[17:])


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@converted_or_dense
def test_training_with_and_without_biases(converted, biases, calls):
    ours, plain = twins(
        converted=converted, norm_bias=biases, mlp_bias=biases, attention_bias=biases
    )
    found, wanted = gradients(ours), gradients(plain)
    assert ("model.layers.1.mlp_norm.bias" in found) == biases
    assert set(found) == set(wanted)
    assert_same(found, wanted)
    assert calls == CALLS[converted]


def test_report_and_unfuse():
    model = a_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    report = fused(fuse(model, gelu="fast"))
    assert report is not None
    assert str(report) == "9 fused blocks (4 add_norm, 1 embed_norm, 4 gated_ffn), gelu=fast"
    assert report.blocks["model.layers.2"] == "add_norm"
    assert report.blocks["model.layers.2.mlp"] == "gated_ffn"
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert fused(unfuse(model)) is None
    assert [type(module) for module in model.modules()] == kinds
    dense = fused(fuse(a_model(converted=False)))
    assert dense is not None
    assert str(dense) == "5 fused blocks (4 add_norm, 1 embed_norm), gelu=exact"


def test_gelu_is_passed_on(monkeypatch):
    seen = []
    ordinary = blocks.gated_ffn

    def spy(*args: Any, gelu: str, **kwargs: Any) -> Tensor:
        seen.append(gelu)
        return ordinary(*args, gelu=gelu, **kwargs)

    monkeypatch.setattr(blocks, "gated_ffn", spy)
    model = fuse(a_model(), gelu="fast")
    scores(model)
    scores(fuse(model))
    assert seen == ["fast"] * 4 + ["exact"] * 4


@pytest.mark.parametrize("activation", ["relu", "gelu_new", F.gelu])
def test_other_activations(activation, calls):
    named = isinstance(activation, str)
    ours, plain = twins(**({"hidden_activation": activation} if named else {}))
    if not named:
        for model in (ours, plain):
            for layer in model.model.layers:
                del layer.mlp.act
                layer.mlp.act = activation
    assert_same(gradients(ours), gradients(plain))
    assert calls == Counter(add_norm=4)


def test_attention_gets_every_keyword(calls):
    """Packed sequences come with lengths for it."""
    model = fuse(a_model())
    seen: list[Any] = []
    attention = model.model.layers[1].attn
    attention.register_forward_pre_hook(lambda _, __, k: seen.append(k), with_kwargs=True)
    model(**INPUTS, max_length_q=7)
    assert seen[0]["max_length_q"] == 7
    assert {"attention_mask", "position_embeddings"} < set(seen[0])
    assert calls["add_norm"] == 4


def test_one_half_converted(calls):
    """A dense Wo beside a Kronecker Wi: the ordinary feed-forward half."""
    model = kronbert.convert(a_model(converted=False), rules={r"re:.*\.Wi": "4:8x24*9x1"})
    ours = fuse(copy.deepcopy(model))
    assert_same(gradients(ours), gradients(model))
    assert calls == Counter(add_norm=4)


def test_dropout(calls):
    """Seeds decide, evaluation drops nothing, one module's own mode counts."""
    ours, plain = twins(dropout=0.3)
    draws = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        draws.append(scores(ours))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert calls == Counter(add_norm=12, gated_ffn=12)
    for model in (ours, plain):
        torch.manual_seed(5)
        model.zero_grad()
        scores(model).square().mean().backward()
    # On a CPU both draw in the same order, from the same sizes.
    assert_same(
        {n: p.grad for n, p in ours.named_parameters()},
        {n: p.grad for n, p in plain.named_parameters()},
    )
    with torch.no_grad():
        expected = scores(ours.eval())
        assert_same(expected, scores(plain.eval()))
        ours.model.layers[2].mlp.drop.train()
        assert not torch.equal(scores(ours), expected)


class _Saving(torch.autograd.Function):
    """Saves one tensor more than nothing: a checkpoint compares what two passes save."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("tapped", ["", "mlp.Wi", "mlp_norm"])
def test_gradient_checkpointing(tapped, reentrant, calls, monkeypatch):
    """A repeated call goes the way of the first, though the tap's hooks are gone by then."""
    ours, plain = twins()
    expected = gradients(plain)
    for name in ("add_norm", "gated_ffn"):
        ordinary = getattr(blocks, name)
        monkeypatch.setattr(
            blocks, name, lambda x, *a, _f=ordinary, **k: _f(_Saving.apply(x), *a, **k)
        )
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        ours.enable_input_require_grads()
    handles = [
        module.register_forward_hook(lambda *_: None)
        for where, module in ours.named_modules()
        if tapped and where.endswith(tapped)
    ]
    assert bool(handles) == bool(tapped)
    loss = scores(ours).square().mean()
    first = Counter(calls)
    assert first["gated_ffn"] == (0 if tapped == "mlp.Wi" else 4)
    assert first["add_norm"] == (0 if tapped == "mlp_norm" else 4)
    calls.clear()
    for handle in handles:
        handle.remove()
    loss.backward()
    assert +calls == +first, "every layer is made anew once, as it was made"
    assert_same({n: p.grad for n, p in ours.named_parameters()}, expected)


@converted_or_dense
def test_compiled_whole(converted):
    ours, plain = twins(converted=converted)
    expected = gradients(plain)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled), expected)


def test_exported():
    ours, plain = twins()
    for model in (ours, plain):
        model.eval()
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    shapes = {"input_ids": rows, "attention_mask": rows}
    program = torch.export.export(ours, (), INPUTS, dynamic_shapes=shapes)
    assert not [node for node in program.graph.nodes if "kronbert" in str(node.target)]
    other = {name: value.repeat(2, 1) for name, value in INPUTS.items()}
    real = other["attention_mask"].bool()
    assert_same(program.module()(**other).logits[real], plain(**other).logits[real])


def test_copied_and_pickled():
    ours, plain = twins()
    expected = scores(plain.eval())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert fused(other) == fused(ours)
        assert_same(scores(other.eval()), expected)


def test_autocast_keeps_the_stream():
    """bfloat16 products, and the residual sums in float32 as the ordinary model has them."""
    ours, plain = twins()
    kinds = []
    ours.model.layers[1].register_forward_hook(lambda _, __, y: kinds.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = scores(ours), scores(plain)
    assert kinds == [torch.float32]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@converted_or_dense
def test_on_kernels(converted, monkeypatch):
    """The way a CUDA device takes, in Triton's interpreter where there is none."""
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    few = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
    ours, plain = twins(converted=converted, **few)
    expected, wanted = scores(plain.eval()), gradients(plain)
    monkeypatch.setattr(cuda, "takes", lambda x: x.dtype in cuda.DTYPES)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours.to(device)
    monkeypatch.setitem(globals(), "INPUTS", {k: v.to(device) for k, v in INPUTS.items()})
    monkeypatch.setitem(globals(), "MASK", MASK.to(device))
    with torch.no_grad():
        assert_same(scores(ours.eval()).cpu(), expected)
    torch.testing.assert_close(
        {n: g.cpu() for n, g in gradients(ours).items()}, wanted, rtol=1e-3, atol=1e-5
    )
