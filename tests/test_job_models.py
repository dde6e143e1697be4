"""Jobs' settings, and opening their models: the class of a checkpoint, whatever its config says."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from transformers import XLMRobertaConfig, XLMRobertaModel

from kronbert.job_models import open_model
from kronbert.job_settings import CompressSettings
from kronbert.pretrain import PretrainSettings


def test_an_encoder_whose_head_names_the_tied_table_first(tmp_path):
    """XLM-R's has it before the body: no weight of the head's own."""
    config = XLMRobertaConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    other = XLMRobertaModel(config)
    other.config.architectures = ["XLMRobertaForMaskedLM"]
    other.save_pretrained(tmp_path / "other")
    other.config.save_pretrained(tmp_path / "other")
    assert type(open_model(str(tmp_path / "other"))) is XLMRobertaModel


def test_settings_may_hold_paths():
    text = {"model": "m", "output": os.path.join("a folder", "out"), "factor": 8}
    paths = {**text, "output": Path("a folder") / "out"}
    assert CompressSettings(**paths, task=Path("own")) == CompressSettings(**text, task="own")
    found = PretrainSettings(**paths, text=Path("wiki.txt"))
    assert found == PretrainSettings(**text, text="wiki.txt")
    assert json.loads(json.dumps(asdict(found)))["text"] == "wiki.txt"
