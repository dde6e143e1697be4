"""Saved students: what comes back, and what a damaged folder says."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

import kronbert
from kronbert import (
    CheckpointError,
    KroneckerEmbedding,
    KroneckerLinear,
    KroneckerLMHead,
)
from tests.small_berts import IDS, QUERY, SMALL, edit_config

KRONECKER = {"re:.*(query|key)": "6:2x24*24x2", "re:.*intermediate.dense": ["12x6*8x8", "6x8*16x6"]}


def student_of(model_class, factor=4, **more):
    """Kronecker products beside the planner's truncated SVDs."""
    teacher = model_class(BertConfig(**SMALL, **more)).eval()
    return kronbert.convert(teacher, factor, rules=KRONECKER)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A classifier, and the folder it was saved to."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student")
    student = student_of(BertForSequenceClassification, id2label={i: f"L{i}" for i in range(5)})
    student.save_pretrained(folder)
    return student, folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(saved[1], tmp_path / "damaged")


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_a_folder_holds_safetensors_and_json_only(saved):
    student, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "kronecker"
    assert sorted(stored) == ["dense_parameters", "layers", "quant_method", "schema"]
    assert set(stored["layers"]) == {x.size.name for x in student.kronecker_plan.converted}
    assert sorted(load_file(folder / "model.safetensors")) == sorted(student.state_dict())


def test_load_and_the_auto_class_give_the_same(saved):
    student, folder = saved
    for loaded in (
        kronbert.load(folder),
        kronbert.load(str(folder)),
        AutoModelForSequenceClassification.from_pretrained(folder),
    ):
        assert type(loaded) is BertForSequenceClassification
        assert not loaded.training
        assert torch.equal(loaded(IDS).logits, student(IDS).logits)
        assert loaded.config.id2label[4] == "L4"


def test_a_students_own_config_loads_it(saved):
    student, folder = saved
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    for config in (student.config, loaded.config, copy.deepcopy(loaded.config)):
        for again in (
            AutoModelForSequenceClassification.from_pretrained(folder, config=config),
            BertForSequenceClassification.from_pretrained(
                None, config=config, state_dict=student.state_dict()
            ),
            kronbert.load(folder, config=config),
        ):
            assert torch.equal(again.eval()(IDS).logits, student(IDS).logits)


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
    ],
)
def test_dtype_is_respected(saved, asked, got):
    student, folder = saved
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, **asked)
    assert {p.dtype for p in loaded.parameters()} == {got}
    expected = {name: tensor.to(got) for name, tensor in student.state_dict().items()}
    found = loaded.state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_student_comes_back_bit_for_bit(dtype, tmp_path):
    student = student_of(BertForSequenceClassification).to(dtype)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(IDS).logits, student(IDS).logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map_is_respected(saved, device_map):
    student, folder = saved
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, device_map=device_map)
    found = loaded(IDS.to(loaded.device)).logits.cpu()
    torch.testing.assert_close(found, student(IDS).logits, rtol=1e-4, atol=1e-4)


