"""The pictures: there, of the promised size, readable, and no trace left in matplotlib."""

import json
import subprocess
import sys
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from kronbert import pictures
from kronbert.errors import DataError
from kronbert.pictures import error_per_layer, learning_curve, size_speed_score

TERMS = {"embeddings": 0.02, "attention": 3.0, "hidden": 0.8, "logits": 1.5, "labels": 0.7}


def history(evaluated=True, terms=TERMS):
    rows = []
    for step in range(1, 400, 20):
        fall = 0.1 + 0.9 * float(np.exp(-step / 150))
        losses = {f"loss_{name}": start * fall for name, start in terms.items()}
        rows.append({"step": step, "loss": 6 * fall, **losses})
        if evaluated and step % 100 == 1:
            scores = {"eval_loss": fall, "eval_runtime": 2.0, "eval_accuracy": 0.9 - 0.3 * fall}
            rows.append({"step": step, **scores, "eval_samples_per_second": 9.0, "epoch": 1.0})
    return [*rows, {"step": 400, "train_loss": 1.0, "train_runtime": 3.0}]


def points(count=2):
    return [
        {
            "name": f"model {i}",
            "kind": "teacher" if i == 0 else ("Kronecker", "truncated SVD", "dense")[i % 3],
            "parameters": 22_713_600 // (1 + i // 3 * 9),
            "latency_ms": 40.0 / (1 + i),
            "score": 0.91 - 0.01 * (i // 3),
        }
        for i in range(count)
    ]


def errors(layers=3):
    names = ("attention.self.query", "attention.self.key", "attention.self.value",
             "attention.output.dense", "intermediate.dense", "output.dense")  # fmt: skip
    found = {"embeddings.word_embeddings": 0.7, "pooler.dense": 0.9}
    for layer in range(layers):
        for i, name in enumerate(names):
            found[f"encoder.layer.{layer}.{name}"] = 0.8 + 0.02 * i + 0.01 * layer
    return found


DRAWN = {
    "learning_curve": lambda path: learning_curve(history(), path, teacher_score=0.92),
    "losses_only": lambda path: learning_curve(history(evaluated=False), path),
    "one_loss": lambda path: learning_curve(history(terms={}), path, metric="accuracy"),
    "size_speed_score": lambda path: size_speed_score(points(), path, metric="accuracy"),
    "one_point": lambda path: size_speed_score([{**points(1)[0], "latency_ms": None}], path),
    "error_per_layer": lambda path: error_per_layer(errors(), path),
    "embeddings_only": lambda path: error_per_layer({"word_embeddings": 0.5}, path),
    "layers_only": lambda path: error_per_layer({"layer.0.output.dense": 1.7}, path),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_has_its_size_and_something_on_it(name, tmp_path):
    path = tmp_path / f"{name}.png"
    DRAWN[name](path)
    image = imread(path)
    height, width = image.shape[:2]
    assert width == 1100
    assert 400 < height < 1000
    assert image[..., :3].std() > 0.05
    ink = (image[..., :3] < 0.6).any(axis=-1)
    for part in (
        ink[:, : width // 3],
        ink[:, -width // 3 :],
        ink[: height // 3],
        ink[-height // 3 :],
    ):
        assert part.any()  # no empty side


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in order."""
    made = []

    class Kept(pictures.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(pictures, "Figure", Kept)
    return made


def test_learning_curve_shows_every_term_and_the_teacher(figures, tmp_path):
    learning_curve(history(), tmp_path / "a.png", metric="accuracy", teacher_score=0.925)
    losses, scores = figures[0].axes
    assert losses.get_yscale() == "log"
    assert {line.get_label() for line in losses.lines} == set(TERMS)
    student, teacher = scores.lines
    last = [row["eval_accuracy"] for row in history() if "eval_accuracy" in row][-1]
    assert student.get_ydata()[-1] == pytest.approx(100 * last)
    assert list(student.get_xdata()) == [1, 101, 201, 301]
    assert set(teacher.get_ydata()) == {92.5}
    assert teacher.get_linestyle() == "--"
    assert scores.get_ylabel() == "accuracy (%)"
    assert scores.get_xlabel() == "training step"


def test_learning_curve_without_evaluations_has_one_panel(figures, tmp_path):
    learning_curve(history(evaluated=False), tmp_path / "a.png", metric="accuracy")
    assert len(figures[0].axes) == 1


@pytest.mark.parametrize("count", [2, 7, 12])
def test_no_label_covers_another_or_a_marker(count, figures, monkeypatch, tmp_path):
    placed, place = [], pictures._place_labels
    monkeypatch.setattr(pictures, "_place_labels", lambda *args: placed.extend(place(*args)))
    given = points(count)
    if count == 7:
        given = [{**point, "parameters": 5_000_000, "score": 0.8} for point in given]  # one spot
    size_speed_score(given, tmp_path / "a.png")
    assert [text.get_text().splitlines()[0] for text in placed] == [p["name"] for p in given]
    boxes = [text.get_window_extent() for text in placed]
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)
    axes = figures[0].axes[0]
    for dots in axes.collections:
        centre = axes.transData.transform(dots.get_offsets()[0])
        assert not any(box.contains(*centre) for box in boxes)
    frame = axes.get_window_extent()
    assert all(frame.containsx(box.x0) and frame.containsx(box.x1) for box in boxes)


def test_markers_grow_with_latency(figures, tmp_path):
    size_speed_score(points(3), tmp_path / "a.png")
    areas = [dots.get_sizes()[0] for dots in figures[0].axes[0].collections]
    assert areas[0] > areas[1] > areas[2]


def test_error_per_layer_draws_lines_and_bars(figures, tmp_path):
    error_per_layer(errors(), tmp_path / "a.png")
    bars, lines = figures[0].axes
    assert [label.get_text() for label in bars.get_xticklabels()] == ["word", "pooler"]
    assert [bar.get_height() for bar in bars.patches] == [0.7, 0.9]
    shown = {line.get_label(): list(line.get_ydata()) for line in lines.lines}
    assert list(shown) == ["query", "key", "value", "output", "feed-forward in", "feed-forward out"]
    assert shown["output"] == pytest.approx([0.86, 0.87, 0.88])
    styles = {(line.get_color(), line.get_marker()) for line in lines.lines}
    assert len(styles) == 6


def test_no_layer_is_lost_when_a_layer_has_several_of_a_kind(figures, tmp_path):
    rows = {f"layer.0.{name}intermediate.dense": 0.5 for name in ("", "ffn.0.", "ffn.1.")}
    rows |= {"first.position_embeddings": 0.1, "second.position_embeddings": 0.2}
    error_per_layer(rows, tmp_path / "a.png")
    bars, lines = figures[0].axes
    assert len(lines.lines) == 3
    assert len(bars.patches) == 2


@pytest.mark.parametrize(
    ("own", "cross"),
    [("block.0.layer.0.SelfAttention.q", "1.EncDecAttention.q"), ("layers.0.self_attn.q_proj", "")],
    ids=["T5", "BART"],
)
def test_no_layer_is_lost_when_two_sides_are_numbered(figures, tmp_path, own, cross):
    names = [f"encoder.{own}", f"decoder.{own}"]
    names += [names[1].replace("self_attn", "encoder_attn").replace("0.SelfAttention.q", cross)]
    error_per_layer({name: 0.1 * i for i, name in enumerate(names)}, tmp_path / "a.png")
    shown = [y for line in figures[0].axes[0].lines for y in line.get_ydata()]
    assert sorted(shown) == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("bert.encoder.layer.11.attention.self.query", "query"),
        ("bert.encoder.layer.11.attention.output.dense", "output"),
        ("bert.encoder.layer.11.output.dense", "feed-forward out"),
        ("distilbert.transformer.layer.11.attention.q_lin", "query"),
        ("distilbert.transformer.layer.11.attention.out_lin", "output"),
        ("distilbert.transformer.layer.11.ffn.lin1", "feed-forward in"),
        ("deberta.encoder.layer.11.attention.self.key_proj", "key"),
        ("vit.layer.11.attention.attention.value", "value"),
        ("model.layers.11.attn.Wqkv", "query, key, value"),
        ("model.layers.11.attn.Wo", "output"),
        ("model.layers.11.mlp.Wo", "feed-forward out"),
        ("transformer.h.11.attn.c_proj", "output"),
        ("transformer.h.11.mlp.c_fc", "feed-forward in"),
        ("something.11.of.its.own", "of.its.own"),
    ],
)
def test_module_names_of_every_architecture_are_understood(name, matrix):
    assert pictures._matrix(name)[:2] == (matrix, 11)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda path: learning_curve([], path), "no loss and no evaluation"),
        (lambda path: learning_curve(history(), path, metric="acuracy"), "'acuracy'.*'accuracy'"),
        (lambda path: size_speed_score([], path), "no points"),
        (lambda path: error_per_layer({}, path), "no errors"),
    ],
)
def test_nothing_to_draw_is_said_and_no_file_written(call, said, tmp_path):
    with pytest.raises(DataError, match=said):
        call(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_users_style_stays_and_does_not_reach_the_picture(tmp_path):
    size_speed_score(points(), tmp_path / "plain.png")
    dark = {"figure.facecolor": "black", "axes.facecolor": "black", "text.color": "white"}
    with matplotlib.rc_context(dark):
        before = matplotlib.rcParams.copy()
        size_speed_score(points(), tmp_path / "styled.png")
        assert matplotlib.rcParams == before
    assert (tmp_path / "styled.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_pyplot_and_the_backend_are_left_alone(tmp_path):
    code = f"""
import json, sys, matplotlib
before = dict(matplotlib.rcParams.copy())
from kronbert.pictures import error_per_layer
error_per_layer({{"layer.0.output.dense": 0.5}}, {str(tmp_path / "a.png")!r})
pyplot = "matplotlib.pyplot" in sys.modules
print(json.dumps([pyplot, dict(matplotlib.rcParams.copy()) == before]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [False, True]
