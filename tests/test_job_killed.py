"""The main job resumes after kill -9 to the same student."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kronbert import job as job_module
from kronbert.errors import CheckpointError
from kronbert.job import compress
from tests.job_runs import SHORT, assert_equal, weights

pytestmark = pytest.mark.usefixtures("one_thread", "hurried_report")


ROOT = Path(__file__).resolve().parent.parent


def kill_in(step, settings, folder):
    """Start the command, and kill it when the step has its first whole checkpoint."""
    words = ["--model", settings.model, "--task", settings.task, "--factor", "3.8", "--output",
             str(folder)]  # fmt: skip
    for key, value in SHORT.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as out:
        run = subprocess.Popen(
            [sys.executable, "-m", "kronbert", "compress", *words],
            stdout=out, stderr=out, env=env, cwd=folder.parent,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and run.poll() is None:
            if any(map(_whole, (folder / f"{step}-run").glob("checkpoint-*"))):
                with pytest.raises(CheckpointError, match="another process is at work"):
                    compress(replace(settings, output=str(folder)), print)
                run.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        run.wait(timeout=30)
    assert run.returncode == -signal.SIGKILL, log.read_text()[-2000:]
    assert list((folder / f"{step}-run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("step", "broken", "before"),
    [("teacher", False, 0), ("intermediate", False, 2), ("task", True, 3)],
)
def test_killed_run_resumes_to_the_same_student(finished, tmp_path, step, broken, before):
    whole, settings, content, _ = finished
    folder = tmp_path / "killed"
    kill_in(step, settings, folder)
    if broken:
        # What a kill in the middle of writing the next checkpoint leaves.
        first = max(filter(_whole, (folder / f"{step}-run").glob("checkpoint-*")), key=_number)
        newest = shutil.copytree(first, first.with_name(f"checkpoint-{_number(first) + 3}"))
        model = newest / "model.safetensors"
        model.write_bytes(model.read_bytes()[:-500])
    said = []
    again = compress(replace(settings, output=str(folder)), said.append)
    resumed = [line for line in said if line.startswith("resumed after step")]
    assert len(resumed) == 1
    assert int(resumed[0].split()[-1]) > 0
    done = [line.endswith("done before") for line in said if "/5 " in line]
    assert done == [True] * before + [False] * (5 - before)
    assert_equal(weights(folder / "teacher"), weights(whole / "teacher"))
    assert_equal(weights(folder / "student"), weights(whole / "student"))
    assert again["scores"] == content["scores"]


def _whole(path):
    """The state is a checkpoint's last file; for a moment it is there and empty."""
    try:
        json.loads((path / "trainer_state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


def _number(path):
    return int(path.name.rpartition("-")[2])


def test_kill_between_training_and_record_repeats_no_training(finished, tmp_path, monkeypatch):
    """The last checkpoint stays until the step is recorded."""
    whole, settings, _, _ = finished
    settings = replace(settings, output=str(tmp_path / "out"))
    save = job_module.JobFolder.save_model

    def killed(self, model, tokenizer, name):
        (self.path / f".{name}.part").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(job_module.JobFolder, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(settings, lambda _: None)
    monkeypatch.setattr(job_module.JobFolder, "save_model", save)
    said = []
    compress(settings, said.append)
    assert "resumed after step 48" in said  # 3 epochs of 16
    assert_equal(weights(tmp_path / "out" / "student"), weights(whole / "student"))
