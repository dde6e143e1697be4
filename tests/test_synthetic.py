"""The generated sentiment set: right labels, no leak, the same everywhere, and not too easy."""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from kronbert.distill import synthetic
from kronbert.distill.synthetic import DOMAINS, NEGATIVE, POSITIVE, sentiment
from kronbert.errors import DataError

DIGEST = """
import hashlib
from kronbert.distill.synthetic import sentiment
d = sentiment(512, seed=5)
text = repr([d.train.to_list(), d.validation["validation"].to_list()])
print(hashlib.sha256(text.encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def data():
    return sentiment()


def test_sizes_balance_and_uniqueness(data):
    train, dev = data.train, data.validation["validation"]
    assert (len(train), len(dev)) == (4200, 600)
    assert Counter(train["label"]) == {0: 2100, 1: 2100}
    assert Counter(dev["label"]) == {0: 300, 1: 300}
    keys = [re.sub(r"[^a-z ]", "", s.lower()) for s in (*train["sentence"], *dev["sentence"])]
    assert len(set(keys)) == 4800
    assert "synthetic" in data.source


def test_dev_has_pairs_and_phrases_that_train_lacks(data):
    train, dev = list(data.train["sentence"]), list(data.validation["validation"]["sentence"])
    for phrase in ("by no means", "not even remotely", "it would be wrong to call", "for all its"):
        assert not any(phrase in s.lower() for s in train), phrase
        assert any(phrase in s.lower() for s in dev), phrase
    new = sum(any(p in s.lower() for p in ("by no means", "not even remotely")) for s in dev)
    assert 0 < new < 300


def test_sentences_are_well_formed(data):
    for sentence in (*data.train["sentence"], *data.validation["validation"]["sentence"]):
        assert re.fullmatch(r"[A-Z][a-zé',;: I-]+\.", sentence), sentence
        assert "  " not in sentence
        assert not re.search(r"\b(\w+) \1\b", sentence.replace("that that", "")), sentence


def test_plurals_agree(data):
    plural = {a.name: a.plural for d in DOMAINS for a in d.aspects}
    places = "|".join(p for d in DOMAINS for p in d.places)
    names = "|".join(plural)
    pattern = re.compile(rf"\bthe ({names})(?: (?:{places}))? (is|are|was|were)\b")
    found = [m for s in data.train["sentence"] for m in pattern.finditer(s.lower())]
    assert len(found) > 4000
    for match in found:
        assert plural[match[1]] == (match[2] in ("are", "were")), match[0]


@pytest.mark.parametrize(
    ("sentence", "label"),
    [
        (r"the (.+) (?:is|are|was|were) (?:anything but|far from|never|by no means) (\w+)", -1),
        (r"the (.+) (?:is|are|was|were) not (?:at all|in the least|even remotely) (\w+)", -1),
        (r"the (.+) (?:is|are|was|were) (?:very|really|truly|remarkably|slightly|a bit) (\w+)", 1),
        (r"the (.+) (?:is|are|was|were) (?:much|a lot|far) less (\w+) than .*", -1),
        (r"the (.+) (?:is|are|was|were) (?:every bit|just|fully) as (\w+) as .*", 1),
        (r"the (.+) (?:is|are|was|were) (?:not nearly|nowhere near|not half) as (\w+) as .*", -1),
        (r"i was (?:wrong|mistaken|foolish) to \w+ that the (.+) would be (\w+)", -1),
        (r"i was right to \w+ that the (.+) would be (\w+)", 1),
        (r"i would not call the (.+?) (?:in|at|on|of|with) .* (\w+)", -1),
        (r".*, but what matters is that the (.+) (?:is|are|was|were) (?:very|really|truly) (\w+)",
         1),
    ],
)  # fmt: skip
def test_labels_follow_from_the_words(data, sentence, label):
    """An independent reading: the word's polarity, turned round or not by the phrase."""
    polarity = {}
    for domain in DOMAINS:
        for aspect in domain.aspects:
            for side in (NEGATIVE, POSITIVE):
                for word in aspect.words[side]:
                    polarity[aspect.name, word.rstrip("*")] = side
    leads = "|".join(lead for lead in synthetic._LEADS if lead)
    pattern = re.compile(rf"(?:{leads})?{sentence}\.")
    checked = 0
    for row in data.train.to_list() + data.validation["validation"].to_list():
        match = pattern.fullmatch(row["sentence"].lower())
        if not match or ", but " in match[1] or " and " in match[1] or ";" in match[1]:
            continue
        name = next((n for n, _ in polarity if match[1].split(",")[0].startswith(n)), None)
        if (name, match[2]) not in polarity:
            continue
        side = polarity[name, match[2]]
        assert row["label"] == (side if label == 1 else 1 - side), row
        checked += 1
    assert checked >= 10


