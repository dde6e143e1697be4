"""The examples run, small, from a folder that is not the repository."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOK = EXAMPLES / "compression.ipynb"


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """No import from the repository by accident; one thread, for models this small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return dict(os.environ)


def run(script, *words, environment, code=0):
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, words)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + (done.stderr if code else "")


def test_quickstart(tiny_bert, environment, tmp_path):
    text = run("quickstart.py", "--model", tiny_bert, "--factor", 3, environment=environment)
    assert re.search(r"3\.\d\d times smaller", text)
    assert "latency" in text
    differences = re.findall(r"largest difference (\S+)", text)
    assert len(differences) == 2
    assert float(differences[0]) == 0
    assert float(differences[1]) < 1e-5
    assert not list(tmp_path.iterdir()), "left a file behind"


def test_glue_finetune(tiny_bert, tiny_task, environment, tmp_path):
    import json

    import kronbert
    from kronbert import cli
    from kronbert.job_models import open_model

    kronbert.convert(open_model(str(tiny_bert)), factor=3).save_pretrained(tmp_path / "student")
    cli.copy_preparation(str(tiny_bert), tmp_path / "student")
    text = run(
        "glue_finetune.py", "--model", tmp_path / "student", "--task", tiny_task, "--epochs", 4,
        "--learning-rate", 1e-2, "--batch-size", 16, "--output", "tuned", environment=environment,
    )  # fmt: skip
    scores = json.loads((tmp_path / "tuned" / "scores.json").read_text())["validation"]
    assert scores["accuracy"] > 0.7
    assert f"moods validation: accuracy {100 * scores['accuracy']:.1f}" in text
    assert kronbert.load(tmp_path / "tuned").kronecker_plan.factor > 1
    refused = run(
        "glue_finetune.py", "--model", tiny_bert, "--task", tiny_task, environment=environment,
        code=1,
    )  # fmt: skip
    assert "is dense. Convert it first" in refused


def test_reports_of_several_machines_lie_side_by_side(environment, tmp_path):
    def gathered(task, seconds):
        settings = {"model": "teacher", "task": task, "factor": 8.0, "seed": 42, "preset": None}
        kept = dict.fromkeys(("scores", "metric", "retention", "data", "hidden_errors", "stages",
                              "measured", "start"))  # fmt: skip
        report = {**kept, "settings": settings, "seconds": {"task": seconds}, "history": {}}
        (tmp_path / "report.json").write_text(json.dumps(report))
        run("compress_results.py", "report.json", "--results", "all.json", environment=environment)
        rows = json.loads((tmp_path / "all.json").read_text())["runs"]
        return [(r["settings"]["task"], r["seconds"]["task"], r["machine"]) for r in rows]

    ((*_, here),) = gathered("sst2", 1.0)
    assert gathered("mrpc", 2.0) == [("sst2", 1.0, here), ("mrpc", 2.0, here)]
    elsewhere = json.loads((tmp_path / "all.json").read_text())
    elsewhere["runs"][0]["machine"] = "another"
    (tmp_path / "all.json").write_text(json.dumps(elsewhere))
    expected = [("sst2", 1.0, "another"), ("mrpc", 2.0, here), ("sst2", 3.0, here)]
    assert gathered("sst2", 3.0) == expected


def test_notebook_runs(tiny_bert, environment, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("KRONBERT_TUTORIAL_SMALL", "1")
    monkeypatch.setenv("KRONBERT_TUTORIAL_MODEL", str(tiny_bert))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]  # fmt: skip
    assert len(pictures) == 5
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "attention.self.query" in printed  # the plan, as text: rich would hand it to Jupyter
    assert "parameters" in printed
    assert "student, distilled" in printed


def test_notebook_is_clean():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "strip the outputs"
    assert not any(cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.parametrize("script", ["glue_finetune.py", "glue_study.py", "quickstart.py"])
def test_examples_explain_themselves(script, environment):
    assert "usage" in run(script, "--help", environment=environment)


@pytest.mark.parametrize("file", sorted(p.name for p in EXAMPLES.iterdir() if p.is_file()))
def test_examples_name_no_machine(file):
    text = (EXAMPLES / file).read_text()
    for place in (EXAMPLES.parent, Path.home(), sys.prefix, "/home/", "/Users/"):
        assert str(place) not in text
