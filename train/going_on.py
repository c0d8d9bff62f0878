"""What `--resume` may go on with: a run's own config and data, but for what changes no number.

`config.yaml` of the run says what it was told, `config.yaml` of a stage what that began with, and `data.json`
there which records.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm_vision.config import load_config, save_config
from vlm_vision.errors import DataError
from vlm_vision.files import make_folder
from vlm_vision.train.align_config import AlignConfig, Stage
from vlm_vision.train.checkpoint import find_checkpoint, latest_checkpoint

CONFIG_FILE, DATA_FILE, DONE_FILE = "config.yaml", "data.json", "done.json"

# How a stage is run, where the same is computed.
_FREE = {
    "micro_batch_size",
    "packing",
    "zero_stage",
    "offload",
    "deepspeed",
    "activation_checkpointing",
    "loss_kernel",
    "log_every",
    "save_every",
}
_FREE_OF_DATA = {"workers", "check", "feature_cache", "max_bad_share", "follow_links"}


def begin_run(config: AlignConfig, output: Path, *, resume: bool, is_main: bool) -> None:
    """Check a config against the run that it is to go on with, and keep it as the run's.

    Raises:
        ConfigError: nothing can be written there.
        DataError: without `resume`, a stage that has begun; with it, such a stage, or the model or seed that
            it began with, was told otherwise. Lists all that differs.
    """
    for stage in config.stages:
        if (output / stage.name / DONE_FILE).is_file() and not resume:
            raise DataError(
                f"{output / stage.name} holds a finished stage: use --resume, or another output folder"
            )
        find_checkpoint(output / stage.name / "checkpoints", resume)
    begun = [stage for stage in config.stages if has_begun(output / stage.name)]
    if begun:
        differ = []
        if (output / CONFIG_FILE).is_file():
            run = load_config(AlignConfig, output / CONFIG_FILE)
            differ += _differ("", _of_all(run), _of_all(config))
        for stage in begun:
            kept = load_config(Stage, output / stage.name / CONFIG_FILE)
            differ += _differ(f"{stage.name}.", _of_stage(kept), _of_stage(stage))
        if differ:
            raise DataError(
                f"{output} was begun with another config, so --resume cannot go on with this one:\n"
                + "\n".join(f"  {line}" for line in differ)
                + "\ngive these as they were, or another output folder"
            )
    if is_main:
        make_folder(output)
        save_config(config, output / CONFIG_FILE)


def begin_data(digest: str, folder: Path) -> None:
    """Check the records of a stage against those that it began with, and keep which these are.

    Raises:
        DataError: they are others.
    """
    path = folder / DATA_FILE
    if has_begun(folder) and path.is_file():
        if json.loads(path.read_text(encoding="utf-8"))["digest"] != digest:
            raise DataError(
                f"{folder}: the stage began with other data: its files or their paths have changed since. "
                "Put them back as they were, or give another output folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"digest": digest}) + "\n", encoding="utf-8")


def has_begun(folder: Path) -> bool:
    """Whether a stage has finished, or left a checkpoint that it may go on from."""
    return (folder / DONE_FILE).is_file() or latest_checkpoint(folder / "checkpoints") is not None


def _of_all(config: AlignConfig) -> dict[str, Any]:
    return _flat(config.model_dump(mode="json", exclude={"stages"}))


def _of_stage(stage: Stage) -> dict[str, Any]:
    tree = stage.model_dump(mode="json", exclude={*_FREE, "data"})
    sources = [source.model_dump(mode="json", exclude=_FREE_OF_DATA) for source in stage.sources]
    return _flat({**tree, "data": sources[0] if len(sources) == 1 else sources})


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Values by their dotted path; lists by their places."""
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return {path: tree}
    return {
        key: value
        for name, below in items
        for key, value in _flat(below, f"{path}.{name}" if path else str(name)).items()
    }


def _differ(prefix: str, then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{prefix}{name}: {then.get(name)!r} then, {now.get(name)!r} now"
        for name in then | now
        if then.get(name) != now.get(name)
    ]
