"""Check, before something long begins, that the disk has room for what it will write.

When what is checked: the model that a run begins with, before it is written; when a stage begins, what is still to be
saved in it and all behind it; before a cache is filled, its features beside what the stage saves; and once more what it
saves when its rows, and so its steps, are known. Nobody knows the caches of later stages ahead, or how often those
that count epochs save.
"""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from mllm_vision.recipes.parameters import learning
from mllm_vision.recipes.stages import Stage

_MOMENTS = 8
"""Bytes an optimiser of the Adam kind saves for each trained parameter."""
_MASTER = 4
"""Bytes DeepSpeed saves besides for each trained parameter: a copy in single precision, which it steps."""


def bytes_of(model: nn.Module) -> int:
    """What all weights take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def bytes_to_save(model: nn.Module, arguments: TrainingArguments, steps: int) -> int:
    """Most that a stage takes at one time.

    The next checkpoint is written before the oldest goes; the result, beside a checkpoint, and its copy at the end of
    the run need less. With LoRA, weights that are frozen are not saved.

    Args:
        steps: How often the weights change in the stage.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in trained) if isinstance(model, PeftModel) else bytes_of(model)
    return _most(weights, sum(parameter.numel() for parameter in trained), arguments, steps)


def bytes_in(folder: Path) -> int:
    """What the files in a folder take, 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bytes_ahead(model: PreTrainedModel, stages: Sequence[tuple[Stage, TrainingArguments]]) -> int:
    """Most that stages in a row take at one time: what one of them saves, beside the results of those before it.

    Args:
        model: A host, with methods and without LoRA, whose weights take little: they are not counted.
        stages: With their arguments. One that counts epochs is taken to save once, as nobody knows its steps.
    """
    results, most = 0, 0
    for stage, arguments in stages:
        learns = learning(model, stage.trains)
        count = sum(parameter.numel() for parameter in learns)
        # Where products are in half, what learns is in full.
        trained = sum(p.numel() * (4 if arguments.bf16 or arguments.fp16 else p.element_size()) for p in learns)
        frozen = bytes_of(model) - sum(p.numel() * p.element_size() for p in learns)
        weights = trained if stage.lora is not None else trained + frozen
        most = max(most, results + _most(weights, count, arguments, max(arguments.max_steps, 1)))
        results += weights
    return most


def require_room(folder: Path, needed: int, what: str) -> None:
    """Raise OSError where the disk of ``folder``, which is made, has fewer than ``needed`` bytes.

    Args:
        what: For the message, what takes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free / 1e9:.1f} GB free, but {what} up to {needed / 1e9:.1f} GB more; "
            "choose another output, or keep fewer checkpoints (save_total_limit, save_only_model)",
        )


def _most(weights: int, count: int, arguments: TrainingArguments, steps: int) -> int:
    """Most that a stage takes whose result has so many bytes, and which trains ``count`` parameters."""
    if arguments.save_strategy == "no":
        return 2 * weights
    state = 0 if arguments.save_only_model else _MOMENTS * count
    if state and arguments.deepspeed_plugin is not None:
        state += _MASTER * count + weights  # again, beside those that a person loads
    apart = arguments.save_steps if arguments.save_steps >= 1 else arguments.save_steps * steps  # a share of the steps
    saves = max(1, math.ceil(steps / apart)) if apart > 0 else 1  # every 0 steps: at the end alone
    kept = min(arguments.save_total_limit or steps, saves)
    return max(2 * weights, (weights + state) * (kept + 1))
