"""Beside plain transformers: in fresh processes, with its Trainer, on its hub, without us."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import kronbert
from kronbert import KroneckerLinear
from tests.small_berts import IDS, SMALL


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A student and its folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student")
    teacher = BertForSequenceClassification(BertConfig(**SMALL, hidden_dropout_prob=0.0)).eval()
    student = kronbert.convert(teacher, 4, rules={"re:.*(query|key)": "6:2x24*24x2"})
    student.save_pretrained(folder)
    return student, folder


@pytest.fixture
def python(tmp_path):
    """Runs code in a fresh interpreter, in a folder that is not the repository: stdout, stderr."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    entries = env.get("PYTHONPATH", "").split(os.pathsep)
    env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in entries if entry)

    def run(code, fails=False):
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert fails or done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    return run


ORDERS = {
    "kronbert first": "import kronbert; from transformers import AutoModel",
    "registry first": "import transformers.quantizers.auto, kronbert\n"
    "from transformers import AutoModel",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_loads_in_a_fresh_process(python, saved, order):
    _, folder = saved
    found, _ = python(
        f"{order}\nm = AutoModel.from_pretrained({str(folder)!r})\n"
        "print(type(m.encoder.layer[0].attention.self.query).__name__)"
    )
    assert found == "KroneckerLinear"


def test_without_kronbert_transformers_says_so(python, saved):
    """No crash: transformers names the method it lacks, and lists what it filled at random."""
    _, folder = saved
    found, log = python(
        "from transformers import AutoModel\n"
        f"m = AutoModel.from_pretrained({str(folder)!r})\n"
        "print(type(m.encoder.layer[0].attention.self.query).__name__)"
    )
    assert found == "Linear"
    assert "Unknown quantization type, got kronecker" in log
    assert "MISSING" in log


def test_a_merged_student_needs_no_kronbert(python, saved, tmp_path):
    student, _ = saved
    kronbert.merge(student).save_pretrained(tmp_path / "dense")
    found, log = python(
        "import json, sys, torch\nfrom transformers import AutoModelForSequenceClassification\n"
        "m = AutoModelForSequenceClassification.from_pretrained('dense')\n"
        "assert 'kronbert' not in sys.modules\n"
        "print(json.dumps(m(torch.arange(22).view(2, 11)).logits.tolist()))"
    )
    assert "MISSING" not in log
    logits = torch.tensor(json.loads(found))
    torch.testing.assert_close(logits, student(IDS).logits, rtol=1e-4, atol=1e-5)


def test_without_transformers_the_modules_still_work(python):
    found, _ = python(
        "import sys\nsys.modules['transformers'] = None\nimport kronbert, torch\n"
        "m = kronbert.KroneckerLinear(6, 4, kronbert.KroneckerShape(2, 3, 2, 2))\n"
        "print(m(torch.ones(1, 6)).shape[1])"
    )
    assert found == "4"


def test_the_hook_leaves_the_registry_as_it_was(python):
    """Its source and spec are its own; a reload, ours or the registry's, registers again."""
    found, _ = python(
        "import importlib, inspect, json, kronbert, kronbert.hf_hook as hook, sys\n"
        "import transformers.quantizers.auto as auto\n"
        "ours = [type(auto.__loader__), type(auto.__spec__.loader)]\n"
        "assert not [t for t in ours if t.__module__.startswith('kronbert')], ours\n"
        "assert 'AUTO_QUANTIZER_MAPPING' in inspect.getsource(auto)\n"
        "importlib.reload(auto)\n"
        "assert 'kronecker' in auto.AUTO_QUANTIZER_MAPPING\n"
        "importlib.reload(hook).install()\n"
        "importlib.reload(importlib.import_module('kronbert.hf'))\n"
        "importlib.reload(kronbert)\n"
        "importlib.reload(auto)\n"
        "assert 'kronecker' in auto.AUTO_QUANTIZER_MAPPING\n"
        "print(sum('kronbert' in type(f).__module__ for f in sys.meta_path))"
    )
    assert found == "1"


def test_the_hook_asks_whatever_finders_there_are(python):
    """A frozen application finds modules with a finder of its own, not through the path."""
    found, _ = python(
        "import sys, importlib.machinery as machinery\n"
        "import transformers\n"
        "class Frozen:\n"
        "    asked = []\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        if name.startswith('transformers.quantizers'):\n"
        "            cls.asked.append(name)\n"
        "            return machinery.PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path = [Frozen, *(f for f in sys.meta_path if f is not machinery.PathFinder),\n"
        "                 machinery.PathFinder]\n"
        "import kronbert\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
        "assert 'transformers.quantizers.auto' in Frozen.asked\n"
        "print('kronecker' in known)"
    )
    assert found == "True"


def test_threads_that_import_at_once(python):
    found, _ = python(
        "import importlib, threading, transformers, kronbert\n"
        "names = ['transformers.quantizers.auto', 'kronbert.hf', 'transformers.modeling_utils',\n"
        "         'kronbert.checkpoint'] * 2\n"
        "failed, start = [], threading.Barrier(len(names))\n"
        "def load(name):\n"
        "    start.wait()\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except BaseException as error:\n"
        "        failed.append((name, repr(error)))\n"
        "threads = [threading.Thread(target=load, args=(name,)) for name in names]\n"
        "[t.start() for t in threads]; [t.join(120) for t in threads]\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
        "print(failed, 'kronecker' in known)"
    )
    assert found == "[] True"


def test_nothing_of_a_quantised_model_stays_on_a_loaded_one(saved):
    loaded = kronbert.load(saved[1])
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded, "quantization_method")
    ids = IDS
    assert loaded.half().dtype == torch.float16
    assert loaded.float()(ids).logits.dtype == torch.float32
    assert loaded.to(torch.bfloat16)(ids).logits.dtype == torch.bfloat16
    assert loaded.bert.config is loaded.config


