"""Authors' checkpoints as folders that `from_pretrained` loads.

A layout, one file in `adapters/originals/`, says what class the result is of and which weight is which; here every key
is accounted for and the folder is written.

Memory: what the result weighs in its own dtype (7 B parameters in float16: 14 GB), and one matrix in float32. Files are
mapped, so that only merged, cast and grown weights are held by the process itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mllm_vision.auto import slotted_config
from mllm_vision.folders import check_empty, whole_folder
from mllm_vision.host import adapter_for
from mllm_vision.original import account, read_original
from mllm_vision.registry import MethodConfig, package_modules
from mllm_vision.slots import stored

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig, ProcessorMixin


@dataclass(frozen=True)
class Conversion:
    """What a layout makes of an `Original`.

    Args:
        config: Of the result, with the dtype of its weights; it says the class, too.
        processor: Of the result, with the tokenizer; of a tower by itself, its image processor.
        weights: By their names, or by ours where a layout has made them.
        names: How their names begin, and how ours do instead; the first that fits counts, and what none fits stays.
        summary: What was found in the checkpoint, in a few words.
    """

    config: PreTrainedConfig
    processor: ProcessorMixin | BaseImageProcessor
    weights: dict[str, Tensor]
    names: dict[str, str]
    summary: str


def layouts() -> dict[str, ModuleType]:
    """Every authors' layout that is known, by its name."""
    modules = package_modules("mllm_vision.adapters.originals")
    return {module.__name__.rpartition(".")[2].replace("_", "-"): module for module in modules}


def convert(
    name: str,
    source: str,
    out: str | Path,
    *,
    base: str | None = None,
    tower: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write an authors' checkpoint as a folder that `from_pretrained` loads, with its processor.

    Args:
        name: The layout, a name in `layouts`.
        source: Their checkpoint, a folder or hub id: merged shards, or LoRA with `non_lora_trainables.bin`.
        out: Folder to write; there is either all of it or nothing.
        base: The model that the LoRA was trained on, a folder or hub id; else what the LoRA names.
        tower: The vision tower, a folder or hub id; else what `config.json` names.
        overwrite: Replace a model that is in ``out``.

    Returns:
        One line that says what was converted.

    Raises:
        ValueError: an unknown layout, a checkpoint that is not of it, keys that are missing or surplus, weights of
            another shape, or a file that holds more than tensors.
        FileExistsError: there is something in ``out``.
    """
    out = Path(out)
    if name not in layouts():
        raise ValueError(f"unknown layout {name!r}; there are {', '.join(sorted(layouts()))}")
    check_empty(out, overwrite)
    if Path(source).exists() and out.resolve() == Path(source).resolve():
        raise FileExistsError(f"{out} is the checkpoint itself; choose another folder")
    found = layouts()[name].convert(read_original(source, base), tower)
    with whole_folder(out) as folder:
        parameters = write_model(found, folder)
        found.processor.save_pretrained(folder)
    return f"{found.summary}; {parameters:,} parameters in {str(found.config.dtype).removeprefix('torch.')}: {out}"


def renamed(key: str, names: Mapping[str, str]) -> str:
    """A name with another beginning: that of the first of ``names`` that it begins with."""
    return next((ours + key.removeprefix(theirs) for theirs, ours in names.items() if key.startswith(theirs)), key)


def with_rows(weight: Tensor, rows: int) -> Tensor:
    """An embedding or output matrix (V, D) with rows added up to (``rows``, D); nothing where it has as many.

    New rows are the mean of the old: a token that nobody trained is then never the most likely one.
    """
    if rows <= len(weight):
        return weight
    mean = weight.mean(dim=0, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def plugged(config: PreTrainedConfig, method: MethodConfig) -> PreTrainedConfig:
    """The config of the same model with a method plugged in."""
    slotted = slotted_config(adapter_for(config))
    return slotted.from_dict(config.to_dict() | {"model_type": slotted.model_type, "mllm_vision": stored([method])})


def fitted(found: Conversion, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under our names, in the dtypes of ``expected``, whose names and shapes they must have.

    Raises:
        ValueError: keys are missing or surplus, or a weight is of another shape; named as in their checkpoint.
    """
    theirs = {renamed(key, found.names): key for key in found.weights}
    back = {ours: key for key, ours in found.names.items()}
    account(
        missing=[renamed(key, back) for key in expected.keys() - theirs.keys()],
        surplus=[theirs[key] for key in theirs.keys() - expected.keys()],
        what="the checkpoint",
    )
    weights = {}
    for key, place in expected.items():
        weight = found.weights[theirs[key]]
        if weight.shape != place.shape:
            got, asked = tuple(weight.shape), tuple(place.shape)
            raise ValueError(f"{theirs[key]} is {got}, but with this config.json and this tower it must be {asked}")
        weights[key] = weight.to(place.dtype)
    return weights


def write_model(found: Conversion, folder: Path) -> int:
    """Write config, generation config and weights; returns the number of parameters."""
    from transformers import AutoModel, AutoModelForImageTextToText, ProcessorMixin

    auto = AutoModelForImageTextToText if isinstance(found.processor, ProcessorMixin) else AutoModel
    with torch.device("meta"):
        model = auto.from_config(found.config, dtype=found.config.dtype)
    model.load_state_dict(fitted(found, model.state_dict()), assign=True)
    model.tie_weights()  # what was tied has been assigned twice
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
