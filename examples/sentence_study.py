"""How much of a sentence encoder its students keep, without training on any task.

    python examples/sentence_study.py --model FOLDER_OR_HUB --data-dir GLUE \\
        --students "8x, general text=FOLDER" "8x, then sentences=kronbert/minilm-x8"

An embedding is the mean of the last hidden states over a text's tokens. Likeness: Spearman's
correlation of the cosines of STS-B's dev pairs with their scores. Search: how often the sentence
that answers a question of QNLI's dev set is the nearest, or among the ten nearest, of all such
sentences.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from study_provenance import provenance  # type: ignore[import-not-found]
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import kronbert
from kronbert.distill import load_task
from kronbert.job_folder import write_whole

BATCH, LONGEST = 64, 128


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """(texts, width), of length 1."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        batch = tokenizer(
            [texts[i] for i in places],
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        )
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        for place, row in zip(places, (states * mask).sum(1) / mask.sum(1), strict=True):
            found[place] = row
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


class Sets:
    """Pairs with scores, and questions with the sentences that answer them."""

    def __init__(self, data_dir: str | None) -> None:
        data = load_task("stsb", data_dir=data_dir)
        pairs = data.validation["validation"]
        self.pairs = [pairs[name][:] for name in data.task.text]
        self.scores = pairs[data.task.label][:]
        data = load_task("qnli", data_dir=data_dir)
        rows = data.validation["validation"]
        answered = (data.task.labels or ()).index("entailment")
        rows = rows.select([i for i, x in enumerate(rows[data.task.label]) if x == answered])
        self.questions, sentences = (rows[name][:] for name in data.task.text)
        self.sentences = list(dict.fromkeys(sentences))
        self.answers = [self.sentences.index(one) for one in sentences]

    def measured(self, model: Any, tokenizer: Any) -> tuple[dict[str, float], Tensor]:
        """The figures, and the embeddings of STS-B's first texts."""
        first, second = (embed(model, tokenizer, texts) for texts in self.pairs)
        questions, sentences = (
            embed(model, tokenizer, texts) for texts in (self.questions, self.sentences)
        )
        nearest = (questions @ sentences.T).topk(10).indices
        hits = nearest == torch.tensor(self.answers)[:, None]
        return {
            "spearman": float(spearmanr((first * second).sum(1), self.scores).statistic),
            "first": float(hits[:, 0].float().mean()),
            "among_ten": float(hits.any(1).float().mean()),
        }, first


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", required=True, help="hub name or folder of the sentence encoder")
    made.add_argument("--data-dir", help="GLUE folders; without it the hub")
    made.add_argument("--students", nargs="*", default=[], metavar="NAME=STUDENT")
    made.add_argument("--factors", nargs="*", type=float, default=[8.0, 19.0], help="of students "
                      "that are converted from the weights and not trained")  # fmt: skip
    made.add_argument("--results", default="examples/results/sentences.json")
    options = made.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    teacher = AutoModel.from_pretrained(options.model, dtype=torch.float32).eval()
    models: dict[str, Callable[[], Any]] = {"teacher": lambda: teacher}
    for factor in options.factors:
        models[f"{factor:g}x, converted"] = partial(kronbert.convert, teacher, factor)
    for one in options.students:
        name, _, source = one.partition("=")
        models[name] = partial(kronbert.load, source)
    sets = Sets(options.data_dir)
    rows: list[dict[str, Any]] = []
    theirs = None
    for name, opened in models.items():
        model = opened().eval()
        found, own = sets.measured(model, tokenizer)
        theirs = own if theirs is None else theirs
        cosine = float((own * theirs).sum(1).mean())
        rows.append({"name": name, "parameters": model.num_parameters(), **found, "cosine": cosine})
        print(json.dumps(rows[-1]), flush=True)
    content = {
        "command": " ".join(
            ["python examples/sentence_study.py --model MODEL --data-dir GLUE"]
            + ["--students"] * bool(options.students)
            + [f"{one.partition('=')[0]!r}=FOLDER" for one in options.students]
        ),
        **provenance("unknown"),
        "pairs": len(sets.scores),
        "questions": len(sets.questions),
        "sentences": len(sets.sentences),
        "rows": rows,
    }
    write_whole(Path(options.results), json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
