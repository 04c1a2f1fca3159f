"""Authors' checkpoints as folders that `from_pretrained` loads.

A layout, one file in `adapters/originals/`, says whose weight is whose; here files are read, LoRA is merged, every key
is accounted for and the folder is written.

Memory: what the result weighs in its own dtype (7 B parameters in float16: 14 GB), and one matrix in float32. Files are
mapped, so that only merged, cast and grown weights are held by the process itself.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mllm_vision.registry import package_modules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
NOT_LORA = "non_lora_trainables.bin"
RECOMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")
"""Buffers that older checkpoints hold and that every model makes anew."""
LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
DOWNLOADED = ["*.json", "*.model", "*.safetensors", "*.bin"]


@dataclass(frozen=True)
class Original:
    """A checkpoint as its authors left it, LoRA merged.

    Args:
        config: Their `config.json`.
        weights: By their names.
        tokenizer: Folder that has the tokenizer.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    tokenizer: Path


@dataclass(frozen=True)
class Conversion:
    """What a layout makes of an `Original`.

    Args:
        config: Of the result, with the dtype of its weights; it says the class, too.
        processor: Of the result, with the tokenizer.
        weights: By their names.
        names: How each of their names begins, and how ours does instead; of two that fit the first counts.
        summary: What was found in the checkpoint, in a few words.
    """

    config: PreTrainedConfig
    processor: ProcessorMixin
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
    """Write an authors' checkpoint as a folder that `from_pretrained` loads, with processor and tokenizer.

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
    found = layouts()[name].convert(read_original(source, base), tower)
    with whole_folder(out) as folder:
        parameters = write_model(found, folder)
        found.processor.save_pretrained(folder)
    return f"{found.summary}; {parameters:,} parameters in {str(found.config.dtype).removeprefix('torch.')}: {out}"


def read_original(source: str, base: str | None = None) -> Original:
    """The checkpoint in a folder or on the hub; with a LoRA, ``base`` and what was trained beside the LoRA.

    Raises:
        ValueError: the checkpoint or its base is not there, or is not what its files say.
    """
    folder = checkpoint_folder(source, "give a folder or a hub id")
    config = read_json(folder / "config.json")
    if not (folder / "adapter_config.json").is_file():
        if base is not None:
            raise ValueError(f"a base belongs to a LoRA, and {folder} is none: it has no adapter_config.json")
        return Original(config, read_weights(folder), folder)
    settings = read_json(folder / "adapter_config.json")
    named = base or settings.get("base_model_name_or_path") or config.get("_name_or_path") or ""
    below = checkpoint_folder(named, "give the model that the LoRA was trained on as the base, --base DIR")
    if not (folder / NOT_LORA).is_file():
        raise ValueError(f"{folder} has no {NOT_LORA}, which holds the projector of a LoRA checkpoint; get it, too")
    weights = read_weights(below)
    merge_lora(weights, read_tensors(_first_file(folder, ADAPTER)), settings)
    for key, weight in read_tensors(folder / NOT_LORA).items():
        weights[key.removeprefix("base_model.model.")] = weight
    own = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
    return Original(config, weights, folder if own else below)


def checkpoint_folder(name: str, remedy: str) -> Path:
    """The folder called ``name``, or the one that a hub id is downloaded to.

    Raises:
        ValueError: there is neither; the message ends with the ``remedy``.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except (ValueError, OSError) as error:
        raise ValueError(f"{name!r} is no folder here, and not to be had as a hub id; {remedy}") from error


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file says.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}, so it is no checkpoint; check the path")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, whole or in shards; safetensors where there are both.

    Raises:
        ValueError: the folder has no weights, or a file cannot be read.
    """
    file = _first_file(folder, [name for whole in WEIGHTS for name in (f"{whole}.index.json", whole)])
    files = [file]
    if file.suffix == ".json":
        files = [folder / shard for shard in sorted(set(read_json(file)["weight_map"].values()))]
    weights = {key: weight for shard in files for key, weight in read_tensors(shard).items()}
    return {key: weight for key, weight in weights.items() if not RECOMPUTED.search(key)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped where its format allows it.

    Raises:
        ValueError: the file is not there, is damaged or holds anything but tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; get the whole checkpoint")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} is refused: it is damaged, or holds more than tensors and could run code; get it again from "
            "someone you trust, or as safetensors"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(weight, Tensor) for weight in found.values()):
        raise ValueError(f"{path} must hold tensors by name, got {type(found).__name__} with other things in it")
    return found


def _first_file(folder: Path, names: Collection[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} has no weights: expected one of {', '.join(names)}")


def merge_lora(weights: dict[str, Tensor], lora: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Put W + s B A in the place of every W that the LoRA changes; s is alpha / r, or alpha / sqrt(r) if so trained.

    Computed key by key in float32 and rounded once. PEFT would have to be attached to a live model, while these are
    weights under the names of a class that transformers does not have.

    Args:
        weights: Of the base, changed in place.
        lora: A (r, in) and B (out, r) under PEFT's names.
        settings: PEFT's `adapter_config.json`.

    Raises:
        ValueError: an adapter other than plain LoRA, or keys without a counterpart.
    """
    odd = [name for name in ("use_dora", "alpha_pattern", "modules_to_save") if settings.get(name)]
    if settings["peft_type"] != "LORA" or odd:
        raise ValueError(
            f"expected a plain LoRA, got {' '.join([settings['peft_type'], *odd])}; merge it with PEFT first"
        )
    matched = {key: match for key in lora if (match := LORA_KEY.fullmatch(key))}
    changed = {f"{match[1]}.weight": f"base_model.model.{match[1]}.lora_{{}}.weight" for match in matched.values()}
    pairs = [key.format(part) for key in changed.values() for part in "AB"]
    account(
        missing=[*(set(pairs) - lora.keys()), *(changed.keys() - weights.keys())],
        surplus=lora.keys() - matched.keys(),
        what="the LoRA and its base",
    )
    for name, key in changed.items():
        a, b = lora[key.format("A")].float(), lora[key.format("B")].float()
        scale = settings["lora_alpha"] / (len(a) ** 0.5 if settings.get("use_rslora") else len(a))
        weights[name] = torch.addmm(weights[name].float(), b, a, alpha=scale).to(weights[name].dtype)


