"""The printed plan: fits its width, and holds the totals."""

import re

import pytest
from torch import nn
from transformers import BertConfig

import kronbert
from kronbert.config import KroneckerConfig
from kronbert.inventory import inventory
from kronbert.plan_table import COLUMNS, LEFT_OUT, render, rows
from kronbert.planning import make_plan

WORD = "embeddings.word_embeddings"
NAMES = ("word_embeddings", "position_embeddings", "token_type_embeddings", "attention.self.query",
         "attention.self.key", "attention.output.dense", "intermediate.dense", "output.dense",
         "pooler.dense")  # fmt: skip


@pytest.fixture(scope="module")
def plan():
    config = KroneckerConfig(
        preset="k21", rules={"encoder.layer.3.output.dense": "dense", WORD: {"rank": 50}}
    )
    return make_plan(inventory(BertConfig()), config)


@pytest.mark.parametrize("width", [100, 140])
def test_the_table_fits_and_cuts_nothing(plan, width):
    text = render(plan, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.startswith(f"bert: {plan.factor:.2f} times smaller")
    assert f"109,482,240 -> {plan.parameters:,} parameters" in text
    assert "21.73G ->" in text


def row_of(text, start):
    return next(line.split() for line in text.splitlines() if line.strip().startswith(start))


def test_a_row_has_the_sizes_and_both_orders(plan):
    text = str(plan)
    assert row_of(text, "attention.self.query")[1:] == [
        *("12", "768x768", "384x48⊗2x16"),
        *(f"{12 * 18_464:,}", "31.9", "75.9k", "607.5k"),
    ]
    assert row_of(text, "word_embeddings")[2:4] == ["30522x768", "svd(50)"]
    # Layers of one name with different shapes have a row each.
    assert text.count("  output.dense") == 2


BLOCKS = "3:30522x1*1x768 + 2:999x1*1x768 + 5:100x1*1x768@30422 + 7x3*1x256@9"


def test_blocks_say_which_rows_they_make(plan):
    text = render(plan.edit({WORD: BLOCKS}))
    lines = [line.strip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("word_embeddings"))
    assert lines[start].split()[2] == "svd(3)"  # the weight's column is left out
    blocks = ["+ svd(2) 0-998", "+ svd(5) 30422-30521", "+ 7x3⊗1x256@9"]
    assert lines[start + 1 : start + 4] == blocks
    said = "svd(rank) first-last: a truncated SVD added to these rows only."
    assert lines[-1] == said
    assert said not in str(plan)


def shown(text):
    """The columns of the table, and whether every name stands whole before its count."""
    head = next(line for line in text.splitlines() if " becomes" in line)
    columns = re.split("  +", head.strip())
    whole = all(re.search(rf"^ +{name} +\d+ ", text, re.MULTILINE) for name in NAMES)
    return columns, whole


def test_a_narrow_console_does_without_columns_not_names(plan):
    plan = plan.edit({WORD: BLOCKS})
    left_out = []
    for width in (110, 100, 80):
        columns, whole = shown(render(plan, width))
        assert whole, width
        left_out.append(tuple(name for name in COLUMNS if name not in columns))
    assert tuple(left_out) == LEFT_OUT


@pytest.mark.parametrize("factor", [4, 8, 19])
@pytest.mark.parametrize("width", [80, 100])
def test_plans_by_factor_fit(factor, width):
    plan = make_plan(inventory(BertConfig()), KroneckerConfig(factor=factor))
    text = render(plan, width)
    assert max(map(len, text.splitlines())) <= width
    assert shown(text)[1]
    table = next(layer for layer in plan.layers if layer.size.name == WORD)
    assert len(table.groups) == 5
    for shape in table.groups[1:]:
        last = shape.start + shape.a_out - 1
        assert re.search(rf"^ +\+ svd\({shape.rank}\) {shape.start}-{last}$", text, re.MULTILINE)
    assert f"-> {plan.parameters:,} parameters.\n" in text


def test_groups_have_totals(plan):
    line = row_of(str(plan).partition("group")[2], "attention")
    assert line == ["attention", "48", "28,311,552", "886,272", "31.9", "56.6M", "3.6M"]


def test_errors_are_shown_as_their_mean(plan):
    names = [f"encoder.layer.{i}.attention.self.query" for i in range(12)]
    with_errors = plan.with_errors({name: i / 10 for i, name in enumerate(names)})
    assert row_of(str(with_errors), "attention.self.query")[-1] == "0.550"


def test_rows_join_layers_of_one_pattern(plan):
    found = [(pattern, len(layers)) for pattern, layers in rows(plan)]
    assert ("encoder.layer.*.attention.self.key", 12) in found
    assert ("encoder.layer.*.output.dense", 11) in found
    assert sum(count for _, count in found) == len(plan.layers)


def test_rich_prints_a_plan(plan):
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as captured:
        console.print(plan)
    assert "times smaller" in captured.get()


def test_layers_of_other_sizes_have_rows_of_their_own():
    net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 32), nn.Linear(32, 64))
    plan = kronbert.plan(nn.ModuleDict({"net": net}), rules={"net.3": {"rank": 2}})
    found = [(pattern, [layer.size.name for layer in layers]) for pattern, layers in rows(plan)]
    assert [names for _, names in found] == [["net.0"], ["net.2"], ["net.3"]]
