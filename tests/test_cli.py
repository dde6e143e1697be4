"""The command line: small real runs, and errors that are one message and exit code 2."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
)
from typer.testing import CliRunner

import kronbert
from kronbert import cli
from kronbert.errors import KronbertError, PlanError
from kronbert.job_models import open_model

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("plan", "convert", "compress", "evaluate", "report", "bench", "calibrate", "demo",
            "pretrain-student", "students")  # fmt: skip


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A terminal of 200 columns, whatever the machine's is, without colours."""
    monkeypatch.setattr(cli.out, "_width", 200)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")


def run(*words):
    """stdout of the command, which must succeed."""
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def fails(capsys, monkeypatch, *words):
    """stderr of the command, which must end in one message, exit code 2 and no traceback."""
    monkeypatch.setattr(sys, "argv", ["kronbert", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "Traceback" not in said.err
    assert said.err.count("Error") == 1
    return said.err


@pytest.fixture(scope="module")
def teacher(tiny_bert, tmp_path_factory):
    """A folder with a classifier of two classes and its tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "teacher"
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    with torch.no_grad():
        model.classifier.weight.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "student"
    run("convert", teacher, "--factor", 3, "--output", folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    text = run(command, "--help")
    assert "Usage" in text
    assert command in run("--help")


def test_command_is_a_module_too():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    words = [sys.executable, "-m", "kronbert"]
    done = subprocess.run([*words, "--help"], capture_output=True, text=True, env=env, check=True)
    assert all(command in done.stdout for command in COMMANDS)
    done = subprocess.run(
        [*words, "plan", "./nowhere", "--factor", "8"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 2
    assert done.stderr == "DataError: model './nowhere': no such folder.\n"
    assert done.stdout == ""


def test_plan_needs_no_weights(teacher, tmp_path):
    shutil.copy(teacher / "config.json", tmp_path)
    text = run("plan", tmp_path, "--factor", 3)
    assert "attention.self.query" in text
    assert re.search(r"3\.\d\d times smaller", text)
    total = AutoModelForSequenceClassification.from_pretrained(teacher).num_parameters()
    assert f"{total:,} ->" in text


def test_plan_is_readable_at_80_columns(minilm_path, monkeypatch):
    monkeypatch.setattr(cli.out, "_width", 80)
    lines = run(
        "plan", minilm_path, "--factor", 8, "--rule", "re:.*self.key=4:16x16*24x24",
        "--rule", "re:.*self.value=2:24x24*16x16+3:384x1*1x384",
    ).splitlines()  # fmt: skip
    assert max(map(len, lines)) <= 80
    # Every converted matrix has its shapes whole, the first on the line of its name.
    for name, shape in {
        "word_embeddings": r"svd\(\d+\)",
        "position_embeddings": r"svd\(\d+\)",
        "self.query": r"svd\(\d+\)",
        "self.key": "4·16x16⊗24x24",
        "self.value": "2·24x24⊗16x16",
        "intermediate.dense": r"svd\(\d+\)",
        "pooler.dense": r"svd\(\d+\)",
    }.items():
        row = rf"{name} +\d+  {shape}  +[\d,]+ +\d+\.\d( |$)"
        assert any(re.search(row, line) for line in lines), f"{name} is folded"
    shapes = [line.strip() for line in lines if line.strip().startswith("+")]
    assert "+ svd(3)" in shapes  # of the values
    blocks = [shape for shape in shapes if re.fullmatch(r"\+ svd\(\d+\) \d+-\d+", shape)]
    assert len(blocks) == len(shapes) - 1 == 4
    assert any("rows only" in line for line in lines)


def test_plan_with_weights_prints_errors(teacher):
    plain, weighed = (run("plan", teacher, "--factor", 3, *more) for more in ([], ["--weights"]))
    row = r"query .*\b0\.\d{3}\s*$"
    assert re.search(row, weighed, re.MULTILINE)
    assert not re.search(row, plain, re.MULTILINE)


def test_rules_keep_and_plan_round_trip(teacher, tmp_path):
    file = tmp_path / "new" / "plan.json"
    query = "bert.encoder.layer.0.attention.self.query"
    run(
        "plan", teacher, "--factor", 2, "--rule", "re:.*intermediate.dense=rank:3",
        "--rule", f"{query}=4x8*8x4", "--rule", "re:.*self.value=dense", "--keep", "*pooler*",
        "--keep", "classifier", "--save", file,
    )  # fmt: skip
    layers = {row["name"]: row["groups"] for row in json.loads(file.read_text())["layers"]}
    assert layers[query] == "4x8*8x4"
    assert layers["bert.encoder.layer.1.attention.self.value"] == ""
    assert layers["bert.pooler.dense"] == ""
    run("convert", teacher, "--plan", file, "--output", tmp_path / "student")
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    made = {row.size.name: row.groups for row in student.kronecker_plan.layers}
    expected = kronbert.Plan.from_json(json.loads(file.read_text()))
    assert made == {row.size.name: row.groups for row in expected.layers}
    assert student.bert.encoder.layer[0].intermediate.dense.a.shape[0] == 3


def test_fewer_layers(teacher, tmp_path):
    """The factor counts against the model of all layers, with weights or from the config alone; a
    plan that was saved is one of the copy's."""
    dense = AutoModelForSequenceClassification.from_pretrained(teacher)
    asked, file = dense.num_parameters() / 3, tmp_path / "plan.json"
    for more in ([], ["--weights"]):
        said = run("plan", teacher, "--factor", 3, "--layers", 1, "--save", file, *more)
        made = kronbert.Plan.from_json(json.loads(file.read_text()))
        assert not any("layer.1." in row.size.name for row in made.layers)
        assert 0.95 * asked < made.parameters <= asked
        times = dense.num_parameters() / made.parameters
        assert f"{times:.2f} times smaller than the model of all layers" in said
    assert "of all layers" not in run("plan", teacher, "--factor", 3)
    for name, how in {"own": ["--factor", 3], "planned": ["--plan", file]}.items():
        said = run("convert", teacher, "--layers", 1, "--output", tmp_path / name, *how)
        assert f"{times:.2f} times smaller than the model of all layers" in said
        student = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert student.config.num_hidden_layers == 1
        assert student.num_parameters() == made.parameters
    last = kronbert.convert(kronbert.fewer_layers(dense, (2,)), plan=made).state_dict()
    assert all(torch.equal(last[name], value) for name, value in student.state_dict().items())


def test_convert_writes_model_and_tokenizer(student, teacher):
    loaded = AutoModelForSequenceClassification.from_pretrained(student)
    dense = AutoModelForSequenceClassification.from_pretrained(teacher)
    assert loaded.num_parameters() <= dense.num_parameters() / 3
    assert AutoTokenizer.from_pretrained(student)("good film") == AutoTokenizer.from_pretrained(
        teacher
    )("good film")


def test_convert_leaves_the_model_alone(teacher, tmp_path, capsys, monkeypatch):
    before = load_file(teacher / "model.safetensors")
    said = fails(capsys, monkeypatch, "convert", teacher, "--factor", 3, "--output", teacher)
    assert "is the model itself" in said
    after = load_file(teacher / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_model_without_tokenizer_is_converted(teacher, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        shutil.copy(teacher / name, tmp_path / "bare")
    said = run("convert", tmp_path / "bare", "--factor", 3, "--output", tmp_path / "student")
    assert "no tokenizer" in said
    assert not (tmp_path / "student" / "tokenizer.json").exists()


def test_version():
    assert run("--version") == f"kronbert {kronbert.__version__}\n"
    assert kronbert.__version__ == importlib.metadata.version("kronbert")


def test_evaluate(teacher, student, tiny_task, tmp_path):
    text = run("evaluate", teacher, "--task", tiny_task)
    found = float(re.search(r"validation: accuracy (\d+\.\d+)", text)[1])
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    right = 0
    lines = (tiny_task / "dev.tsv").read_text().splitlines()[1:]
    for line in lines:
        sentence, label = line.split("\t")
        with torch.no_grad():
            logits = model(**tokenizer(sentence, return_tensors="pt")).logits
        right += ["cross", "glad"][int(logits.argmax())] == label
    assert found == pytest.approx(100 * right / len(lines), abs=0.01)
    assert "moods/train.tsv, dev.tsv" in text
    named = shutil.copytree(tiny_task, tmp_path / "named")
    for name in ("train.tsv", "dev.tsv"):
        content = (named / name).read_text()
        (named / name).write_text(content.replace("text\tlabel", "said\tmood", 1))
    again = run("evaluate", student, "--task", named, "--text-column", "said", "--label-column",
                "mood")  # fmt: skip
    assert "accuracy" in again


def test_report(teacher, student, tmp_path):
    text = run("report", student, "--teacher", teacher, "--no-latency", "--output", tmp_path / "r")
    content = json.loads((tmp_path / "r" / "report.json").read_text())
    assert f"{content['student']['parameters']:,}" in text
    assert content["factor"] >= 3
    assert (tmp_path / "r" / "report.md").is_file()
    run("report", student, "--no-latency", "--output", tmp_path / "r")  # its own is replaced
    assert "parameters" in run("report", student, "--no-latency")
    assert "MFLOP per 16 tokens" in run("report", student, "--no-latency", "--sequence-length", 16)
    shipped = kronbert.load("kronbert/minilm-x8").num_parameters()
    assert f"{shipped:,}" in run("report", "kronbert/minilm-x8", "--no-latency")


def test_bench(teacher):
    text = run("bench", teacher, "--factor", 3, "--batch-size", 2, "--sequence-length", 16)
    assert "batch 2" in text
    assert "batch 8" not in text
    shallow = run("bench", teacher, "--factor", 3, "--layers", 1, "--sequence-length", 16)
    base = kronbert.fewer_layers(AutoModelForSequenceClassification.from_pretrained(teacher), 1)
    student = kronbert.convert(
        base, factor=3 * base.num_parameters() / open_model(teacher).num_parameters()
    )
    assert f"{student.num_parameters():,}" in shallow
    assert f"{student.num_parameters():,}" not in text


def test_compress(tiny_bert, tiny_task, tmp_path):
    text = run(
        "compress", "--model", tiny_bert, "--task", tiny_task, "--output", tmp_path / "out",
        "--factor", 3, "--teacher-epochs", 0.2, "--epochs", 0.2, "--batch-size", 16,
        "--limit", 64, "--precision", "fp32", "--text-column", "text", "--label-column", "label",
    )  # fmt: skip
    assert re.search(r"accuracy: teacher \d+\.\d, student \d+\.\d; read .*report\.md", text)
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["settings"]["limit"] == 64
    assert "64 of 256 train rows" in content["data"]


def odd_plan(teacher):
    """A plan whose first layer has a number where its shapes are."""
    content = kronbert.plan(open_model(str(teacher)), factor=3, errors=False).to_json()
    content["layers"][0]["groups"] = 5
    return json.dumps(content)


def test_the_pooling_of_a_sentence_encoder_is_kept(tiny_bert, tmp_path):
    parts = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    pooled = [parts.Pooling(32, pooling_mode="cls"), parts.Normalize()]
    model = SentenceTransformer(modules=[parts.Transformer(str(tiny_bert)), *pooled], device="cpu")
    model.save_pretrained(str(tmp_path / "model"))
    for file in (tmp_path / "model").glob("sentence_*_config.json"):
        file.unlink()
    (tmp_path / "model" / "sentence_roberta_config.json").write_text('{"max_seq_length": 7}')
    run("convert", tmp_path / "model", "--output", tmp_path / "x", "--rule",
        "re:.*query=rank:31")  # fmt: skip
    assert (tmp_path / "x" / "sentence_roberta_config.json").is_file()
    student = SentenceTransformer(str(tmp_path / "x"), device="cpu")
    said = ["a good film", "the soup was bad"]
    expected, found = (one.encode(said, convert_to_tensor=True) for one in (model, student))
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_weights_that_are_not_there_are_not_made_up(teacher, tmp_path, capsys, monkeypatch):
    bare = BertModel.from_pretrained(teacher, add_pooling_layer=False)
    bare.save_pretrained(tmp_path / "bare")
    assert open_model(str(tmp_path / "bare")).num_parameters() == bare.num_parameters()
    bare.config.architectures = ["BertForMaskedLM"]
    bare.config.save_pretrained(tmp_path / "bare")
    assert type(open_model(str(tmp_path / "bare"))) is BertModel
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "modules.json").write_text("[]")
    said = fails(capsys, monkeypatch, "report", tmp_path / "early")
    assert "save it again: SentenceTransformer(folder)" in " ".join(said.split())
    bare.config.architectures = ["BertForSequenceClassification"]
    bare.config.save_pretrained(tmp_path / "bare")
    said = fails(capsys, monkeypatch, "convert", tmp_path / "bare", "--factor", 2, "--output",
                 tmp_path / "x")  # fmt: skip
    assert "Give a complete checkpoint" in said
    assert not (tmp_path / "x" / "config.json").exists()


def test_errors_are_one_message(teacher, student, tiny_task, tmp_path, capsys, monkeypatch):
    def said(*words):
        return fails(capsys, monkeypatch, *words)

    assert "factor=500 is out of reach" in said("plan", teacher, "--factor", 500)
    assert "NAME=VALUE" in said("plan", teacher, "--rule", "query")
    assert "'many' is no number" in said("plan", teacher, "--rule", "x=rank:many")
    assert "converted before" in said("convert", student, "--factor", 2, "--output", tmp_path / "x")
    (tmp_path / "file").write_text("not JSON")
    assert "cannot be written" in said(
        "convert", teacher, "--factor", 2, "--output", tmp_path / "file"
    )
    assert "cannot be written" in said(
        "plan", teacher, "--factor", 2, "--save", tmp_path / "file" / "plan.json"
    )
    assert "is a folder" in said("plan", teacher, "--factor", 2, "--save", tmp_path)
    (tmp_path / "odd.json").write_text(odd_plan(teacher))
    assert "'bert.embeddings.word_embeddings': groups 5: expected text" in said(
        "convert", teacher, "--output", tmp_path / "x", "--plan", tmp_path / "odd.json"
    )
    plans = ("convert", teacher, "--output", tmp_path / "x", "--plan")
    assert "kronbert plan --save" in said(*plans, tmp_path / "file")
    assert "No such file" in said(*plans, tmp_path / "none.json")
    assert "unknown task 'sst9'" in said("evaluate", teacher, "--task", "sst9")
    assert "no score" in said("evaluate", _base(teacher, tmp_path), "--task", tiny_task)
    assert "takes 64 tokens" in said("evaluate", teacher, "--task", tiny_task, "--max-length", 100)
    assert "cannot be written" in said("report", student, "--output", tmp_path / "file")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "report.json").write_text('{"scores": {}}')
    assert "of another command" in said("report", student, "--output", tmp_path / "job")
    assert (tmp_path / "job" / "report.json").read_text() == '{"scores": {}}'
    assert "expected factor= or preset=" in said(
        "compress", "--model", "m", "--task", "t", "--output", "o"
    )
    assert not (tmp_path / "x" / "config.json").exists()


def _base(teacher, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(teacher)
    model.bert.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_two_rules_for_one_name(teacher):
    with pytest.raises(PlanError, match="a second one for 're:"):
        run("plan", teacher, "--factor", 3, "--rule", "re:.*query=dense", "--rule",
            "re:.*query=rank:2")  # fmt: skip


def test_names_in_brackets_are_printed_as_they_are(teacher, tmp_path):
    output = tmp_path / "run[final]x[/b]"
    said = run("convert", teacher, "--output", output, "--factor", 3)
    assert "run[final]x[/b]" in said.replace("\n", "")
    assert (output / "config.json").is_file()


def test_a_pipe_whose_code_page_has_no_product_sign(teacher):
    code = "import sys; sys.argv[1:] = ['plan', sys.argv[1], '--preset', 'k8']; " \
           "from kronbert.cli import main; main()"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, str(teacher)],
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"times smaller" in done.stdout


def test_a_shipped_name_is_known_by_every_command(tiny_task):
    """`plan` refuses a student, and evaluation a bare encoder: both have found it."""
    for words in (("plan", "kronbert/minilm-x19", "--factor", 3),
                  ("evaluate", "kronbert/minilm-x19", "--task", tiny_task)):  # fmt: skip
        with pytest.raises(KronbertError) as refused:
            run(*words)
        assert "no such folder" not in str(refused.value)
