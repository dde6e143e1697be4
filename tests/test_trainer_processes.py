"""DistillTrainer on two processes: it trains as one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM

from kronbert.distill.recipes.kroneckerbert import general_objective
from tests.small_trainer import (
    a_model,
    a_trainer,
    logged,
    weights_of,
)

TWO_PROCESSES = """
import json, sys, torch
sys.modules.setdefault("kernels", None)
sys.path[:0] = [{root!r}, {tests!r}]
import small_trainer as t
from transformers import BertForMaskedLM
from kronbert.distill.recipes.kroneckerbert import general_objective

student, teacher = t.a_model(1, BertForMaskedLM), t.a_model(2, BertForMaskedLM)
trainer = t.a_trainer(
    {out!r}, general_objective(mlm=False), model=student, teacher=teacher, max_steps=4,
    optim="sgd", per_device_train_batch_size=4, ddp_backend="gloo", weight_decay=0.1,
    save_strategy="steps", save_steps=4,
)
trainer.train()
if trainer.is_world_process_zero():
    torch.save(student.state_dict(), {out!r} + "/weights.pt")
    with open({out!r} + "/log.json", "w") as file:
        json.dump(t.logged(trainer), file)
# Else gloo's threads may outlive the interpreter: "terminate called without an active exception".
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_like_one(tmp_path):
    """Half the batch each: the same weights, the head untouched, terms averaged over both."""
    out = tmp_path / "two"
    out.mkdir()
    script = tmp_path / "train.py"
    root, tests = (str(Path(__file__).resolve().parents[i]) for i in (1, 0))
    script.write_text(TWO_PROCESSES.format(root=root, tests=tests, out=str(out)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, "--master_addr=127.0.0.1", f"--master_port={port}", str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = a_trainer(
        tmp_path / "one",
        general_objective(mlm=False),
        model=a_model(1, BertForMaskedLM),
        teacher=a_model(2, BertForMaskedLM),
        max_steps=4,
        optim="sgd",
        weight_decay=0.1,
    )
    one.train()
    torch.testing.assert_close(
        torch.load(out / "weights.pt"), weights_of(one.model), rtol=1e-4, atol=1e-6
    )
    for row, other in zip(json.loads((out / "log.json").read_text()), logged(one), strict=True):
        for name in ("loss", "loss_embedding", "loss_scores", "loss_ffn"):
            assert row[name] == pytest.approx(other[name], rel=1e-4), name
