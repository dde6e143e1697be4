"""Students that come with kronbert: found by name, listed, loaded, and put into wheel and sdist."""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import kronbert
from kronbert import cli_students, shipped
from kronbert.errors import CheckpointError
from kronbert.student_card import student_card

ROOT = Path(__file__).resolve().parent.parent
REPORT = {
    "teacher": {"name": "someone/base", "parameters": 1000, "sizes": {}},
    "student": {"parameters": 123456, "factor": 8.04, "dtype": "float32"},
}


@pytest.fixture
def students(tmp_path, monkeypatch):
    """A folder with the student tiny-x3, named by KRONBERT_STUDENTS; none in the package."""
    folder = tmp_path / "mine"
    save_student(folder / "tiny-x3")
    monkeypatch.setenv("KRONBERT_STUDENTS", str(folder))
    monkeypatch.setattr(shipped, "PACKAGED", tmp_path / "packaged")
    return folder


def save_student(folder, seed=0, **more):
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=256, hidden_size=32, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=64)  # fmt: skip
    student = kronbert.convert(BertModel(config, **more), factor=3)
    student.save_pretrained(folder)
    (folder / "report.json").write_text(json.dumps(REPORT))
    return student


def test_by_name(students):
    path = kronbert.shipped_path("kronbert/tiny-x3")
    assert path == students / "tiny-x3"
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(path)(ids).last_hidden_state
        found = kronbert.load("kronbert/tiny-x3")(ids).last_hidden_state
    assert torch.equal(found, expected)


def test_own_folder_goes_before_the_package(students, tmp_path):
    save_student(tmp_path / "packaged" / "tiny-x3", seed=1)
    save_student(tmp_path / "packaged" / "other", seed=2)
    assert kronbert.shipped_path("kronbert/tiny-x3") == students / "tiny-x3"
    assert kronbert.shipped_path("kronbert/other") == tmp_path / "packaged" / "other"
    names = [student["name"] for student in kronbert.list_students()]
    assert names == ["kronbert/other", "kronbert/tiny-x3"]


def test_unknown_name_lists_the_known(students, monkeypatch):
    with pytest.raises(CheckpointError, match=r"'kronbert/tiny-x8': no student .* 'kronbert/tiny"):
        kronbert.shipped_path("kronbert/tiny-x8")
    asked = []

    def hub(name, **kwargs):
        asked.append(name)
        raise OSError("offline")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", hub)
    with pytest.raises(CheckpointError, match=r"the hub does not give it\. Nearest: 'kronbert/tin"):
        kronbert.load("kronbert/tiny-x8")
    assert asked == ["kronbert/tiny-x8"]
    shutil.rmtree(students)
    with pytest.raises(CheckpointError, match="None is installed: KRONBERT_STUDENTS may name"):
        kronbert.load("kronbert/tiny-x3")


def test_what_is_no_shipped_name(students, tmp_path, monkeypatch):
    save_student(tmp_path / "kronbert" / "tiny-x3", seed=5)
    for name in ("tiny-x3", "kronbert/", "kronbert/a/b", students / "tiny-x3"):
        assert not shipped.is_shipped_name(name)
    assert shipped.is_shipped_name("kronbert/tiny-x3")
    monkeypatch.chdir(tmp_path)  # a folder here goes first, as for transformers
    assert not shipped.is_shipped_name("kronbert/tiny-x3")


def test_list_and_broken_report(students):
    (found,) = kronbert.list_students()
    size = (students / "tiny-x3" / "model.safetensors").stat().st_size
    assert found == {
        "name": "kronbert/tiny-x3", "path": students / "tiny-x3", "bytes": size,
        "teacher": "someone/base", "parameters": 123456, "factor": 8.04,
    }  # fmt: skip
    with cli_students.out.capture() as shown:
        cli_students.students()
    text = " ".join(shown.get().split())
    assert "kronbert/tiny-x3" in text
    assert "someone/base" in text
    assert "8.0" in text
    assert "123,456" in text
    (students / "tiny-x3" / "report.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not the report of a student"):
        kronbert.list_students()
    (students / "tiny-x3" / "report.json").unlink()
    assert kronbert.list_students()[0]["factor"] is None


def test_a_measured_student_is_listed(students):
    """`kronbert report STUDENT --output STUDENT` leaves its own report.json there."""
    folder = students / "tiny-x3"
    (folder / "report.json").unlink()
    kronbert.report(kronbert.load(folder), latency=False).save(folder)
    assert kronbert.list_students()[0]["factor"] is None


def test_a_student_without_pooler_loads_strictly(tmp_path):
    student = save_student(tmp_path / "bare", add_pooling_layer=False)
    loaded = kronbert.load(tmp_path / "bare")
    assert loaded.pooler is None
    assert loaded.state_dict().keys() == student.state_dict().keys()


