"""Opening models for a job: the class that a checkpoint is of, whatever its config says."""

from transformers import XLMRobertaConfig, XLMRobertaModel

from kronbert.job_models import open_model


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
