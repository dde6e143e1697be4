"""`make_plan` and `Plan`: rules, keep, groups, tied heads, edits, JSON, and every refusal."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from kronbert.config import KroneckerConfig
from kronbert.errors import NoMatchError, PlanError, ShapeError
from kronbert.planning import Inventory, LayerSize, Plan, PlannedLayer, make_plan
from kronbert.shapes import KroneckerShape, dense_flops, low_rank

WORD = "bert.embeddings.word_embeddings"
HEAD = "cls.predictions.decoder"
QUERY = "bert.encoder.layer.1.attention.self.query"


def encoder(layers=2, width=96, wide=384, vocabulary=1000):
    """A small masked-LM BERT by its sizes alone: no torch, no transformers."""
    found = [
        LayerSize(name=WORD, kind="embedding", group="embedding", out=vocabulary, inner=width),
        LayerSize(
            name="bert.embeddings.position_embeddings",
            kind="position",
            group="embedding",
            out=192,
            inner=width,
        ),
        LayerSize(
            name="bert.embeddings.token_type_embeddings",
            kind="embedding",
            group="embedding",
            out=2,
            inner=width,
            dense_because="2 rows are too few to be worth a product",
        ),
    ]
    for i in range(layers):
        stem = f"bert.encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            found.append(_linear(f"{stem}.attention.{name}", "attention", width, width))
        found.append(_linear(f"{stem}.intermediate.dense", "feed-forward", wide, width))
        found.append(_linear(f"{stem}.output.dense", "feed-forward", width, wide))
    found.append(_linear("cls.predictions.transform.dense", "other", width, width))
    found.append(replace(_linear(HEAD, "embedding", vocabulary, width), kind="head", tied_to=WORD))
    weights = sum(layer.weights for layer in found)
    biases = layers * (9 * width + wide) + 4 * width + vocabulary
    return Inventory(layers=tuple(found), parameters=weights + biases, model_type="bert")


def _linear(name, group, out, inner):
    return LayerSize(name=name, kind="linear", group=group, out=out, inner=inner)


def planned(plan):
    return {layer.size.name: layer for layer in plan.layers}


def test_planning_loads_no_torch():
    code = (
        "import sys, kronbert.planning, kronbert.plan_table; "
        "loaded = {'torch', 'numpy', 'transformers', 'rich'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_totals_are_the_sum_of_the_parts():
    sizes = encoder()
    plan = make_plan(sizes, KroneckerConfig(factor=6))
    rest = sizes.parameters - sum(layer.weights for layer in sizes.layers)
    held = sum(
        sum(s.parameters for s in layer.groups) if layer.groups else layer.size.weights
        for layer in plan.layers
        if layer.size.tied_to is None
    )
    assert plan.parameters == rest + held
    assert plan.factor == sizes.parameters / plan.parameters
    assert 6 <= plan.factor <= 6 * 1.03


def test_rules_beat_patterns_beat_keep_beat_the_factor():
    rules = {
        QUERY: "24x24*4x4",
        "re:.*query": {"rank": 3},
        "re:.*layer.0.*dense": {"factor": 4},
        "bert.encoder.layer.1.output.dense": "dense",
        "bert.encoder.layer.1.intermediate.dense": ["16x2*24x48", "2:384x1*1x96"],
    }
    plan = make_plan(
        encoder(), KroneckerConfig(factor=3, rules=rules, keep=("*key", "*position*", "*query"))
    )
    found = planned(plan)
    assert found[QUERY].groups == (KroneckerShape(24, 24, 4, 4),)
    assert found["bert.encoder.layer.0.attention.self.query"].groups == (low_rank(96, 96, 3),)
    assert found["bert.encoder.layer.0.attention.self.key"].groups == ()
    assert found["bert.embeddings.position_embeddings"].groups == ()
    assert found["bert.encoder.layer.1.output.dense"].groups == ()
    for name in ("intermediate.dense", "output.dense", "attention.output.dense"):
        layer = found[f"bert.encoder.layer.0.{name}"]
        assert layer.groups
        assert layer.weights * 4 <= layer.size.weights
    mixed = found["bert.encoder.layer.1.intermediate.dense"]
    assert mixed.groups == (KroneckerShape(16, 2, 24, 48), low_rank(384, 96, 2))
    assert mixed.weights == 32 + 24 * 48 + 2 * (384 + 96)
    assert 3 <= plan.factor <= 3 * 1.03


def test_rules_alone_convert_only_what_they_name():
    plan = make_plan(encoder(), KroneckerConfig(rules={"re:.*query": {"rank": 2}}))
    assert [layer.size.name for layer in plan.converted] == [
        "bert.encoder.layer.0.attention.self.query",
        QUERY,
    ]


def test_a_pattern_passes_over_what_cannot_be_converted():
    plan = make_plan(encoder(), KroneckerConfig(rules={"re:.*": {"rank": 1}}))
    dense = [layer.size.name for layer in plan.layers if not layer.groups]
    assert dense == ["bert.embeddings.token_type_embeddings"]


def test_a_tied_head_follows_its_table():
    for rules, groups in (({}, True), ({WORD: "dense"}, False)):
        found = planned(make_plan(encoder(), KroneckerConfig(factor=3, rules=rules)))
        assert found[HEAD].groups == found[WORD].groups
        assert bool(found[WORD].groups) is groups
        assert found[HEAD].weights == 0


@pytest.mark.parametrize(
    "given", [{"rules": {HEAD: {"rank": 2}}}, {"keep": [HEAD]}, {"keep": ["*decoder"]}]
)
def test_a_tied_head_takes_no_rule(given):
    with pytest.raises(PlanError, match=f"'{HEAD}' shares its weight with '{WORD}' and follows it"):
        make_plan(encoder(), KroneckerConfig(factor=4, **given))


@pytest.mark.parametrize(
    ("keep", "rules", "converted"),
    [([HEAD, WORD], {"re:.*query": {"rank": 2}}, False), (["*"], {WORD: {"rank": 2}}, True)],
)
def test_a_tied_head_is_kept_as_its_table_is(keep, rules, converted):
    found = planned(make_plan(encoder(), KroneckerConfig(keep=keep, rules=rules)))
    assert bool(found[HEAD].groups) is bool(found[WORD].groups) is converted


def test_flops_of_every_kind_of_layer():
    linear, table = (
        _linear("x", "attention", 42, 20),
        LayerSize(name="t", kind="embedding", group="embedding", out=50, inner=20),
    )
    shape = KroneckerShape(6, 5, 7, 4, 2)
    assert PlannedLayer(size=linear).flops == dense_flops(42, 20)
    assert PlannedLayer(size=linear, groups=(shape,)).flops == shape.flops()
    both = PlannedLayer(size=linear, groups=(shape, low_rank(42, 20, 3)))
    assert both.flops == shape.flops() + low_rank(42, 20, 3).flops() + 42
    assert PlannedLayer(size=table).flops == 0
    assert PlannedLayer(size=table, groups=(low_rank(50, 20, 3),)).flops == 3 * 2 * 20
    position = replace(table, kind="position")
    assert PlannedLayer(size=position).flops == 0
    assert PlannedLayer(size=position, groups=(low_rank(50, 20, 3),)).flops == 3 * 2 * 20
    block = KroneckerShape(7, 1, 1, 20, 5, start=9)
    groups = (low_rank(50, 20, 3), block)
    assert PlannedLayer(size=table, groups=groups).flops == (3 + 5) * 2 * 20
    head = replace(table, kind="head", tied_to="t")
    assert PlannedLayer(size=head, groups=groups).flops == sum(s.flops() for s in groups) + 7


def test_by_group():
    plan = make_plan(encoder(), KroneckerConfig(factor=6))
    view = plan.by_group()
    assert list(view) == ["embedding", "attention", "feed-forward", "other"]
    assert [row["layers"] for row in view.values()] == [4, 8, 4, 1]
    assert view["attention"]["dense"] == 8 * 96 * 96
    assert view["attention"]["dense_flops"] == 8 * dense_flops(96, 96)
    both = ("attention", "feed-forward")
    assert plan.linear_flops(10) == 10 * sum(view[name]["flops"] for name in both)
    assert plan.linear_flops() == plan.linear_flops(128)
    assert plan.linear_flops(10, dense=True) == 10 * sum(view[n]["dense_flops"] for n in both)
    for row in view.values():
        assert row["factor"] == row["dense"] / row["weights"]
    saved = sum(row["dense"] - row["weights"] for row in view.values())
    assert plan.parameters == plan.dense_parameters - saved


def test_edit_replaces_the_named_layers_only():
    plan = make_plan(encoder(), KroneckerConfig(factor=6))
    edited = plan.edit({QUERY: {"rank": 5}, WORD: "dense"})
    before, after = planned(plan), planned(edited)
    assert after[QUERY].groups == (low_rank(96, 96, 5),)
    assert after[WORD].groups == after[HEAD].groups == ()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {QUERY, WORD, HEAD}
    assert edited.config.rules[QUERY].rank == 5
    assert edited.factor < plan.factor
    assert plan.edit({QUERY: {"factor": 8}}).layers != plan.layers
    assert Plan.from_json(json.loads(json.dumps(edited.to_json()))) == edited


def test_edits_add_up():
    plan = make_plan(encoder(), KroneckerConfig(factor=6, rules={QUERY: {"rank": 3}}))
    edited = plan.edit({WORD: "dense"}).edit({QUERY: {"rank": 5}})
    found = planned(edited)
    assert (found[WORD].groups, found[QUERY].groups) == ((), (low_rank(96, 96, 5),))
    rules = edited.config.rules
    assert (rules[WORD].dense, rules[QUERY].rank) == (True, 5)


def test_edit_of_a_plan_that_lacks_rows():
    plan = make_plan(encoder(), KroneckerConfig(factor=6, rules={"re:.*key": {"rank": 3}}))
    assert plan.edit({}) == plan
    data = plan.to_json()
    data["layers"] = [
        row for row in data["layers"] if row["name"] != WORD and "key" not in row["name"]
    ]
    edited = planned(Plan.from_json(data).edit({QUERY: {"rank": 5}}))
    assert (edited[QUERY].groups, edited[HEAD].groups) == ((low_rank(96, 96, 5),), ())


def test_what_cannot_be_converted_may_be_ruled_dense():
    plan = make_plan(encoder(), KroneckerConfig(factor=6))
    assert plan.edit({"bert.embeddings.token_type_embeddings": "dense"}).layers == plan.layers


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"re:.*query": "dense"}, PlanError, "edit takes full names"),
        ({"bert.qury": "dense"}, NoMatchError, "'bert.qury' matches no Linear or Embedding"),
        ({QUERY: "7x7*2x2"}, ShapeError, f"'{QUERY}': a_out=7 does not divide out_features=96"),
        ({HEAD: "dense"}, PlanError, "follows it"),
        (
            {"bert.embeddings.token_type_embeddings": {"rank": 1}},
            PlanError,
            "cannot be converted: 2 rows are too few",
        ),
    ],
)
def test_edit_refuses(changes, error, text):
    plan = make_plan(encoder(), KroneckerConfig(factor=6))
    with pytest.raises(error, match=re.escape(text)):
        plan.edit(changes)


def test_json_round_trip_keeps_everything():
    config = KroneckerConfig(factor=6, rules={QUERY: ["24x24*4x4", "2:96x1*1x96"]}, keep=["*key"])
    plan = make_plan(encoder(), config).with_errors({QUERY: 0.25})
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert planned(again)[QUERY].error == 0.25
    assert str(again) == str(plan)


def test_json_may_leave_out_what_has_a_default():
    plan = make_plan(encoder(), KroneckerConfig(factor=6))
    data = plan.to_json()
    del data["model_type"]
    for row in data["layers"]:
        for key in ("tied_to", "dense_because", "error"):
            if row[key] is None:
                del row[key]
    assert Plan.from_json(data) == replace(plan, model_type="")


def test_a_table_of_positions_may_have_blocks():
    name, text = "bert.embeddings.position_embeddings", "9:192x1*1x96 + 5:20x1*1x96@30"
    plan = make_plan(encoder(), KroneckerConfig(rules={name: text}))
    assert planned(plan)[name].weights == 9 * (192 + 96) + 5 * (20 + 96)
    assert Plan.from_json(plan.to_json()) == plan


def test_json_of_a_table_with_blocks_and_its_head():
    text = "9:1000x1*1x96 + 5:200x1*1x96@30"
    plan = make_plan(encoder(), KroneckerConfig(rules={WORD: text}))
    data = json.loads(json.dumps(plan.to_json()))
    assert {row["name"]: row["groups"] for row in data["layers"] if row["groups"]} == {
        WORD: text,
        HEAD: text,
    }
    assert Plan.from_json(data) == plan
    assert planned(plan)[WORD].weights == 9 * 1096 + 5 * 296
    with pytest.raises(ShapeError, match=f"'{QUERY}': .*@30 starts at row 30: expected 0"):
        plan.edit({QUERY: "96x1*1x96 + 20x1*1x96@30"})
    data["layers"][0]["groups"] = text.replace("@30", "@801")
    with pytest.raises(ShapeError, match=f"'{WORD}': .* makes rows 801 to 1000 of 96"):
        Plan.from_json(data)


LAYER = "Plan layer 'bert.encoder.layer.0.attention.self.query'"


def broken(change):
    data = make_plan(encoder(), KroneckerConfig(factor=6)).to_json()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda d: d.update(schema=2), PlanError, "Plan: schema 2 is newer than this kronbert"),
        (lambda d: d.update(layer=[]), PlanError, "Plan: unknown key 'layer'. Nearest: 'layers'"),
        (lambda d: d.pop("config"), PlanError, "Plan: key 'config' is missing"),
        (lambda d: d.pop("layers"), PlanError, "Plan: key 'layers' is missing"),
        (lambda d: d.pop("dense_parameters"), PlanError, "Plan: key 'dense_parameters' is missing"),
        (lambda d: d["layers"][3].pop("name"), PlanError, "Plan layer: key 'name' is missing"),
        (lambda d: d["layers"][3].pop("kind"), PlanError, f"{LAYER}: key 'kind' is missing"),
        (lambda d: d["layers"][3].pop("group"), PlanError, f"{LAYER}: key 'group' is missing"),
        (lambda d: d["layers"][3].pop("inner"), PlanError, f"{LAYER}: key 'inner' is missing"),
        (lambda d: d["layers"][3].pop("out"), PlanError, f"{LAYER}: key 'out' is missing"),
        (lambda d: d["layers"][3].pop("groups"), PlanError, f"{LAYER}: key 'groups' is missing"),
        (lambda d: d.update(layers=3), PlanError, "Plan: layers 3: expected what to_json writes"),
        (lambda d: d.update(dense_parameters="9"), PlanError, "dense_parameters '9': expected a w"),
        (lambda d: d["layers"][3].update(name=3), PlanError, "Plan layer: name 3: expected text"),
        (lambda d: d["layers"][3].update(out=-3), PlanError, f"{LAYER}: out -3: expected a whole"),
        (lambda d: d["layers"][3].update(inner="9"), PlanError, f"{LAYER}: inner '9': expected"),
        (lambda d: d["layers"][3].update(groups=[]), PlanError, f"{LAYER}: groups []: exp"),
        (lambda d: d["layers"][3].update(kind="lin"), PlanError, f"{LAYER}: kind 'lin': exp"),
        (lambda d: d["layers"][3].update(group="a"), PlanError, f"{LAYER}: group 'a': exp"),
        (lambda d: d["layers"][3].update(error="1"), PlanError, f"{LAYER}: error '1': exp"),
        (lambda d: d["layers"][3].update(error=True), PlanError, f"{LAYER}: error True: exp"),
        (lambda d: d["layers"][3].update(counted="no"), PlanError, f"{LAYER}: counted 'no'"),
        (lambda d: d["layers"][3].update(tied_to=3), PlanError, f"{LAYER}: tied_to 3: exp"),
        (lambda d: d["layers"][3].update(dense_because=0), PlanError, "dense_because 0: exp"),
        (lambda d: d["layers"][3].update(out=True), PlanError, f"{LAYER}: out True: exp"),
        (lambda d: d.update(model_type=None), PlanError, "Plan: model_type None: expected text"),
        (lambda d: d.update(dense_parameters=10), PlanError, "dense_parameters 10: expected at"),
        (
            lambda d: d["layers"].append(d["layers"][3]),
            PlanError,
            "self.query': the plan has two rows",
        ),
        (lambda d: d["layers"][3].update(rank=2), PlanError, "Plan layer: unknown key 'rank'"),
        (lambda d: d["config"].update(factr=2), PlanError, "unknown key 'factr'"),
        (
            lambda d: d["layers"][3].update(groups="7x96*1x1"),
            ShapeError,
            "'bert.encoder.layer.0.attention.self.query': a_out=7 does not divide",
        ),
    ],
)
def test_json_that_is_refused(change, error, text):
    with pytest.raises(error, match=re.escape(text)):
        Plan.from_json(broken(change))


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (
            {"rules": {QUERY: "10x24*4x4"}},
            ShapeError,
            f"'{QUERY}': a_out=10 does not divide out_features=96. The nearest divisors are 8 and "
            "12: use one of them, or leave the layer dense",
        ),
        (
            {"rules": {"re:.*intermediate.*": "384x96*2x1"}},
            ShapeError,
            "384x96⊗2x1 makes a 768x96 weight, expected 384x96",
        ),
        (
            {"rules": {QUERY.replace("query", "qury"): "dense"}},
            NoMatchError,
            f"Nearest: '{QUERY}'",
        ),
        ({"rules": {"re:.*values": "dense"}}, NoMatchError, "matches no Linear or Embedding"),
        (
            {"rules": {"bert.embeddings.token_type_embeddings": {"rank": 1}}},
            PlanError,
            "cannot be converted: 2 rows are too few",
        ),
        (
            {"rules": {QUERY: {"factor": 5000}}},
            PlanError,
            f"'{QUERY}': factor=5000 is out of reach for 96x96; the largest is",
        ),
    ],
)
def test_what_a_plan_refuses(given, error, text):
    with pytest.raises(error, match=re.escape(text)):
        make_plan(encoder(), KroneckerConfig(factor=4, **given))


def test_nothing_to_convert():
    with pytest.raises(PlanError, match=r"every Linear and Embedding is kept dense. Shorten keep="):
        make_plan(encoder(), KroneckerConfig(preset="k8", keep=["*"]))
