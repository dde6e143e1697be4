"""The printed plan: fits its width, and holds the totals."""

import pytest
from transformers import BertConfig

from kronbert.config import KroneckerConfig
from kronbert.inventory import inventory
from kronbert.plan_table import render, rows
from kronbert.planning import make_plan

WORD = "embeddings.word_embeddings"


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


def test_blocks_say_which_rows_they_make(plan):
    shapes = "3:30522x1*1x768 + 2:999x1*1x768 + 5:100x1*1x768@30422 + 7x3*1x256@9"
    text = render(plan.edit({WORD: shapes}))
    for part in ("svd(3) + svd(2)", "rows 0 to 998 +", "svd(5) rows 30422", "to 30521 +", "56@9"):
        assert part in text


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
