"""Whether what a run will write has room, before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

_MOMENTS = 8
"""Bytes an optimiser of the Adam kind saves for each trained parameter."""


def bytes_to_save(model: nn.Module, arguments: TrainingArguments) -> int:
    """Most that the checkpoints of a stage and its result take at one time.

    The next checkpoint is written before the oldest goes. With LoRA, weights that are frozen are not saved.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trained if isinstance(model, PeftModel) else [*model.parameters(), *model.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    moments = 0 if arguments.save_only_model else _MOMENTS * sum(parameter.numel() for parameter in trained)
    if arguments.save_strategy == "no":
        return weights
    kept = arguments.save_total_limit
    if kept is None:
        kept = max(1, int(arguments.max_steps // arguments.save_steps)) if arguments.save_steps >= 1 else 1
    return weights + (weights + moments) * (kept + 1)


def require_room(folder: Path, model: nn.Module, arguments: TrainingArguments) -> None:
    """Raise OSError where the disk of ``folder`` has less room than `bytes_to_save`."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = bytes_to_save(model, arguments), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, but checkpoints and model take up to {needed / 1e9:.1f} GB; "
            "choose another output, or keep fewer checkpoints (save_total_limit, save_only_model)"
        )