def test_card_shows_nothing_that_is_not_in_the_report():
    report = {
        "teacher": {"name": "a-folder", "parameters": 2000, "sizes": {"num_hidden_layers": 6}},
        "student": {"parameters": 1000, "factor": 2.0, "dtype": "float16"},
        "settings": {"text": "wiki.txt", "valid": None},
        "stage": {"batch_size": 8, "learning_rate": 0.002, "scheduler": "linear", "seed": 3,
                  "objective": {"terms": [{"tap": "ffn", "weight": 1.0},
                                          {"tap": "mlm", "weight": 0.5}]}},
        "data": "7 blocks of 16 tokens", "steps": 5, "tokens": 640, "tokens_per_second": 99.6,
        "versions": {"kronbert": "0.1.0"}, "held_out": None, "licence": "apache-2.0",
    }  # fmt: skip
    card = student_card(report)
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "base_model" not in card  # a folder's name is no hub name
    assert "# a-folder, 2.0 times smaller" in card
    assert "1,000 parameters for the teacher's 2,000" in card
    assert "| ffn + 0.5 mlm |" in card
    assert "5 of 8 blocks, 640 tokens" in card
    assert "| tokens per second | 100 |" in card
    assert "held-out" not in card


@pytest.mark.slow
def test_wheel_and_sdist_carry_students(tmp_path):
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("kronbert", "kernels", "distill"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.rmtree(tree / "kronbert" / "students", ignore_errors=True)
    save_student(tree / "kronbert" / "students" / "tiny-x3")
    for name in ("README.md", "LICENSE", "NOTICE", "tokenizer.json"):
        (tree / "kronbert" / "students" / "tiny-x3" / name).write_text("tiny\n")
    (tree / "kronbert" / "students" / "tiny-x3" / "1_Pooling").mkdir()
    (tree / "kronbert" / "students" / "tiny-x3" / "1_Pooling" / "config.json").write_text("{}")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {"config.json", "model.safetensors", "report.json", "README.md", "LICENSE", "NOTICE",
                "tokenizer.json", "1_Pooling/config.json"}  # fmt: skip
    (wheel,) = (tree / "dist").glob("*.whl")
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        listings = (zipfile.ZipFile(wheel).namelist(), archive.getnames())
    for names in listings:
        inside = "kronbert/students/tiny-x3/"
        found = {n.rpartition(inside)[2] for n in names if inside in n}
        assert found - {"1_Pooling"} == expected  # a tar names folders too
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "import kronbert; print(sum(p.numel() for p in kronbert.load('kronbert/tiny-x3')"
    code += ".parameters()), kronbert.shipped_path('kronbert/tiny-x3'))"
    env = {
        "PYTHONPATH": str(tmp_path / "installed"),
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
    }
    shown = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, text=True,
                           capture_output=True, check=False)  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert str(tmp_path / "installed" / "kronbert" / "students") in shown.stdout


def test_names_are_whole_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setattr(cli_students.out, "_width", 80)
    with cli_students.out.capture() as shown:
        cli_students.students()
    assert all(student["name"] in shown.get() for student in kronbert.list_students())


SENTENCES = (
    "A man is playing a guitar on the street.",
    "Someone plays music outside.",
    "The stock market fell sharply on Monday.",
    "Shares dropped at the start of the week.",
    "How do I reset my password?",
    "The cat sleeps on the warm roof.",
)


COMES = [
    ("kronbert/minilm-x8", 0.6),
    ("kronbert/minilm-x19", 0.43),
    ("kronbert/minilm-l4-x19", 0.43),
]


@pytest.mark.parametrize(("name", "near"), COMES)
def test_what_comes_with_the_package_embeds_sentences_as_its_teacher(minilm_path, name, near):
    """Students of packed text alone are at 0.48 and 0.30 here."""
    folder = kronbert.shipped_path(name)
    report = json.loads((folder / "report.json").read_text())
    assert (folder / "README.md").read_text() == student_card(report)
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        own, theirs = (
            torch.nn.functional.normalize((model(**batch).last_hidden_state * mask).sum(1), dim=1)
            for model in (kronbert.load(name).eval(), AutoModel.from_pretrained(minilm_path).eval())
        )
    assert (own * theirs).sum(1).mean() > near
    assert torch.equal((own @ own.T).fill_diagonal_(0).argmax(1)[:4], torch.tensor([1, 0, 3, 2]))
    pairs = torch.arange(len(SENTENCES)) // 2
    assert torch.equal((own @ theirs.T).argmax(1) // 2, pairs)  # itself, or what says the same


@pytest.mark.parametrize("name", [name for name, _ in COMES])
def test_sentence_transformers_opens_what_comes_with_the_package(minilm_path, name):
    """With the teacher's pooling and what follows it: means, of length 1."""
    kind = pytest.importorskip("sentence_transformers").SentenceTransformer
    student, teacher = (
        kind(str(folder), device="cpu") for folder in (kronbert.shipped_path(name), minilm_path)
    )
    found = student.encode(list(SENTENCES), convert_to_tensor=True)
    batch = student.tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        states = kronbert.load(name).eval()(**batch).last_hidden_state
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    torch.testing.assert_close(found, means, atol=1e-5, rtol=0)
    assert [type(part) for part in student] == [type(part) for part in teacher]
    assert student.max_seq_length == teacher.max_seq_length