class Rows(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.arange(11 * i, 11 * (i + 1)) % 384
        return {"input_ids": ids, "labels": torch.tensor(i % 2)}


def arguments(folder, **more):
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_steps=2,
        **more,
    )


def test_plain_trainer_trains_saves_and_resumes(saved, tmp_path):
    """A loaded student is an ordinary model: not refused as quantised, resumed bit for bit."""
    _, folder = saved

    def trainer(where, steps):
        return Trainer(
            kronbert.load(folder), arguments(where, max_steps=steps), train_dataset=Rows()
        )

    straight = trainer(tmp_path / "straight", 4)
    before = {n: p.detach().clone() for n, p in straight.model.named_parameters()}
    straight.train()
    moved = {n for n, p in straight.model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if n.endswith((".a", ".b"))} <= moved

    resumed = trainer(tmp_path / "straight", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    for name, parameter in straight.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name

    saved_again = kronbert.load(tmp_path / "straight" / "checkpoint-4")
    assert torch.equal(saved_again(IDS).logits, straight.model.eval()(IDS).logits)


def test_push_to_hub(saved, tmp_path, monkeypatch):
    """Against a hub that is a folder: what is uploaded loads."""
    from huggingface_hub import HfApi

    student, _ = saved
    hub = tmp_path / "hub"
    monkeypatch.chdir(tmp_path)

    class Url(str):
        repo_id = "me/student"

    def upload(self, repo_id, operations, **kwargs):
        for operation in operations:
            target = hub / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(operation.path_or_fileobj, bytes):
                target.write_bytes(operation.path_or_fileobj)
            elif isinstance(operation.path_or_fileobj, str | os.PathLike):
                shutil.copy(operation.path_or_fileobj, target)
            else:
                target.write_bytes(operation.path_or_fileobj.read())

    monkeypatch.setattr(HfApi, "create_repo", lambda *a, **k: Url("https://x/me/student"))
    monkeypatch.setattr(HfApi, "create_branch", lambda *a, **k: None)
    monkeypatch.setattr(HfApi, "create_commit", upload)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card", card_stub, raising=False
    )
    student.push_to_hub("me/student")
    assert torch.equal(kronbert.load(hub / "me/student")(IDS).logits, student(IDS).logits)


def card_stub(*args, **kwargs):
    from huggingface_hub import ModelCard

    return ModelCard("---\ntags: []\n---\n")


def test_pipeline(saved):
    """What the README shows a user: an Auto class, then transformers' own tools."""
    student, folder = saved
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert isinstance(loaded.bert.encoder.layer[0].output.dense, KroneckerLinear)
    assert importlib.util.find_spec("kronbert.hf") is not None
    assert loaded.num_parameters() == student.num_parameters()
    assert loaded.get_memory_footprint() == student.get_memory_footprint()
