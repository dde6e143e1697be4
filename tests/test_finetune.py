"""One stage: batches that do not depend on interruptions, whole checkpoints, scores in row order."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from tiny_task import tiny_tokenizer, tiny_bert, rows_of

from kronbert.distill.data import TaskData, tokenize
from kronbert.distill.finetune import (
    _SeededSampler,
    evaluate,
    labels_only,
    last_checkpoint,
    run_stage,
    use_bf16,
)