def account(missing: Collection[str], surplus: Collection[str], what: str) -> None:
    """Raise ValueError where keys are missing or surplus, naming a handful of each."""
    wrong = {"missing": sorted(missing), "surplus": sorted(surplus)}
    parts = [f"{len(keys)} {kind} ({some(keys)})" for kind, keys in wrong.items() if keys]
    if parts:
        raise ValueError(f"the keys of {what} do not fit: {' and '.join(parts)}; is it another layout?")


def some(keys: list[str]) -> str:
    """The first five of ``keys``, for a message."""
    return ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")


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
    wrong = [key for key in expected if found.weights[theirs[key]].shape != expected[key].shape]
    if wrong:
        got, asked = (tuple(weights.shape) for weights in (found.weights[theirs[wrong[0]]], expected[wrong[0]]))
        raise ValueError(
            f"{theirs[wrong[0]]} is {got}, but config.json and the tower ask for {asked}; "
            f"so it is with {len(wrong)} weights"
        )
    return {key: found.weights[theirs[key]].to(weight.dtype) for key, weight in expected.items()}


def write_model(found: Conversion, folder: Path) -> int:
    """Write config, generation config and weights; returns the number of parameters."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(found.config, dtype=found.config.dtype)
    model.load_state_dict(fitted(found, model.state_dict()), assign=True)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def check_empty(out: Path, overwrite: bool) -> None:
    """Raise FileExistsError where ``out`` has something in it that may not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{out} is not empty; choose another folder, or pass overwrite to replace it")
    if not (out / "processor_config.json").is_file():
        raise FileExistsError(f"{out} holds something other than a converted model and is not removed")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` when the block ends, and nothing when it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        yield folder
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
