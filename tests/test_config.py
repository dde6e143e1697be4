"""`KroneckerConfig` and `Rule`: what is accepted, what is refused and how it says so, JSON."""

import json
import re

import pytest

from kronbert.config import DEFAULT_KEEP, KroneckerConfig, Rule
from kronbert.errors import NoMatchError, PlanError, ShapeError
from kronbert.shapes import KroneckerShape, low_rank

NAMES = ("encoder.layer.0.query", "encoder.layer.0.key", "pooler.dense", "classifier")
SHAPE = KroneckerShape(384, 48, 2, 16)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("dense", Rule(dense=True)),
        (None, Rule(dense=True)),
        ("384x48*2x16", Rule(groups=(SHAPE,))),
        ("384x48⊗2x16 + 3:768x1*1x768", Rule(groups=(SHAPE, low_rank(768, 768, 3)))),
        (SHAPE, Rule(groups=(SHAPE,))),
        ([SHAPE, "768x1*1x768"], Rule(groups=(SHAPE, low_rank(768, 768, 1)))),
        ({"rank": 4}, Rule(rank=4)),
        ({"factor": 8}, Rule(factor=8.0)),
        (Rule(rank=2), Rule(rank=2)),
    ],
)
def test_a_rule_is_read_and_written(value, rule):
    assert Rule.parse(value) == rule
    assert Rule.parse(json.loads(json.dumps(rule.to_json()))) == rule


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (4, PlanError, "rules['q']: 4 is no rule. Expected 'dense', a shape such as"),
        ({"rank": 4, "factor": 2}, PlanError, "is no rule"),
        ({"size": 4}, PlanError, "is no rule"),
        ([], PlanError, "is no rule"),
        (["dense", "384x48*2x16"], PlanError, "is no rule"),
        ({"rank": 0}, PlanError, "rules['q']: rank=0: expected a whole number >= 1"),
        ({"rank": True}, PlanError, "rank=True: expected a whole number"),
        ({"factor": 1}, PlanError, "rules['q']: factor=1: expected parameters before / after"),
        ("dens", ShapeError, "rules['q']: 'dens' is no Kronecker shape"),
    ],
)
def test_a_rule_that_says_nothing(value, error, text):
    with pytest.raises(error, match=re.escape(text)):
        KroneckerConfig(rules={"q": value})


def test_a_rule_sets_exactly_one_field():
    for fields in ({}, {"dense": True, "rank": 2}, {"groups": (SHAPE,), "factor": 2.0}):
        with pytest.raises(PlanError, match="expected exactly one of dense, groups"):
            Rule(**fields)
    with pytest.raises(PlanError, match="rank=-1: expected a whole number"):
        Rule(rank=-1)
    for text in ("384x48*2x16", ["384x48*2x16"]):
        with pytest.raises(PlanError, match="expected KroneckerShapes"):
            Rule(groups=text)
    assert Rule(groups=SHAPE).groups == (SHAPE,)


@pytest.mark.parametrize("factor", [1, 0.5, -3, float("nan"), float("inf"), "8", True, [8]])
def test_factor_is_a_number_above_one(factor):
    with pytest.raises(PlanError) as caught:
        KroneckerConfig(factor=factor)
    assert str(caught.value) == (
        f"KroneckerConfig: factor={factor!r}: expected parameters before / after, a number > 1 "
        "(19 = nineteen times smaller). To leave the model dense, do not convert it."
    )


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "nothing to convert: expected factor=, preset= or rules="),
        ({"factor": 8, "preset": "k8"}, "factor=8 and preset='k8': expected one of them"),
        ({"preset": "k9"}, "preset='k9' is unknown"),
        ({"factor": 10**400}, "expected parameters before / after, a number > 1"),
        ({"factor": 8, "keep": "pooler*"}, "keep='pooler*': expected a list of patterns"),
        ({"factor": 8, "keep": [3]}, "keep=[3]: expected a list of patterns"),
        ({"factor": 8, "keep": ["re:("]}, "'re:(' is no regular expression"),
        ({"factor": 8, "rules": {"re:[": "dense"}}, "'re:[' is no regular expression"),
        ({"factor": 8, "rules": ["dense"]}, "rules=['dense']: expected module names with"),
        ({"factor": 8, "rules": {3: "dense"}}, "rules={3: 'dense'}: expected module names"),
    ],
)
def test_what_a_config_refuses(given, text):
    with pytest.raises(PlanError, match=re.escape(text)):
        KroneckerConfig(**given)


def test_precedence_full_name_pattern_keep():
    config = KroneckerConfig(
        factor=8,
        rules={
            "re:.*query": {"rank": 2},
            "re:.*layer.*": {"rank": 3},
            "encoder.layer.0.key": {"rank": 4},
            "re:pool.*": {"rank": 5},
        },
        keep=("pooler*", "encoder*"),
    )
    found = [config.rule(name) for name in NAMES]
    # Of two patterns the first counts; both beat keep.
    assert found == [Rule(rank=2), Rule(rank=4), Rule(rank=5), None]
    assert KroneckerConfig(factor=8).rule("classifier") == Rule(dense=True)
    assert KroneckerConfig(factor=8, keep=["re:.*key"]).rule(NAMES[1]) == Rule(dense=True)
    assert KroneckerConfig(factor=8, rules={"classifier": {"rank": 1}}).rule(NAMES[3]).rank == 1


def test_a_regular_expression_covers_the_whole_name():
    config = KroneckerConfig(factor=8, rules={"re:layer": "dense"})
    assert config.rule("encoder.layer.0.key") is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"rules": {"encoder.layer.0.qury": "dense"}}, "Nearest: 'encoder.layer.0.query'"),
        ({"rules": {"*query": "dense"}}, "For several layers use a pattern: 're:.*query'"),
        ({"rules": {"re:.*value": "dense"}}, "'re:.*value' matches no Linear or Embedding"),
        ({"keep": ["poler*"]}, "'poler*' matches no Linear or Embedding"),
    ],
)
def test_a_name_that_matches_nothing(given, text):
    with pytest.raises(NoMatchError, match=re.escape(text)):
        KroneckerConfig(factor=8, **given).check_names(NAMES)


def test_keep_is_read_once():
    assert KroneckerConfig(factor=8, keep=(name for name in ["*query"])).keep == ("*query",)


def test_default_keep_may_match_nothing():
    KroneckerConfig(factor=8).check_names(("encoder.layer.0.query",))


def test_json_round_trip():
    config = KroneckerConfig(
        factor=8, rules={"q": "4:2x3*4x5", "re:k.*": {"rank": 3}, "v": {"factor": 2.5}}, keep=["x"]
    )
    again = KroneckerConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert again.keep == ("x",)
    assert KroneckerConfig.from_json({"preset": "K8"}) == KroneckerConfig(preset="k8")
    assert KroneckerConfig.from_json({"factor": 8}).keep == DEFAULT_KEEP


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"factor": 8, "kepe": []}, "KroneckerConfig: unknown key 'kepe'. Nearest: 'keep'"),
        ({"factor": 8, "schema": 2}, "schema 2 is newer than this kronbert knows (1). Upgrade"),
        ({"factor": 8, "schema": "1"}, "schema '1': expected a whole number"),
        ({"factor": 8, "keep": "pooler"}, "keep='pooler': expected a list of patterns"),
        ([8], "[8]: expected the dictionary that to_json gives"),
        ({"factor": 8, 1: 2}, "KroneckerConfig: unknown key 1. Known: "),
    ],
)
def test_json_that_is_refused(data, text):
    with pytest.raises(PlanError, match=re.escape(text)):
        KroneckerConfig.from_json(data)
