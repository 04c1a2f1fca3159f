"""The checkpoints of a stage, from which a run that was killed goes on: those that were written to their end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def checkpoints_of(done: Path) -> Path:
    """Folder of the checkpoints of the stage whose result will be ``done``."""
    return done.with_name(f"{done.name}.checkpoints")


def latest_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in ``folder`` that is whole, None where there is none."""
    whole = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _is_whole(path)]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def drop_broken(folder: Path) -> None:
    """Delete checkpoints whose writing was cut off, lest their files be mixed with those of the next attempt."""
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not _is_whole(path):
            shutil.rmtree(path)


def _is_whole(checkpoint: Path) -> bool:
    """Whether all of a checkpoint was written: the trainer's state is the last of it."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True
