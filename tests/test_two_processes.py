"""One stage in two processes: one of them removes what is left, and both end alike."""

import json
import socket

import pytest
import torch

from tests.processes import run_two

WORKER = """
import json, shutil, sys
from pathlib import Path
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from kronbert.distill import Stage
from kronbert.distill.data import load_folder, tokenize
from kronbert.distill.finetune import labels_only, run_stage

model, task, folder, rank = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(1)
removed, remove = [], shutil.rmtree
shutil.rmtree = lambda path, *a, **k: (removed.append(Path(path).name), remove(path, *a, **k))
tokenizer = AutoTokenizer.from_pretrained(model)
rows = tokenize(load_folder(task), tokenizer)
stage = Stage(name="teacher", objective=labels_only(), learning_rate=1e-3, epochs=1, batch_size=64)
student = AutoModelForSequenceClassification.from_pretrained(model)
run_stage(student, None, stage, rows, Path(folder) / "run", tokenizer=tokenizer,
          precision="fp32", checkpoints=2, disable_tqdm=True)
torch.save(student.state_dict(), f"{folder}/{rank}.pt")
Path(folder, f"{rank}.json").write_text(json.dumps(removed))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_one_of_two_processes_removes_the_checkpoints(tiny_bert, tiny_task, tmp_path):
    cut_off = tmp_path / "run" / "checkpoint-7"
    cut_off.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_two(
        WORKER, tmp_path, [tiny_bert, tiny_task, tmp_path], MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), WORLD_SIZE="2", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    removed = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert removed == [["checkpoint-7", "checkpoint-2", "checkpoint-4"], []]
    assert not any((tmp_path / "run").glob("checkpoint-*"))
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
