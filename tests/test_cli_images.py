"""`kronbert convert` of a model of images: what prepares its inputs travels with the student."""

import json

import pytest
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

import kronbert
from kronbert import cli

SETTINGS = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "vit"
    config = ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=4,
                       intermediate_size=96, image_size=32, patch_size=8)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return folder


def test_settings_of_images_are_copied(model, tmp_path):
    asked = ["convert", str(model), "--factor", "2", "--output", str(tmp_path / "student")]
    result = CliRunner().invoke(cli.app, asked)
    assert result.exit_code == 0, result.output
    assert "no tokenizer" not in result.output
    copied = tmp_path / "student" / "preprocessor_config.json"
    assert json.loads(copied.read_text()) == SETTINGS
    assert isinstance(kronbert.load(tmp_path / "student"), ViTForImageClassification)