def all_rows(data):
    return data.train.to_list() + data.validation["validation"].to_list()


@pytest.mark.parametrize(
    ("ending", "label"),
    [
        (r"(?:ruins? everything|spoils? it all|drags? the whole experience down)", NEGATIVE),
        (r"(?:makes? up for it|saves? it|lifts? the whole experience)", POSITIVE),
        (r"(?:I would not .* again|the \w+ let me down)", NEGATIVE),
        (r"(?:I would gladly .* again|the \w+ won me over)", POSITIVE),
        (r"this \w+ (?:is not worth .*|left me cold|never won me over|was a let-down)", NEGATIVE),
        (r"this \w+ (?:is worth .*|won me over|never let me down|was a real pleasure)", POSITIVE),
        (r"(?:never|could make me|refuse to) .* again, however .*", NEGATIVE),
        (r"(?:happily|cannot wait to|certainly) .* again, however .*", POSITIVE),
    ],
)
def test_verdicts_say_the_label(data, ending, label):
    found = [row for row in all_rows(data) if re.search(rf"\b{ending}\.$", row["sentence"])]
    assert len(found) >= 10
    assert {row["label"] for row in found} == {label}


def test_hopes_end_otherwise(data):
    for start, label in (("I really wanted to", NEGATIVE), ("I was (ready|prepared) to", POSITIVE)):
        found = [row for row in all_rows(data) if re.match(start, row["sentence"])]
        assert len(found) >= 10
        assert {row["label"] for row in found} == {label}


def test_words_that_dev_alone_has_for_a_thing(data):
    """15 % of the pairs; half of dev is made of these and of phrases that train lacks."""
    aspects = [aspect for domain in DOMAINS for aspect in domain.aspects]
    words = {a.name: [w.rstrip("*") for side in a.words for w in side] for a in aspects}

    def pairs(sentences):
        named = [(name, s) for s in map(str.lower, sentences) for name in words if name in s]
        return {(name, word) for name, s in named for word in words[name] if word in s}

    train, dev = data.train["sentence"], data.validation["validation"]["sentence"]
    alone = pairs(dev) - pairs(train)
    assert 0.08 < len(alone) / sum(map(len, words.values())) < 0.2
    more = [s for s in train if re.search(r"(far|even|much) more \w+ than", s)]
    assert len(more) > 20
    assert pairs(more) <= pairs(set(train) - set(more))


def test_no_sentence_of_dev_is_one_of_train_but_for_its_lead(data):
    leads = "|".join(sorted(filter(None, synthetic._LEADS)))

    def bare(rows):
        return [re.sub(rf"^(?:{leads})", "", s.lower()) for s in rows["sentence"]]

    found = bare(data.train) + bare(data.validation["validation"])
    assert len(set(found)) == len(found)


def test_a_bag_of_words_is_not_enough(data):
    train, dev = data.train, data.validation["validation"]
    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=2000))
    score = model.fit(train["sentence"], train["label"]).score(dev["sentence"], dev["label"])
    assert 0.55 < score < 0.85


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_same_rows_in_every_process(hash_seed):
    result = subprocess.run(
        [sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )  # fmt: skip
    data = sentiment(512, seed=5)
    text = repr([data.train.to_list(), data.validation["validation"].to_list()])
    assert result.stdout.split()[-1] == hashlib.sha256(text.encode()).hexdigest()


def test_another_seed_gives_other_rows_and_the_global_generator_is_left_alone():
    random.seed(3)
    state = random.getstate()
    assert sentiment(64, seed=1).train.to_list() != sentiment(64, seed=2).train.to_list()
    assert random.getstate() == state


@pytest.mark.parametrize("n", [0, 62, 65])
def test_refuses_other_sizes(n):
    with pytest.raises(DataError, match=rf"sentiment\(n={n}\): expected an even number"):
        sentiment(n)


def test_says_when_there_are_not_so_many_sentences(monkeypatch):
    monkeypatch.setattr(synthetic, "_key", lambda sentence: sentence[:2])
    with pytest.raises(DataError, match="so many different sentences cannot be written"):
        sentiment(64)
