"""Check, before a run begins, that the disk has room for what it will write."""

from __future__ import annotations

import errno
import math
import shutil
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

_MOMENTS = 8
"""Bytes an optimiser of the Adam kind saves for each trained parameter."""


def bytes_to_save(model: nn.Module, arguments: TrainingArguments, steps: int) -> int:
    """Most that a stage takes at one time.

    The next checkpoint is written before the oldest goes; the result, beside a checkpoint, and its copy at the end of
    the run need less. With LoRA, weights that are frozen are not saved.

    Args:
        steps: How often the weights change in the stage.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trained if isinstance(model, PeftModel) else [*model.parameters(), *model.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    if arguments.save_strategy == "no":
        return 2 * weights
    moments = 0 if arguments.save_only_model else _MOMENTS * sum(parameter.numel() for parameter in trained)
    apart = arguments.save_steps if arguments.save_steps >= 1 else arguments.save_steps * steps  # a share of the steps
    kept = min(arguments.save_total_limit or steps, max(1, math.ceil(steps / apart)))
    return max(2 * weights, (weights + moments) * (kept + 1))


def require_room(folder: Path, model: nn.Module, arguments: TrainingArguments, steps: int) -> None:
    """Raise OSError where the disk of ``folder`` has less room than `bytes_to_save`, of which some may be there."""
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed, free = bytes_to_save(model, arguments, steps) - there, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free / 1e9:.1f} GB free, but checkpoints and model take up to {needed / 1e9:.1f} GB more; "
            "choose another output, or keep fewer checkpoints (save_total_limit, save_only_model)",
        )
