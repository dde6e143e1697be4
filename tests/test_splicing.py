"""Rows spliced from two: what is in them, how many, and what is refused."""

from itertools import pairwise

import datasets
import pytest

from kronbert.distill import load_task, splice, with_unlabelled
from kronbert.distill.data import TaskData
from kronbert.distill.tasks import Task
from kronbert.errors import DataError

PAIR = Task(name="pairs", text=("first", "second"), labels=("no", "yes"))
ONE = Task(name="ones", text=("text",), labels=("no", "yes"))


def data_of(task, rows):
    columns = {name: [row[i] for row in rows] for i, name in enumerate(task.text)}
    train = datasets.Dataset.from_dict(columns | {"label": [0] * len(rows)})
    return TaskData(task=task, train=train, validation={"validation": train}, source="toy")


def numbered(row, words):
    """Words that say which row they are of, and where they stood."""
    return " ".join(f"{row}.{place}" for place in range(words))


def parts(text):
    """(row, place) of every word."""
    return [tuple(map(int, word.split("."))) for word in text.split()]


def test_the_beginning_of_one_and_the_end_of_another():
    lengths = [3, 8, 12, 1, 5]
    rows = splice(data_of(ONE, [(numbered(i, n),) for i, n in enumerate(lengths)]), count=60)
    assert len(rows) == 60 == len(set(rows["text"]))
    sources = set()
    for text in rows["text"]:
        words = parts(text)
        first, last = words[0][0], words[-1][0]
        assert first != last
        cut = sum(row == first for row, _ in words)
        assert words[:cut] == [(first, place) for place in range(cut)]
        end = [place for _, place in words[cut:]]
        assert end == list(range(lengths[last] - len(end), lengths[last]))
        assert [row for row, _ in words[cut:]] == [last] * len(end)
        sources |= {first, last}
        # the same share of both, to within a word
        share, skipped = cut / lengths[first], 1 - len(end) / lengths[last]
        room = 0.5 / lengths[first] + 0.5 / lengths[last]
        assert abs(share - skipped) <= room + 1e-9 or cut == 1 or len(end) == 1
    assert sources == set(range(5))


def test_texts_of_a_pair_are_cut_alike():
    given = [(numbered(i, 10), numbered(i, 20)) for i in range(6)]
    for first, second in zip(*splice(data_of(PAIR, given), count=80)[:].values(), strict=True):
        one, two = parts(first), parts(second)
        assert (one[0][0], one[-1][0]) == (two[0][0], two[-1][0])
        cuts = [sum(row == words[0][0] for row, _ in words) for words in (one, two)]
        assert abs(cuts[0] / 10 - cuts[1] / 20) <= 0.075 + 1e-9 or cuts[0] == 1


def test_one_seed_one_set_of_rows():
    given = data_of(ONE, [(numbered(i, 9),) for i in range(20)])
    first = splice(given, count=30, seed=3)["text"]
    assert splice(given, count=30, seed=3)["text"] == first
    assert splice(given, count=10, seed=3)["text"] == first[:10]
    assert splice(given, count=30, seed=4)["text"] != first


def test_words_become_others_alike_in_both_texts():
    rows = [(numbered(i, 20), numbered(i, 20)) for i in range(30)]
    given = data_of(PAIR, rows)
    known = {word for first, _ in rows for word in first.split()}
    plain, made = (splice(given, count=200, seed=3, reword=share) for share in (0, 0.25))
    assert made["first"] == made["second"]
    stay = []
    for text in made["first"]:
        assert set(text.split()) <= known
        words = parts(text)
        stay += [b == (a[0], a[1] + 1) for a, b in pairwise(words)]
    # A word follows its own neighbour where both stay, but for one place a row: 0.75 squared.
    assert 0.45 < sum(stay) / len(stay) < 0.6
    assert splice(given, count=200, seed=3)["first"] == plain["first"]
    with pytest.raises(DataError, match=r"reword=1\): expected a probability, 0 or more, below 1"):
        splice(given, count=1, reword=1)


def test_few_rows_make_few_others():
    rows = splice(data_of(ONE, [("a b",), ("c d",)]), count=1000)["text"]
    # cut in the middle, near the start, near the end
    assert set(rows) == {"a d", "c b", "a c d", "c a b", "a b d", "c d b"}


def test_empty_texts_are_left_empty():
    rows = splice(data_of(PAIR, [("a b", ""), ("c d", "")]), count=2)
    assert set(rows["second"]) == {""}


def test_on_real_rows_and_beside_the_others(data_dir):
    data = load_task("mrpc", data_dir=data_dir, limit=200)
    rows = splice(data, count=500)
    assert len(rows) == 500
    assert rows.column_names == list(data.task.text)
    own = set(data.train["sentence1"])
    assert len(set(rows["sentence1"]) & own) < 25  # one word of the other row may be the same
    both = with_unlabelled(data, rows)
    assert both.unlabelled is not None
    assert len(both.unlabelled) == 500


def test_what_splice_refuses():
    given = data_of(ONE, [("a b",), ("c d",)])
    with pytest.raises(DataError, match=r"count=0\): expected a number of rows, 1 or more"):
        splice(given, count=0)
    with pytest.raises(DataError, match="1 training rows, expected 2 or more"):
        splice(data_of(ONE, [("a b",)]), count=1)
    tokens = given.train.rename_column("text", "input_ids")
    tokenised = TaskData(task=ONE, train=tokens, validation={}, source="")
    with pytest.raises(DataError, match=r"no column text: .*Splice before tokenize"):
        splice(tokenised, count=1)
    with pytest.raises(DataError, match="every splice of two training rows is a training row"):
        splice(data_of(ONE, [("",), ("",)]), count=1)
