"""Hashes of rows: equal rows have one, however they lie in memory; others have another."""

import datasets
import pytest

from kronbert.distill.digests import rows_digest, structure_digest
from tests.small_trainer import a_model

ROWS = {
    "ids": [[1, 2, 3], [4]],
    "text": ["a", "bc"],
    "words": [["alpha0", "beta0"], ["gamma0"]],
    "nested": [[[1, 2], [3, 4]], [[5]]],
}


def rows(**changes):
    return datasets.Dataset.from_dict(ROWS | changes)


def test_equal_rows_have_one():
    assert len({rows_digest(rows()) for _ in range(4)}) == 1
    sliced = datasets.concatenate_datasets([rows(), rows()]).select(range(2, 4))
    assert rows_digest(sliced) == rows_digest(rows())


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": [[1, 2], [3, 4]]},
        {"text": ["ab", "c"]},
        {"words": [["alpha0"], ["beta0", "gamma0"]]},
        {"words": [["alpha0", "beta1"], ["gamma0"]]},
        {"nested": [[[1, 2, 3], [4]], [[5]]]},
    ],
)
def test_others_have_another(changes):
    assert rows_digest(rows(**changes)) != rows_digest(rows())


def test_structures():
    known = structure_digest(a_model(1))
    assert structure_digest(a_model(2)) == known
    frozen = a_model(1)
    frozen.bert.pooler.requires_grad_(False)
    wider = a_model(1, intermediate_size=25)
    assert len({known, structure_digest(frozen), structure_digest(wider)}) == 3
