"""The README: its Python runs as it stands, its commands exist, its tables are the results'."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HUB_NAME = "google-bert/bert-base-uncased"


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_python_of_the_readme_runs(readme, tiny_bert, tmp_path, monkeypatch):
    """All blocks in one session, on a small model and data set under the README's names."""
    monkeypatch.chdir(tmp_path)
    mrpc = tmp_path / "glue" / "mrpc"
    mrpc.mkdir(parents=True)
    lines = ["sentence1\tsentence2\tlabel"] + [
        f"the room\tthe film {i}\t{i % 2}" for i in range(32)
    ]
    for name in ("train", "dev"):
        (mrpc / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    first, *rest = blocks(readme, "python")
    assert first.strip() == "student = kronbert.convert(model, factor=19)"
    # 32 wide: 19 times smaller is out of reach, and K21's shapes need 16 to divide.
    code = "\n".join(rest).replace(HUB_NAME, str(tiny_bert)).replace("factor=19", "factor=2")
    code = code.replace(
        'stage.to_arguments("runs/mrpc")', 'stage.to_arguments("runs/mrpc", max_steps=2)'
    )
    assert code.count("max_steps=2") == 1
    scope: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert type(scope["dense"]).__name__ == "BertForSequenceClassification"
    assert scope["trainer"].state.global_step == 2


def test_commands_of_the_readme_exist(readme, root):
    """Every ``kronbert`` command and option, and every ``make`` target that the README names."""
    make = (root / "Makefile").read_text()
    for block in blocks(readme, "bash"):
        for line in block.splitlines():
            words = line.split("#")[0].split()
            if words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", make, flags=re.MULTILINE), line
            if words[:1] == ["kronbert"]:
                shown = subprocess.run(
                    [sys.executable, "-m", "kronbert", words[1], "--help"],
                    capture_output=True,
                    text=True,
                    check=True,
                    env={"COLUMNS": "200", **os.environ},
                ).stdout
                for option in (word for word in words if word.startswith("--")):
                    assert option in shown, f"{line}: no {option}"


def test_tables_of_the_readme_come_from_the_results(root):
    run = subprocess.run(
        [sys.executable, str(root / "examples" / "make_tables.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