def test_shards(saved, tmp_path):
    student, _ = saved
    student.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for loaded in (kronbert.load(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(loaded.get_input_embeddings(), KroneckerEmbedding)
    assert torch.equal(kronbert.load(tmp_path)(IDS).logits, student(IDS).logits)


def test_saving_again_writes_the_same_files(saved, tmp_path):
    _, folder = saved
    kronbert.load(folder).save_pretrained(tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_body_of_a_classifier(saved):
    student, folder = saved
    body = AutoModel.from_pretrained(folder)
    assert type(body) is BertModel
    assert torch.equal(body(IDS).last_hidden_state, student.bert(IDS).last_hidden_state)
    assert body.kronecker_plan.parameters == sum(p.numel() for p in body.parameters())


def test_a_classifier_on_a_body(tmp_path):
    """What stage 2 of the distillation starts from: the new head is dense and random."""
    body = student_of(BertModel)
    body.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert isinstance(model.get_submodule(QUERY), KroneckerLinear)
    assert torch.equal(model.bert(IDS).last_hidden_state, body(IDS).last_hidden_state)
    assert model.kronecker_plan.parameters == sum(p.numel() for p in model.parameters())
    assert model(IDS).logits.isfinite().all()
    again = tmp_path / "again"
    model.save_pretrained(again)
    assert torch.equal(kronbert.load(again)(IDS).logits, model(IDS).logits)


def test_a_masked_lm_on_a_body_gets_a_tied_head(tmp_path):
    student_of(BertModel).save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert isinstance(model.cls.predictions.decoder, KroneckerLMHead)
    assert model.cls.predictions.decoder.table is model.get_input_embeddings()
    assert model.kronecker_plan.parameters == sum(p.numel() for p in model.parameters())


def test_a_classifier_from_a_masked_lm(tmp_path):
    student = student_of(BertForMaskedLM)
    student.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(
        model.bert.encoder.layer[1](torch.ones(1, 2, 48)),
        student.bert.encoder.layer[1](torch.ones(1, 2, 48)),
    )


def test_mixed_groups_and_a_tie_of_the_users_own(tmp_path):
    teacher = BertForMaskedLM(BertConfig(**SMALL, tie_word_embeddings=False)).eval()
    teacher.cls.predictions.decoder.weight = teacher.get_input_embeddings().weight
    rules = {
        "bert.embeddings.word_embeddings": ["384x12*1x4", {"rank": 2}],
        "re:.*query": ["2·6x4*8x12", "12x12*4x4"],
    }
    rules["bert.embeddings.word_embeddings"][1] = "2·384x1*1x48"
    student = kronbert.convert(teacher, rules=rules)
    student.save_pretrained(tmp_path)
    loaded = kronbert.load(tmp_path)
    assert isinstance(loaded.cls.predictions.decoder, KroneckerLMHead)
    assert torch.equal(loaded(IDS).logits, student(IDS).logits)
    plan = loaded.kronecker_plan
    assert plan.parameters == student.kronecker_plan.parameters
    assert plan.parameters == sum(p.numel() for p in loaded.parameters())


def test_a_merged_student_is_an_ordinary_checkpoint(saved, tmp_path):
    student, _ = saved
    kronbert.merge(student).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(dense(IDS).logits, student(IDS).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"no Kronecker checkpoint.*transformers' own"):
        kronbert.load(tmp_path)


def without(name):
    return lambda tensors: tensors.pop(name)


def with_tensor(name, *size):
    return lambda tensors: tensors.update({name: torch.zeros(size)})


# A damaged Kronecker layer is an error through every door.
TENSORS = {
    "missing": (without(f"{QUERY}.b"), rf"tensor '{QUERY}\.b' .* is missing"),
    "all of a layer missing": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(QUERY)],
        rf"tensor '{QUERY}\.a' .* is missing. The checkpoint is incomplete",
    ),
    "misshapen": (
        with_tensor(f"{QUERY}.a", 1, 5, 7),
        rf"tensor '{QUERY}\.a' has shape \(1, 5, 7\), config.json says",
    ),
    "extra": (with_tensor(f"{QUERY}.a_1", 1, 2, 2), rf"tensor '{QUERY}\.a_1' is not part of the"),
    "dense again": (with_tensor(f"{QUERY}.weight", 48, 48), rf"'{QUERY}\.weight' is not part"),
}
DOORS = {
    "load": kronbert.load,
    "auto": AutoModelForSequenceClassification.from_pretrained,
    "body": AutoModel.from_pretrained,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("change", "said"), TENSORS.values(), ids=TENSORS)
def test_damaged_tensors(folder, door, change, said):
    edit_tensors(folder, change)
    if door == "body":
        said = said.replace(r"'bert\.", "'").replace("'bert.", "'")
    with pytest.raises(CheckpointError, match=said):
        DOORS[door](folder)


def test_a_layer_made_dense_before_saving_is_named(tmp_path):
    student = student_of(BertForSequenceClassification)
    student.bert.pooler.dense = student.bert.pooler.dense.to_linear()
    student.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'bert.pooler.dense' was dense when it was saved"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["layers"]["bert.pooler.dense"]
    path.write_text(json.dumps(config))
    loaded = kronbert.load(tmp_path)
    assert torch.equal(loaded(IDS).logits, student(IDS).logits)


@pytest.mark.parametrize("name", ["classifier.weight", "bert.embeddings.LayerNorm.bias"])
def test_load_also_refuses_missing_dense_tensors(folder, name):
    edit_tensors(folder, without(name))
    with pytest.raises(CheckpointError, match=f"missing keys.*{name}"):
        kronbert.load(folder)


def test_load_also_refuses_other_tensors(folder):
    edit_tensors(folder, with_tensor("bert.something.weight", 3))
    with pytest.raises(CheckpointError, match=r"unexpected keys.*bert\.something\.weight"):
        kronbert.load(folder)
    edit_tensors(folder, without("bert.something.weight"))
    edit_tensors(folder, with_tensor("classifier.bias", 17))
    with pytest.raises(CheckpointError, match=r"classifier|mismatch"):
        kronbert.load(folder)


def test_another_number_of_labels_is_refused(saved):
    _, folder = saved
    with pytest.raises((CheckpointError, RuntimeError), match=r"classifier|ignore_mismatched"):
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("keep", "said"), [(-40, "truncated"), (200, "truncated"), (4, "truncated")]
)
def test_a_truncated_file(folder, door, keep, said):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Exception, match=r"(?i)truncated|incomplete|header|invalid") as caught:
        DOORS[door](folder)
    assert isinstance(caught.value, CheckpointError)
    assert said in str(caught.value)


