"""A converted model under PyTorch's own tools: compile, export, DDP, copies, casts."""

import copy
import importlib.util
import io
import shutil

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import kronbert
from kronbert import KroneckerEmbedding, KroneckerLinear, KroneckerLMHead, KroneckerShape
from tests.processes import run_two

SMALL = {
    "vocab_size": 384,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 144,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# Every engine of the plain path: one product, a sum of terms, mixed groups, a truncated SVD.
RULES = {
    "bert.embeddings.word_embeddings": "2·384x12*1x4",
    "re:.*query": "4x4*12x12",
    "re:.*key": "2·24x4*2x12",
    "re:.*value": ["12x12*4x4", "4x4*12x12"],
    "re:.*intermediate.dense": {"rank": 3},
    r"re:.*\d.output.dense": {"factor": 4},
}
IDS = torch.arange(33).view(3, 11)


def student_of(model_class=BertForSequenceClassification, **more):
    return kronbert.convert(model_class(BertConfig(**{**SMALL, **more})).eval(), rules=RULES)


def gradients(model, ids=IDS, **more):
    """The gradients of one pass, by name."""
    model.zero_grad()
    out = model(input_ids=ids, **more)
    out.logits.float().square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_class", [BertForSequenceClassification, BertForMaskedLM])
def test_export_with_a_dynamic_batch(model_class):
    model = student_of(model_class)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model, (), inputs, dynamic_shapes={"input_ids": {0: batch}, "attention_mask": {0: batch}}
    )
    custom = {str(n.target) for n in program.graph.nodes if "kronbert" in str(n.target)}
    assert not custom, "an exported graph holds ATen only"
    other = torch.randint(384, (5, 11))
    found = program.module()(input_ids=other, attention_mask=torch.ones_like(other)).logits
    torch.testing.assert_close(found, model(other).logits, rtol=1e-4, atol=1e-5)


def test_compile_forward_and_backward():
    model = student_of(BertForMaskedLM)
    expected = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(compiled)
    assert {n.removeprefix("_orig_mod.") for n in found} == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compile_to_machine_code():
    """Inductor on the three modules; needs a C++ compiler."""
    if shutil.which("c++") is None:
        pytest.skip("inductor needs a C++ compiler: none is called c++")

    class Three(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = KroneckerEmbedding(30, 12, KroneckerShape(30, 4, 1, 3, 2))
            self.linear = KroneckerLinear(12, 12, KroneckerShape(4, 2, 3, 6, 2))
            self.head = KroneckerLMHead(self.embedding)

        def forward(self, ids):
            return self.head(self.linear(self.embedding(ids)))

    model = Three()
    ids = torch.tensor([[1, 2, 9], [29, 0, 0]])
    model(ids).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    compiled(ids).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", [BertForSequenceClassification, BertForMaskedLM])
def test_a_copy_is_another_model(model_class):
    model = student_of(model_class)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    before = model(IDS).logits
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(IDS).logits, before)
    assert twin.kronecker_plan == model.kronecker_plan


@pytest.mark.parametrize("model_class", [BertForSequenceClassification, BertForMaskedLM])
def test_pickled_whole(model_class, tmp_path):
    model = student_of(model_class)
    torch.save(model, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.kronecker_plan == model.kronecker_plan
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(kronbert.load(tmp_path / "saved")(IDS).logits, model(IDS).logits)


def test_state_dict_into_another_student():
    model, other = student_of(BertForMaskedLM), student_of(BertForMaskedLM)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    torch.save(model.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts(dtype):
    model = student_of(BertForMaskedLM)
    exact = model.double()(IDS).logits
    cast = model.half() if dtype == torch.float16 else model.to(dtype)
    logits = cast(IDS).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), exact, rtol=0.1, atol=0.02)
    assert {p.dtype for p in cast.parameters()} == {dtype}


def test_autocast():
    model = student_of(BertForMaskedLM)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS).logits
        logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(IDS).logits, rtol=0.1, atol=0.05)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = student_of(BertForMaskedLM).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = gradients(model)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_vmap_over_functional_state():
    """Ensembles: torch.func stacks the parameters of several students."""
    models = [student_of() for _ in range(2)]
    stacked, _ = torch.func.stack_module_state(models)
    for name, parameter in models[1].named_parameters():
        assert torch.equal(stacked[name][1], parameter)
    one = torch.func.functional_call(models[0], {n: p[1] for n, p in stacked.items()}, (IDS,))
    torch.testing.assert_close(one.logits, models[1](IDS).logits)


def test_the_head_follows_a_functional_call():
    """functional_call swaps the embedding's matrices for the head, too."""
    model, other = student_of(BertForMaskedLM), student_of(BertForMaskedLM)
    found = torch.func.functional_call(model, dict(other.named_parameters()), (IDS,)).logits
    torch.testing.assert_close(found, other(IDS).logits)


WORKER = """
import sys, torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
import kronbert

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
model = DistributedDataParallel(torch.load(f"{folder}/model.pt", weights_only=False))
ids = torch.load(f"{folder}/ids.pt")[rank::2]
for _ in range(2):
    model.zero_grad()
    model(input_ids=ids).logits.square().mean().backward()
found = {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}
torch.save(found, f"{folder}/found{rank}.pt")
# Else gloo's threads may outlive the interpreter: "terminate called without an active exception".
distributed.barrier()
del model  # which holds the group
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    model = student_of(BertForMaskedLM).train()
    ids = torch.randint(384, (4, 11))
    torch.save(model, tmp_path / "model.pt")
    torch.save(ids, tmp_path / "ids.pt")
    run_two(WORKER, tmp_path, [tmp_path])
    expected = gradients(model, ids)
    for rank in range(2):
        found = torch.load(tmp_path / f"found{rank}.pt")
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_onnx_export(tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -c constraints.txt '.[bench]'")
    import onnxruntime

    model = student_of()
    path = tmp_path / "student.onnx"
    inputs = (IDS, torch.ones_like(IDS))
    torch.onnx.export(model, inputs, path, input_names=["ids", "mask"], dynamo=True)
    session = onnxruntime.InferenceSession(path)
    feed = {"ids": IDS.numpy(), "mask": inputs[1].numpy()}
    (found,) = session.run(None, feed)[:1]
    torch.testing.assert_close(torch.from_numpy(found), model(*inputs).logits, rtol=1e-3, atol=1e-4)
