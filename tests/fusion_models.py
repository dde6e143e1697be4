"""Small models to fuse, their ordinary copies, and the fused calls each makes."""

import copy
from collections import Counter
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import kronbert
from kronbert.fusion import fuse

SMALL: dict[str, Any] = {
    "vocab_size": 130,  # tables of fewer than 128 rows stay dense
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig(**SMALL),
    "roberta": transformers.RobertaConfig(**SMALL),
    "xlm-roberta": transformers.XLMRobertaConfig(**SMALL),
    "electra": transformers.ElectraConfig(**SMALL, embedding_size=12),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=130, dim=24, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40
    ),
    "modernbert": transformers.ModernBertConfig(
        **SMALL, pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2
    ),
}
# Calls of one forward pass, two layers deep.
EMBEDDINGS = Counter({"embed_norm": 1})
CONVERTED = EMBEDDINGS + Counter({"qkv": 2, "linear_norm": 2, "ffn_norm": 2})
DENSE = EMBEDDINGS + Counter({"residual_norm": 4})
# ModernBERT's layers norm before their halves.
PRE_NORM = EMBEDDINGS + Counter({"add_norm": 2})
PRE_NORM_CONVERTED = PRE_NORM + Counter({"gated_ffn": 2})
TABLE = "re:.*(word|tok)_embeddings"
RULES = {
    TABLE: {"factor": 2},
    r"re:.*(query|key|value|attention\.output\.dense|[qkv]_lin|out_lin)": "4:2x12*12x2",
    r"re:.*(intermediate\.dense|lin1)": "8:2x24*24x1",
    r"re:.*(\d\.output\.dense|lin2)": "8:1x24*24x2",
}
MODERNBERT_RULES = {
    TABLE: {"factor": 2},
    "re:.*Wqkv": "4:8x24*9x1",
    r"re:.*attn\.Wo": "4:2x12*12x2",
    "re:.*Wi": "12:2x24*48x1",
    r"re:.*mlp\.Wo": "8:1x24*24x2",
}
IDS = torch.tensor([[5, 9, 90, 3, 17, 4, 6], [8, 7, 33, 2, 0, 0, 0]])
MASK = (torch.arange(7) < torch.tensor([[7], [4]])).long()
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


def rules_of(name: str) -> dict[str, Any]:
    return MODERNBERT_RULES if name == "modernbert" else RULES


def a_model(
    name: str = "bert",
    *,
    converted: bool = True,
    head: str = "TokenClassification",
    dropout: float = 0.0,
    planned: bool = False,
    **changes: Any,
) -> Any:
    """A model in training mode, whose weights are not the initialisation's near-zeros. planned:
    with shapes that the planner takes by itself, truncated SVDs."""
    config = CONFIGS[name].__class__.from_dict(CONFIGS[name].to_dict() | changes)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    if converted:
        rules = rules_of(name)
        if planned:
            rules = {pattern: {"factor": 2} for pattern in rules}
        model = kronbert.convert(model, rules=rules)
    return model.train()


def twins(name: str = "bert", **changes: Any) -> tuple[Any, Any]:
    """A fused model and its ordinary copy."""
    model = a_model(name, **changes)
    return fuse(copy.deepcopy(model)), model


def scores(model: nn.Module, **inputs: Any) -> Tensor:
    return model(**(inputs or INPUTS)).logits


def gradients(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    scores(model, **inputs).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
