"""A checkpoint as its authors left it: files mapped into memory, LoRA merged into the model it was trained on.

Files that can hold more than tensors are read with ``weights_only=True``, which runs no code of theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
NOT_LORA = "non_lora_trainables.bin"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
RECOMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")
"""Buffers that older checkpoints hold and that every model makes anew."""
OF_LORA = "base_model.model."
LORA_KEY = re.compile(rf"{re.escape(OF_LORA)}(.+)\.lora_[AB]\.weight")
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
        weights[key.removeprefix(OF_LORA)] = weight
    own = any((folder / file).is_file() for file in TOKENIZERS)
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
    kind, odd = settings.get("peft_type"), [name for name in ("use_dora", "alpha_pattern") if settings.get(name)]
    if kind != "LORA" or odd:
        raise ValueError(f"expected a plain LoRA, got {' with '.join([str(kind), *odd])}; merge it with PEFT first")
    matched = {key: match[1] for key in lora if (match := LORA_KEY.fullmatch(key))}
    pairs = {f"{name}.weight": [f"{OF_LORA}{name}.lora_{part}.weight" for part in "AB"] for name in matched.values()}
    account(
        missing={key for pair in pairs.values() for key in pair} - lora.keys() | (pairs.keys() - weights.keys()),
        surplus=lora.keys() - matched.keys(),
        what="the LoRA and its base",
    )
    for name, pair in pairs.items():
        a, b = (lora[key].float() for key in pair)
        scale = settings["lora_alpha"] / (len(a) ** 0.5 if settings.get("use_rslora") else len(a))
        weights[name] = torch.addmm(weights[name].float(), b, a, alpha=scale).to(weights[name].dtype)


def account(missing: Collection[str], surplus: Collection[str], what: str) -> None:
    """Raise ValueError where keys are missing or surplus, naming a handful of each."""
    wrong = []
    for kind, keys in (("missing", sorted(missing)), ("surplus", sorted(surplus))):
        if keys:
            wrong.append(f"{len(keys)} {kind} ({', '.join([*keys[:5], *['...'] * (len(keys) > 5)])})")
    if wrong:
        raise ValueError(f"the keys of {what} do not fit: {' and '.join(wrong)}; is it another layout?")
