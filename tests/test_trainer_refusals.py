"""DistillTrainer refuses what does not go together: models, tokenizers, data, heads."""

from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from kronbert.distill import Objective, Term
from kronbert.errors import DistillError
from tests.small_trainer import LOGITS, TASK, a_dataset, a_model, a_trainer, collate


def a_tokenizer(lower: bool) -> transformers.PreTrainedTokenizerFast:
    words = ["[UNK]", "[PAD]", "kronecker", "Kronecker", "products"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        core.normalizer = normalizers.Lowercase()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]"
    )


def names(*labels: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {w: i for i, w in enumerate(labels)}}


KL = Objective(terms=(Term(tap="logits", loss="kl"),))
MLM = Objective(terms=(Term(tap="mlm"),))
SEVERAL = {"problem_type": "multi_label_classification"}


@pytest.mark.parametrize(
    ("objective", "changes", "text"),
    [
        (TASK, {"teacher": None}, "the terms embedding, ffn, logits, scores need a teacher"),
        (TASK, {"teacher": (2, {"vocab_size": 41})}, "vocab_size is 40 for the student, 41 for"),
        (
            TASK,
            {"teacher": (2, {"hidden_size": 20})},
            r"terms embedding and ffn compare hidden states, but the student is 16 wide and the "
            r"teacher 20\. Use the terms logits and labels only",
        ),
        (TASK, {"teacher": (2, {"num_attention_heads": 4})}, "has 2 heads and the teacher 4"),
        (TASK, {"teacher": (2, {"num_labels": 3})}, "the student has 2, the teacher 3"),
        (TASK, {"teacher": (2, {"num_hidden_layers": 3})}, "has 2 layers, the teacher 3"),
        (
            TASK,
            {"model": (1, names("no", "yes")), "teacher": (2, names("yes", "no"))},
            r"same labels in another order: student \['no', 'yes'\], teacher \['yes', 'no'\]",
        ),
        (
            KL,
            {"model": (1, {"num_labels": 1}), "teacher": (2, {"num_labels": 1})},
            "of one output is always 0: use 'mse'",
        ),
        (
            KL,
            {"model": (1, SEVERAL), "teacher": (2, SEVERAL)},
            "problem_type='multi_label_classification' decides on each by itself: use 'mse'",
        ),
        (MLM, {"teacher": None}, "BertForSequenceClassification has no masked-LM head"),
        (TASK, {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: the labels term"),
        (TASK, {"torch_compile": True}, "torch_compile=True: the taps are forward hooks"),
        (TASK, {"compute_loss_func": print}, "DistillTrainer's loss is its objective"),
        (KL, {"model": (1, {"return_dict": False})}, "student's config.return_dict is False"),
        (KL, {"teacher": (2, {"return_dict": False})}, "teacher's config.return_dict is False"),
        (LOGITS, {"ema": 0.9, "save_strategy": "best"}, "ema with save_strategy='best'"),
        (LOGITS, {"dropout": 1.5}, r"dropout=1.5: expected a probability in \[0, 1\)"),
        (TASK, {"model_init": print}, "needs model=, not model_init="),
        (
            TASK,
            {"processing_class": a_tokenizer(True), "teacher_processing_class": a_tokenizer(False)},
            "different tokenizers .*: the same ids mean other words",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path, objective, changes, text):
    for key in ("model", "teacher"):
        if isinstance(changes.get(key), tuple):
            seed, config = changes[key]
            changes = changes | {key: a_model(seed, **config)}
    student = changes.get("model") or a_model(1)
    changes = {"teacher": a_model(2)} | changes | {"model": student}
    teacher = changes["teacher"]
    with pytest.raises(DistillError, match=text):
        a_trainer(tmp_path, objective, **changes)
    assert teacher is None or (
        teacher.training and all(p.requires_grad for p in teacher.parameters())
    )


def test_a_teacher_that_is_the_student(tmp_path):
    model = a_model(1)
    with pytest.raises(DistillError, match=r"share the parameter 'bert\..*copy.deepcopy"):
        a_trainer(tmp_path, model=model, teacher=model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_student_in_half_precision(tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(DistillError, match=rf"embeddings.* is in {name}, .*student\.float\(\)"):
        a_trainer(tmp_path, model=a_model(1).to(dtype), teacher=a_model(2))
    frozen = a_model(1)
    frozen.bert.embeddings.to(dtype).requires_grad_(False)
    a_trainer(tmp_path, model=frozen, teacher=a_model(2).to(dtype))  # neither takes a step


def test_equal_tokenizers_go_together(tmp_path):
    pair = {
        "processing_class": a_tokenizer(True),
        "teacher_processing_class": a_tokenizer(True),
    }
    a_trainer(tmp_path, teacher=a_model(2, vocab_size=48), max_steps=1, **pair).train()


def test_data_without_labels(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in a_dataset()]
    trainer = a_trainer(tmp_path, train_dataset=rows)
    with pytest.raises(DistillError, match="term 'labels', but the batch has no labels, only atte"):
        trainer.train()
    a_trainer(tmp_path, Objective(terms=TASK.terms[:4]), train_dataset=rows, max_steps=1).train()


def test_a_mask_of_pairs_of_tokens(tmp_path):
    batch = {"inputs_embeds": torch.randn(2, 5, 16), "attention_mask": torch.ones(2, 5, 5)}
    with pytest.raises(
        DistillError, match=r"attention_mask \(2, 5, 5\): expected \(batch, tokens\)"
    ):
        a_trainer(tmp_path, KL).objective_losses([batch])


@pytest.mark.parametrize("key", ["muon_rate", "ema"])
def test_sharding_that_accelerate_was_asked_for(key, tmp_path, monkeypatch):
    """The environment of ``accelerate launch``, which the arguments know nothing of."""
    made = transformers.Trainer.create_accelerator_and_postprocess

    def sharded(self):
        made(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(DistillError, match=f"{key} with fsdp or deepspeed: they share"):
        a_trainer(tmp_path, LOGITS, **{key: 0.5})


@pytest.mark.parametrize("tap", ["sentence", "scores"])
def test_kept_logits_stand_for_no_other_tap(tap, tmp_path):
    """Rows that bring the teacher's logits: for what else is read, the teacher is run."""
    rows = [row | {"teacher_logits": [0.3, -0.2]} for row in a_dataset(16)]

    def with_logits(given):
        logits = torch.tensor([row["teacher_logits"] for row in given])
        return collate(given) | {"teacher_logits": logits}

    both = Objective(terms=(Term(tap=tap), Term(tap="logits")))
    losses = []
    for batch in (collate(rows), with_logits(rows)):
        trainer = a_trainer(tmp_path, both, model=a_model(1), teacher=a_model(2))
        losses.append(trainer.objective_losses([batch])[tap])
    assert losses[0] == losses[1] > 0


def test_a_head_of_another_kind(tmp_path):
    trainer = a_trainer(
        tmp_path, LOGITS, teacher=a_model(2, transformers.BertForTokenClassification)
    )
    with pytest.raises(DistillError, match=r"logits: student \(8, 2\), teacher \(8, 10, 2\)"):
        trainer.train()


def test_replaced_tokens_have_no_loss(tmp_path):
    """ELECTRA's logits are one a token, of the shape of one row's classes."""
    config = transformers.ElectraConfig(
        vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24,
    )  # fmt: skip
    student, teacher = (transformers.ElectraForPreTraining(config) for _ in range(2))
    with pytest.raises(DistillError, match="ElectraForPreTraining says of every token whether"):
        a_trainer(tmp_path, KL, model=student, teacher=teacher)


def test_a_masked_lm_of_ones_own(tmp_path):
    class Own(transformers.BertForMaskedLM):
        pass

    a_trainer(tmp_path, MLM, model=a_model(1, Own), teacher=None)
