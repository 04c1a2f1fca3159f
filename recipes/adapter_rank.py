"""Reduce the rank of a LoRA adapter: a truncated SVD of every update s B A.

So one trains at a high rank and publishes a low one, a few MB instead of tens. The truncated SVD is the best
approximation of its rank (Eckart and Young, Psychometrika 1, 1936).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from mllm_vision.folders import check_empty, whole_folder

A, B = ".lora_A.weight", ".lora_B.weight"
PLAIN_STARTS = (True, False, "gaussian")
"""`init_lora_weights` that leave the base as it is."""
FREE = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_version",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
)
"""Settings of PEFT under which a layer's update is s B A, whatever they say."""


def reduce_rank(
    adapter: str | Path, out: str | Path, rank: int | None = None, dtype: torch.dtype | None = None
) -> float:
    """Write an adapter folder with LoRA of at most ``rank``, and with everything else that was in it.

    Args:
        adapter: Folder that `mllm_vision.adapter_folder.save_adapter` wrote, or PEFT.
        out: Folder to write; there is either all of it or nothing.
        rank: Of every layer; None keeps what there is.
        dtype: Of all weights, None as they are; those trained in full are rounded as well.

    Returns:
        How much of the updates is kept: the share of the sum of their squared singular values, in [0, 1].

    Raises:
        ValueError: a rank less than 1, or an adapter whose updates are not s B A, as DoRA's.
        FileExistsError: there is something in ``out``.
    """
    adapter, out = Path(adapter), Path(out)
    check_empty(out, overwrite=False)
    config = json.loads((adapter / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    weights = load_file(adapter / ADAPTER_SAFE_WEIGHTS_NAME)
    with safe_open(adapter / ADAPTER_SAFE_WEIGHTS_NAME, framework="pt") as file:
        header = file.metadata()
    kept = 1.0
    if rank is not None:
        require_plain(config)
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        kept = _reduce(weights, scale, rank)
        r = max(len(weight) for name, weight in weights.items() if name.endswith(A))
        config |= {"r": r, "lora_alpha": r, "use_rslora": False}
    if dtype is not None:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    replaced = shutil.ignore_patterns(ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
    with whole_folder(out) as folder:
        shutil.copytree(adapter, folder, ignore=replaced, dirs_exist_ok=True)
        save_file(weights, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata=header)
        (folder / ADAPTER_CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return kept


def require_plain(config: Mapping[str, Any]) -> None:
    """Raise ValueError where a layer's update is not s B A with one s for all.

    Args:
        config: Of PEFT, as `adapter_config.json` stores it.
    """
    from peft import LoraConfig

    plain = LoraConfig().to_dict()
    others = {name: value for name, value in config.items() if name not in FREE and value and value != plain.get(name)}
    if config["init_lora_weights"] not in PLAIN_STARTS:
        others["init_lora_weights"] = config["init_lora_weights"]
    if others:
        said = ", ".join(f"{name}={value!r}" for name, value in others.items())
        raise ValueError(f"the rank of plain LoRA alone can be reduced, and this adapter has {said}")


def _reduce(weights: dict[str, Tensor], scale: float, rank: int) -> float:
    """Replace every pair A (r, inputs) and B (outputs, r) by one of at most ``rank`` and scale 1; the share kept."""
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, got {rank}")
    kept = total = 0.0
    for layer in [name.removesuffix(A) for name in weights if name.endswith(A)]:
        a, b = weights[layer + A], weights[layer + B]
        # With B = Q R and A^T = Q' R', the singular values of B A are those of the small matrix R R'^T.
        (left, outer), (right, inner) = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
        u, values, v = torch.linalg.svd(scale * outer @ inner.T)
        n = min(rank, len(a))
        root = values[:n].sqrt()  # to both sides alike, which half precision takes better
        weights[layer + A] = (root[:, None] * (right @ v[:n].T).T).to(a.dtype).contiguous()
        weights[layer + B] = (left @ u[:, :n] * root).to(b.dtype).contiguous()
        squares = values.square()
        kept, total = kept + squares[:n].sum().item(), total + squares.sum().item()
    return kept / total if total else 1.0
