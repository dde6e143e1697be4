"""Small BERTs: their sizes, layers and inputs, and how a saved one's config is changed."""

import json

import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

SMALL = {
    "vocab_size": 384,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 144,
}
WORD = "bert.embeddings.word_embeddings"
QUERY = "bert.encoder.layer.0.attention.self.query"
IDS = torch.arange(22).view(2, 11)


def classifier(**more):
    return BertForSequenceClassification(BertConfig(**SMALL | more)).eval()


def masked_lm(**more):
    return BertForMaskedLM(BertConfig(**SMALL | more)).eval()


def edit_config(folder, change):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data["quantization_config"])
    path.write_text(json.dumps(data))