CONFIGS = {
    "newer schema": (lambda c: c.update(schema=7), "has schema 7, this kronbert knows 1. Upgrade"),
    "unknown key": (lambda c: c.update(layer={}), "unknown key 'layer'.*Nearest: 'layers'"),
    "no layers": (lambda c: c.pop("layers"), "layers=None, expected a mapping"),
    "no shape": (
        lambda c: c["layers"].update({QUERY: "forty"}),
        f"layer '{QUERY}': 'forty' is no Kronecker shape",
    ),
    "no text": (lambda c: c["layers"].update({QUERY: [4, 8]}), f"layer '{QUERY}': .*expected text"),
    "other sizes": (
        lambda c: c["layers"].update({QUERY: "5x6*8x8"}),
        f"'{QUERY}': a_out=5 does not divide",
    ),
    "tied to nothing": (
        lambda c: c["layers"].update({QUERY: "tied to bert.pooler"}),
        "'tied to bert.pooler|tied to bert.pooler, which is no Kronecker layer",
    ),
    "another model's": (
        lambda c: c.update(layers={"vit.layers.0": "4x4*2x2"}),
        "none of the Kronecker layers .'vit.layers.0'",
    ),
    "a layer norm": (
        lambda c: c["layers"].update({"bert.embeddings.LayerNorm": "4x4*2x2"}),
        "'bert.embeddings.LayerNorm' is a LayerNorm in this model",
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("change", "said"), CONFIGS.values(), ids=CONFIGS)
def test_a_changed_config(folder, door, change, said):
    edit_config(folder, change)
    with pytest.raises(CheckpointError, match=said):
        DOORS[door](folder)


@pytest.mark.parametrize("text", ["{", "[]", '"bert"', "{}", '{"model_type": "nothing-known"}'])
def test_a_garbage_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        kronbert.load(folder)


def test_folders_that_hold_no_student(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"no config.json. Give the folder"):
        kronbert.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be read .*or a hub name while online"):
        kronbert.load(tmp_path / "absent" / "deeper" / "still")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be loaded"):
        kronbert.load(folder)


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected safetensors"):
        kronbert.load(folder)


def test_a_class_that_transformers_does_not_have(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace("BertForSequenceClassification", "MyClassifier"))
    with pytest.raises(CheckpointError, match=rf"'MyClassifier'.*{transformers.__version__} does"):
        kronbert.load(folder)


def test_what_load_takes_of_from_pretrained(saved):
    student, folder = saved
    asked = {"num_labels": 3, "ignore_mismatched_sizes": True}
    if Version(transformers.__version__) < Version("5.18"):  # no switch for quantised models yet
        with pytest.raises(CheckpointError, match="Load it with the sizes"):
            kronbert.load(folder, **asked)
    else:
        assert kronbert.load(folder, **asked).classifier.out_features == 3
    assert kronbert.load(folder, subfolder=None).num_parameters() == student.num_parameters()
    with pytest.raises(CheckpointError, match=r"load\(output_loading_info=...\): it raises"):
        kronbert.load(folder, output_loading_info=True)
