"""Fine-tune an already converted model on a GLUE task with transformers' own Trainer.

    kronbert convert bert-base-uncased --factor 8 --output student
    python examples/glue_finetune.py --model student --task mrpc --data-dir GLUE --output tuned

A converted model is a PyTorch module like any other: nothing here but `import kronbert` knows of
it. There is no teacher, so this is the baseline that distillation has to beat. Data: folders of TSV
files (GLUE/MRPC/train.tsv, dev.tsv), or the Hugging Face hub without --data-dir.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import kronbert
from kronbert.distill import compute_metrics, load_task, tokenize


def main() -> None:
    options = arguments()
    set_seed(options.seed)  # before the new head is drawn
    data = load_task(
        options.task, data_dir=options.data_dir, limit=options.limit, seed=options.seed
    )
    task = data.task
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = tokenize(data, tokenizer, options.max_length)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model,
        num_labels=task.num_labels,
        **labels_of(task),
    )
    if not hasattr(model, "kronecker_plan"):
        raise SystemExit(
            f"{options.model} is dense. Convert it first: kronbert convert {options.model} "
            "--factor 8 --output student"
        )
    print(f"{model.num_parameters():,} parameters, {model.kronecker_plan.factor:.1f} times smaller")

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=options.output,
            learning_rate=options.learning_rate,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=64,
            train_sampling_strategy="group_by_length",
            warmup_steps=0.1,  # below 1: a share of the steps
            weight_decay=0.01,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            logging_steps=0.05,
            report_to="none",
            seed=options.seed,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows.train,
        eval_dataset=next(iter(rows.validation.values())),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics(task),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=True if options.resume else None)
    trainer.save_model(options.output)

    scores = {}
    for name, dev in rows.validation.items():
        found = trainer.evaluate(dev, metric_key_prefix=name)
        scores[name] = {metric: found[f"{name}_{metric}"] for metric in task.metrics}
        shown = ", ".join(f"{metric} {100 * value:.1f}" for metric, value in scores[name].items())
        print(f"{task.name} {name}: {shown}")
    Path(options.output, "scores.json").write_text(json.dumps(scores, indent=1) + "\n")

    loaded = kronbert.load(options.output)
    print(f"wrote {options.output}; kronbert.load gives a {type(loaded).__name__}")


def labels_of(task: Any) -> dict[str, Any]:
    """The names of the classes in the model's config; a regression has none."""
    if task.labels is None:
        return {"problem_type": "regression"}
    return {
        "id2label": dict(enumerate(task.labels)),
        "label2id": {label: i for i, label in enumerate(task.labels)},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder that `kronbert convert` wrote")
    parser.add_argument("--task", default="sst2", help="a GLUE name, or a folder of tables")
    parser.add_argument("--data-dir", help="folder with GLUE's TSV files; else the hub")
    parser.add_argument("--output", default="glue-finetuned")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, help="tokens; default: the task's")
    parser.add_argument("--limit", type=int, help="training rows, for a trial")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


if __name__ == "__main__":
    main()
