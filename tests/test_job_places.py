"""A job's paths are where they lead, not how they are written."""

from __future__ import annotations

import os

import pytest

from kronbert.errors import CheckpointError
from kronbert.job_folder import JobFolder
from kronbert.job_places import places_of


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A run of the model m of one folder, from there; the other folder has an m of its own."""
    for name in ("one", "other"):
        (tmp_path / name / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "one")
    JobFolder("../out", {"model": "m", "factor": 8}, print).begin("rows", "digest")
    return tmp_path


def again(folder, **asked):
    return JobFolder(folder / "out", {"model": "m", "factor": 8, **asked}, print)


def test_another_model_of_the_same_text(begun, monkeypatch):
    again(begun)
    monkeypatch.chdir(begun / "other")
    with pytest.raises(CheckpointError, match=r"model '.*one/m' -> '.*other/m'"):
        again(begun)
    monkeypatch.chdir(begun)
    with pytest.raises(CheckpointError, match=r"model '.*one/m' -> 'no m'"):
        again(begun)
    again(begun, model="one/m")


def test_the_same_model_by_another_text(begun, monkeypatch):
    again(begun, model=str(begun / "one" / "m"))
    again(begun, model="./m/")
    (begun / "link").symlink_to(begun / "one" / "m")
    again(begun, model=str(begun / "link"))
    with pytest.raises(CheckpointError, match="model 'm' -> 'google-bert/bert-base-uncased'"):
        again(begun, model="google-bert/bert-base-uncased")
    with pytest.raises(CheckpointError, match=r"factor 8 -> 19\)"):
        again(begun, model="./m", factor=19)


def test_a_project_that_was_moved_goes_on(begun, monkeypatch):
    os.rename(begun / "one", begun / "moved")
    monkeypatch.chdir(begun / "moved")
    again(begun).begin("rows", "digest")
    monkeypatch.chdir(begun / "other")  # the run is the moved model's from now on
    with pytest.raises(CheckpointError, match=r"model '.*moved/m' -> '.*other/m'"):
        again(begun)


def test_a_hub_name_that_a_folder_took(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    JobFolder("out", {"model": "org/m", "task": "mrpc"}, print).begin("rows", "digest")
    (tmp_path / "mrpc").mkdir()  # GLUE's name goes first
    JobFolder("out", {"model": "org/m", "task": "mrpc"}, print)
    (tmp_path / "org" / "m").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"model 'org/m' -> '.*org/m'"):
        JobFolder("out", {"model": "org/m", "task": "mrpc"}, print)


def test_a_run_from_before_places_were_kept(begun, monkeypatch):
    state = begun / "out" / "state.json"
    state.write_text(state.read_text().replace('"places"', '"before"'))
    monkeypatch.chdir(begun / "other")
    again(begun)
    with pytest.raises(CheckpointError, match=r"model 'm' -> '\./m'"):
        again(begun, model="./m")


def test_what_has_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("auto", "rows", "kronbert"):
        (tmp_path / name).mkdir()
    asked = {"precision": "auto", "task": "rows", "text": "none", "student": "kronbert/minilm-x8"}
    assert places_of(asked) == {"task": str(tmp_path / "rows")}
