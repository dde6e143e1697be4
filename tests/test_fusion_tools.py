"""fuse and unfuse, and a fused model under taps, checkpointing, copies, compile and export."""

import copy
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import kronbert
from kronbert import KroneckerLinear, blocks
from kronbert.distill.taps import Taps
from kronbert.errors import NoMatchError, PlanError
from kronbert.fusion import FusionReport, fuse, fused, unfuse
from tests.fusion_models import IDS, INPUTS, MASK, assert_same, gradients, scores

SMALL: dict[str, Any] = {"vocab_size": 96, "max_position_embeddings": 40}
CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig(
        **SMALL,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    ),
    "distilbert": transformers.DistilBertConfig(
        **SMALL, dim=24, n_layers=2, n_heads=4, hidden_dim=48
    ),
}
RULES = {
    "re:.*word_embeddings": {"factor": 2},
    r"re:.*(query|key|value|attention\.output\.dense|[qkv]_lin|out_lin)": "4:2x12*12x2",
    r"re:.*(intermediate\.dense|lin1)": "8:2x24*24x1",
    r"re:.*(\d\.output\.dense|lin2)": "8:1x24*24x2",
}
both = pytest.mark.parametrize("name", CONFIGS)


def a_model(name: str = "bert") -> Any:
    """A converted model without dropout, whose weights are not the initialisation's near-zeros."""
    model = transformers.AutoModelForTokenClassification.from_config(copy.deepcopy(CONFIGS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return kronbert.convert(model, rules=RULES).train()


def twins(name: str = "bert") -> tuple[Any, Any]:
    """A fused model and its ordinary copy."""
    model = a_model(name)
    return fuse(copy.deepcopy(model)), model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each fused call ran; what one makes of another is not counted."""
    seen: Counter[str] = Counter()
    inside: list[str] = []

    def spy(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            seen[name] += not inside
            inside.append(name)
            try:
                return call(*args, **kwargs)
            finally:
                inside.pop()

        return counted

    for name in ("qkv", "linear_norm", "residual_norm", "ffn_norm", "embed_norm"):
        monkeypatch.setattr(blocks, name, spy(name, getattr(blocks, name)))
    return seen


def test_report_and_gelu(monkeypatch):
    model = a_model()
    assert fused(model) is None
    assert unfuse(model) is model
    assert fuse(model, gelu="fast") is model
    report = fused(model)
    assert isinstance(report, FusionReport)
    assert report.gelu == "fast"
    assert report.blocks["bert.encoder.layer.1"] == "ffn_norm"
    assert report.blocks["bert.encoder.layer.0.attention.self"] == "qkv"
    assert str(report) == (
        "9 fused blocks (1 embed_norm, 2 ffn_norm, 4 linear_norm, 2 qkv), gelu=fast"
    )
    gelus = []
    ordinary = blocks.ffn_norm

    def spy(*args, gelu, **kwargs):
        gelus.append(gelu)
        return ordinary(*args, gelu=gelu, **kwargs)

    monkeypatch.setattr(blocks, "ffn_norm", spy)
    scores(model)
    fuse(model)
    assert fused(model) == FusionReport(gelu="exact", blocks=report.blocks)
    scores(model)
    assert gelus == ["fast", "fast", "exact", "exact"]
    scores(fuse(a_model("distilbert"), gelu="fast"))
    assert gelus[4:] == ["fast", "fast"]
    fuse(model.bert.encoder.layer[0], gelu="fast")
    assert fused(model).gelu is None
    assert fused(model.bert.encoder.layer[0]).gelu == "fast"


def test_refusals():
    model = a_model()
    with pytest.raises(PlanError, match=r"fuse\(gelu='tanh'\): expected 'exact' .* or 'fast'"):
        fuse(model, gelu="tanh")
    assert fused(model) is None
    with pytest.raises(NoMatchError, match="fuse: Linear has no block to fuse: expected layers"):
        fuse(nn.Linear(2, 3))
    with pytest.raises(NoMatchError, match="GPT2Model has no block"):
        fuse(transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2)))
    layer = fuse(model).bert.encoder.layer[0]
    layer.__class__ = type("FSDPBertLayer", (type(layer),), {})  # what fully_shard does
    with pytest.raises(PlanError, match=r"unfuse: 'bert.encoder.layer.0' is a FSDPBertLayer"):
        unfuse(model)
    assert len(fused(model).blocks) == 9


def test_a_block_with_a_forward_of_its_own_is_left():
    """The forward put on the object would go on calling the ordinary one."""
    model = a_model()
    output = model.bert.encoder.layer[0].attention.output
    output.forward = output.forward
    assert "bert.encoder.layer.0.attention.output" not in fused(fuse(model)).blocks
    assert "bert.encoder.layer.1.attention.output" in fused(model).blocks


def test_classes_keep_their_names():
    """accelerate and FSDP take ``_no_split_modules`` and wrapping policies by class name."""
    ours, plain = twins()
    assert [type(m).__name__ for m in ours.modules()] == [type(m).__name__ for m in plain.modules()]
    assert "FusedBertLayer(" in repr(ours)


def test_global_hooks_see_every_module():
    """torch's FLOP counter and module tracker use them."""
    orders = []
    for model in twins():
        names = {module: name for name, module in model.named_modules()}
        order: list[str] = []

        def hook(module: nn.Module, args: Any, output: Any, order: Any = order, names: Any = names):
            order.append(names[module])

        handle = nn.modules.module.register_module_forward_hook(hook)
        scores(model)
        handle.remove()
        orders.append(order)
    assert orders[0] == orders[1]


@both
def test_taps_of_a_fused_student(name, calls):
    ours, plain = twins(name)
    found = []
    for model in (ours, plain):
        with Taps(model, {"embedding", "scores", "ffn", "logits"}).capture() as captured:
            model(**INPUTS)
        found.append(captured)
    for part in ("embedding", "query", "key", "ffn", "logits"):
        assert_same(getattr(found[0], part), getattr(found[1], part))
    assert calls["ffn_norm"] == 2
    assert not calls["qkv"]  # its maps were tapped one by one


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
@pytest.mark.parametrize("tapped", ["", "intermediate.dense|ffn.lin1", "query|q_lin"])
@both
def test_gradient_checkpointing(name, tapped, calls, monkeypatch):
    """A repeated call goes the way of the first, though the tap's hooks are gone by then."""
    ours, plain = twins(name)
    expected = gradients(plain)
    for call in ("ffn_norm", "qkv"):
        ordinary = getattr(blocks, call)
        monkeypatch.setattr(
            blocks, call, lambda x, *a, _f=ordinary, **k: _f(_Saving.apply(x), *a, **k)
        )
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        handles = [
            module.register_forward_hook(lambda *_: None)
            for where, module in ours.named_modules()
            if tapped and where.endswith(tuple(tapped.split("|")))
        ]
        assert bool(handles) == bool(tapped)
        ours.zero_grad()
        calls.clear()
        loss = scores(ours).square().mean()
        first = Counter(calls) - Counter({"embed_norm": 1})
        calls.clear()
        for handle in handles:
            handle.remove()
        loss.backward()
        assert +calls == first
        assert_same({n: p.grad for n, p in ours.named_parameters()}, expected)
        assert calls["ffn_norm"] == (0 if "dense" in tapped else 2)
        assert calls["qkv"] == (0 if "query" in tapped else 2)
    calls.clear()
    scores(ours)
    assert calls["ffn_norm"] == calls["qkv"] == 2


@both
def test_copied_pickled_and_saved(name, tmp_path):
    ours, plain = twins(name)
    expected = scores(plain.eval())
    ours.eval()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert fused(other) == fused(ours)
        assert_same(scores(other), expected)
        assert not {p.data_ptr() for p in other.parameters()} & {
            p.data_ptr() for p in ours.parameters()
        }
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert fused(loaded) is None
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    assert_same(scores(loaded.eval()), expected)


def test_pickle_read_by_another_process(tmp_path):
    model = fuse(a_model()).eval()
    torch.save((model, INPUTS, scores(model)), tmp_path / "model.pt")
    code = (
        "import sys, torch; sys.modules['kernels'] = None\n"
        f"model, inputs, logits = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(model(**inputs).logits, logits)\n"
        "assert type(model.bert.encoder.layer[0]).__qualname__ == 'FusedBertLayer'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@both
def test_merge_and_report(name):
    ours, plain = twins(name)
    dense = kronbert.merge(ours)
    assert not [m for m in dense.modules() if isinstance(m, KroneckerLinear)]
    torch.testing.assert_close(scores(dense.eval()), scores(plain.eval()), rtol=1e-3, atol=1e-4)
    found, expected = (kronbert.report(m, latency=False).to_json() for m in (ours, plain))
    assert found == expected


@both
def test_compiled_whole(name):
    ours, plain = twins(name)
    expected = gradients(plain)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found = gradients(compiled)
    assert_same({n.removeprefix("_orig_mod."): g for n, g in found.items()}, expected)


@both
def test_a_bare_encoder_compiled_whole(name):
    """Its own forward is the outermost: what transformers changes in it lies in the graph."""
    ours, plain = (getattr(model.eval(), model.base_model_prefix) for model in twins(name))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found, expected = (model(**INPUTS).last_hidden_state for model in (compiled, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_fused_after_compiling():
    model = a_model().eval()
    expected = scores(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for change in (fuse, unfuse):
        assert_same(scores(compiled), expected)
        change(model)
    assert_same(scores(compiled), expected)


@both
def test_exported(name):
    ours, plain = twins(name)
    for model in (ours, plain):
        model.eval()
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    shapes = {"input_ids": rows, "attention_mask": rows}
    program = torch.export.export(ours, (), INPUTS, dynamic_shapes=shapes)
    assert not [node for node in program.graph.nodes if "kronbert" in str(node.target)]
    other = {"input_ids": IDS.repeat(2, 1).flip(1), "attention_mask": MASK.repeat(2, 1)}
    assert_same(program.module()(**other).logits, scores(plain, **other))


def test_autocast_and_functional_call():
    ours, plain = twins()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = scores(ours), scores(plain)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    other = dict(a_model().named_parameters())
    assert_same(
        torch.func.functional_call(ours, other, (), INPUTS).logits,
        torch.func.functional_call(plain, other, (), INPUTS).logits,
    )


@pytest.mark.slow
def test_compiled_to_machine_code():
    if shutil.which("c++") is None:
        pytest.skip("inductor needs a C++ compiler: none is called c++")
    ours, plain = twins()
    expected = gradients(plain)
    torch._dynamo.reset()
    found = gradients(torch.compile(ours, fullgraph=True))
    assert_same({n.removeprefix("_orig_mod."): g for n, g in found.items()}, expected)


def test_a_mask_seen_in_inference_mode_serves_training():
    """The sums of the last mask are kept: for a step that follows they may not be inference's."""
    config = transformers.BertConfig(
        **SMALL,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    student = kronbert.fuse(kronbert.convert(transformers.BertModel(config), factor=2)).eval()
    mask = torch.ones(len(IDS), 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool)
    with torch.inference_mode():
        student(IDS, attention_mask=mask)
    student.train()
    student(IDS, attention_mask=mask).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in student.encoder.parameters())


def test_blocks_that_are_offloaded_are_named():
    model = a_model()
    for module in model.modules():
        if not list(module.parameters(recurse=False)):
            module.forward = module.forward
    with pytest.raises(NoMatchError, match=r"forward of all \d+ blocks is replaced, as accelerate"):
        fuse(model)
