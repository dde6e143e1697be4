"""The report of a job: of models of few positions, and in every locale."""

import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, RobertaConfig, RobertaModel

from kronbert.job import compress
from kronbert.job_folder import write_whole
from tests.job_runs import settings_for

pytestmark = pytest.mark.usefixtures("one_thread", "hurried_report")


def test_a_model_of_few_positions_is_reported(tiny_bert, tiny_task, tmp_path):
    """RoBERTa counts its positions from the padding index on."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=18, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = settings_for(tmp_path / "model", tiny_task, tmp_path / "out", factor=2.0)
    compress(settings, lambda _: None)
    assert (tmp_path / "out" / "report.md").is_file()


def test_a_report_in_letters_that_the_locale_lacks(tmp_path):
    write_whole(tmp_path / "report.md", "97 ± 1 %")
    assert (tmp_path / "report.md").read_bytes() == "97 ± 1 %".encode()
    code = (
        "import sys; from kronbert.job_folder import write_whole as w; from pathlib import Path\n"
    )
    code += "w(Path(sys.argv[1]), '97 \\xb1 1 %')"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "other.md"], env=plain, check=True)
    assert (tmp_path / "other.md").read_text(encoding="utf-8") == "97 ± 1 %"
