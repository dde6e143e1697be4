"""What the study of sentence embeddings measures, against its definitions."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

import kronbert
from tests.data_files import write

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("sentence_study")


def test_figures_of_teacher_and_students(study, tiny_bert, tmp_path, monkeypatch):
    words = [
        "the film was good",
        "a bad room",
        "good",
        "the bad film was a film",
        "was it the room",
    ]
    pairs = [(a, b, (3 * i + 7 * j) % 6) for i, a in enumerate(words) for j, b in enumerate(words)]
    unlike = [pair for i, pair in enumerate(pairs) if i // 5 < i % 5]  # no two cosines are equal
    lines = [f"{a}\t{b}\t{score}" for a, b, score in unlike]
    text = "\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n"
    for name in ("train", "dev"):
        write(tmp_path / f"glue/stsb/{name}.tsv", text)
    asked = [(f"{a} good", f"{a} {b} bad", "entailment" if i % 3 else "not_entailment")
             for i, (a, b, _) in enumerate(pairs)]  # fmt: skip
    asked.append(asked[1])
    text = "\n".join(["question\tsentence\tlabel", *map("\t".join, asked)]) + "\n"
    for name in ("train", "dev"):
        write(tmp_path / f"glue/qnli/{name}.tsv", text)
    student = kronbert.convert(AutoModel.from_pretrained(tiny_bert), factor=3)
    student.save_pretrained(tmp_path / "student")
    results = tmp_path / "found.json"
    argv = ["study", "--model", tiny_bert, "--data-dir", tmp_path / "glue", "--factors", 3,
            "--students", f"saved={tmp_path / 'student'}", "--results", results]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    study.main()
    content = json.loads(results.read_text())
    rows = {row.pop("name"): row for row in content["rows"]}
    assert list(rows) == ["teacher", "3x, converted", "saved"]
    assert rows["saved"] == pytest.approx(rows["3x, converted"])
    assert rows["saved"]["parameters"] < rows["teacher"]["parameters"] / 2.9
    assert rows["teacher"]["cosine"] == pytest.approx(1)
    assert rows["saved"]["cosine"] < 0.95

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    teacher = AutoModel.from_pretrained(tiny_bert).eval()

    @torch.no_grad()
    def one(sentence):
        states = teacher(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(states.mean(0), dim=0).numpy()

    cosines = [one(a) @ one(b) for a, b, _ in unlike]
    expected = spearmanr(cosines, [score for *_, score in unlike]).statistic
    assert rows["teacher"]["spearman"] == pytest.approx(expected, abs=1e-6)
    found = [row for row in asked if row[2] == "entailment"]
    known = list(dict.fromkeys(sentence for _, sentence, _ in found))
    assert (content["questions"], content["sentences"]) == (len(found), len(known))
    table = np.stack([one(sentence) for sentence in known])
    ranks = [
        int((table @ one(question) > table[known.index(sentence)] @ one(question) + 1e-6).sum())
        for question, sentence, _ in found
    ]
    assert rows["teacher"]["first"] == pytest.approx(np.mean([rank < 1 for rank in ranks]))
    assert rows["teacher"]["among_ten"] == pytest.approx(np.mean([rank < 10 for rank in ranks]))
    assert 0 < rows["teacher"]["first"] < rows["teacher"]["among_ten"] < 1
    table = importlib.import_module("stage1_tables")
    head, _, *lines, _, note = table.sentences(results).splitlines()
    assert [line.count("|") for line in lines] == [head.count("|")] * 3
    share = 100 * rows["saved"]["first"] / rows["teacher"]["first"]
    assert f"| {100 * rows['saved']['first']:.1f}, {share:.0f} % |" in lines[2]
    assert f"| {100 * rows['teacher']['spearman']:.1f} |" in lines[0]
    assert f"{len(unlike)} pairs" in note
    assert table.sentences(tmp_path / "none.json") == "not measured"
