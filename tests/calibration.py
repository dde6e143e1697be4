"""A small classifier, and sentences to fit a student of it to."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
)

SMALL = {
    "vocab_size": 200,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
LOW_RANK = {"re:.*(query|key|value|dense)": {"rank": 6}, "re:.*word_embeddings": {"rank": 8}}


def classifier():
    model = BertForSequenceClassification(BertConfig(**SMALL)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def sentences(batches, seed=0, rows=12):
    """Batches of different lengths, padded; few words are frequent, as in a language."""
    draw = torch.Generator().manual_seed(seed)
    frequency = 1 / torch.arange(1, 200, dtype=torch.float)
    made = []
    for i in range(batches):
        tokens = 9 + i % 3
        ids = 1 + torch.multinomial(frequency, rows * tokens, True, generator=draw)
        lengths = torch.randint(3, tokens + 1, (rows, 1), generator=draw)
        mask = (torch.arange(tokens) < lengths).long()
        made.append({"input_ids": ids.view(rows, tokens) * mask, "attention_mask": mask})
    return made
