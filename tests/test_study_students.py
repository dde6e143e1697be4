"""The study's students: all of one size, and each what it is called."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

import kronbert
from kronbert.errors import DataError


@pytest.fixture(scope="module")
def bert():
    """A BERT whose shares of embedding and layers are MiniLM's, a quarter as wide."""
    config = BertConfig(
        vocab_size=7_000,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("factor", [4.0, 8.0])
def test_all_kinds_have_one_size(modules, bert, factor):
    asked = kronbert.plan(bert, factor=factor, errors=False)
    sizes = {
        kind: modules.students.build(kind, bert, factor, None, None).num_parameters()
        for kind in modules.settings.KINDS
        if kind not in modules.settings.STAGE1
    }
    ranks = [layer.size.out + layer.size.inner for layer in asked.converted]
    assert sizes["kronbert"] == sizes["random"] == asked.parameters
    assert 0 <= asked.parameters - sizes["svd"] < min(ranks)
    assert 0 <= asked.parameters - sizes["dense"] < 2 * (2 * 96 + 1)
    assert 0 <= asked.parameters - sizes["paper"] < 0.03 * asked.parameters


@pytest.mark.parametrize("kind", ["kronbert", "svd-fitted", "paper-fitted"])
def test_a_fitted_kind_has_the_structure_of_the_plain_one(modules, bert, kind):
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 30, (16, 32), generator=random)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    build = modules.students.build
    plain = build(kind.removesuffix("-fitted"), bert, 8.0, None, None)
    fitted = build(kind, bert, 8.0, None, batches)
    assert fitted.kronecker_plan.to_json() == plain.kronecker_plan.to_json()
    table, *tables = (one.get_input_embeddings() for one in (bert, fitted, plain))
    off, plain_off = ((one(ids) - table(ids)).square().mean() for one in tables)
    assert off < plain_off  # a single product has little to choose


def test_students_of_fewer_layers_have_the_same_size(modules, bert):
    most = bert.num_parameters() / 8
    for kind in ("kronbert", "svd", "paper", "random"):
        student = modules.students.build(kind, bert, 8.0, None, None, layers=2)
        assert student.config.num_hidden_layers == len(student.bert.encoder.layer) == 2
        assert 0.97 * most < student.num_parameters() <= most
    with pytest.raises(DataError, match="kind 'dense' have a depth of their own"):
        modules.students.build("dense", bert, 8.0, None, None, layers=2)


def test_peers_are_what_they_are_called(modules, bert):
    build = modules.students.build
    paper = build("paper", bert, 8.0, None, None).kronecker_plan
    for layer in paper.converted:
        (shape,) = layer.groups
        assert shape.rank == 1
        if layer.size.group == "embedding":
            assert shape.b_out == 1
        else:
            rank = min(shape.a_out, shape.a_in) * min(shape.b_out, shape.b_in)
            assert rank >= min(layer.size.out, layer.size.inner) / 2
    svd = build("svd", bert, 8.0, None, None).kronecker_plan
    assert all(shape.low_rank for layer in svd.converted for shape in layer.groups)
    dense = build("dense", bert, 8.0, None, None)
    assert dense.config.num_hidden_layers == 2
    assert not hasattr(dense, "kronecker_plan")


def test_random_student_keeps_nothing_of_the_teacher(modules, bert):
    fitted = modules.students.build("kronbert", bert, 8.0, None, None)
    student = modules.students.build("random", bert, 8.0, None, None)
    for name, value in student.named_parameters():
        other = dict(fitted.named_parameters())[name]
        if value.numel() > 200 and value.std() > 0:
            cosine = torch.nn.functional.cosine_similarity(value.flatten(), other.flatten(), dim=0)
            assert abs(cosine) < 0.3, name
    table = student.get_input_embeddings().weight
    assert table.std().item() == pytest.approx(0.02, rel=0.3)
