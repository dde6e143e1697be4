"""Plan, convert, report, save, load back and merge: the library in one page.

    python examples/quickstart.py                             # MiniLM from the extra `demo`
    python examples/quickstart.py --model bert-base-uncased --factor 19

The student is the nearest sum of Kronecker products, not yet distilled: `kronbert compress` and
examples/glue_finetune.py train it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import kronbert
from kronbert.demo import minilm_folder

SENTENCES = ["The soup was warm and rich.", "The soup was neither warm nor rich."]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="hub name or folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--factor", type=float, default=8.0, help="parameters before / after")
    parser.add_argument("--output", help="folder for the student; default: a temporary one")
    options = parser.parse_args()
    name = options.model or str(minilm_folder())
    teacher = AutoModel.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)

    # What becomes of every layer, and how far each fit is from its weight. Nothing is changed.
    print(kronbert.plan(teacher, factor=options.factor))

    # A new model; the teacher stays as it is.
    student = kronbert.convert(teacher, factor=options.factor)
    length = min(128, teacher.config.max_position_embeddings)
    print(kronbert.report(student, teacher, sequence_length=length))

    # safetensors and config.json, read back by transformers' own classes.
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.output or temporary)
        student.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
        loaded = AutoModel.from_pretrained(folder).eval()

    # The same function with plain nn.Linear and nn.Embedding.
    dense = kronbert.merge(loaded)
    inputs = tokenizer(SENTENCES, return_tensors="pt", padding=True)
    with torch.inference_mode():
        before, after, plain = (
            model(**inputs).last_hidden_state for model in (student, loaded, dense)
        )
    print(f"saved and loaded: largest difference {(before - after).abs().max():.1e}")
    print(f"merged:           largest difference {(before - plain).abs().max():.1e}")


if __name__ == "__main__":
    main()
