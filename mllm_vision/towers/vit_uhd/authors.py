"""The authors' checkpoints of ViT-UHD, and those of MoonViT, which have the same layout without mergers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm_vision.towers.vit_uhd.configuration import ViTUHDConfig
from mllm_vision.towers.vit_uhd.modeling import ViTUHDModel

__all__ = ["AuthorsTower", "from_authors"]

logger = logging.getLogger(__name__)

PREFIX = "vision_tower.vision_tower."
UNREAD = re.compile(r"encoder\.blocks\.\d+\.merger\.(zero_init_fc\.weight|attn_layer\.2\.bias)")
"""Weights without effect: nothing reads the first, and a softmax takes the second away again."""

LAYER = {
    "norm0.{}": ("layer_norm1.{}",),
    "wqkv.{}": ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}"),
    "wo.{}": ("self_attn.out_proj.{}",),
    "norm1.{}": ("layer_norm2.{}",),
    "mlp.fc0.{}": ("mlp.fc1.{}",),
    "mlp.fc1.{}": ("mlp.fc2.{}",),
}
ADAPTIVE = {
    "merger.attn_layer.0.weight": "merger.hidden.weight",
    "merger.attn_layer.0.bias": "merger.hidden.bias",
    "merger.attn_layer.2.weight": "merger.score.weight",
}


@dataclass(frozen=True)
class AuthorsTower:
    """What a checkpoint of the authors holds.

    Args:
        config: The settings it was trained with.
        weights: State dict of `ViTUHDModel`.
    """

    config: ViTUHDConfig
    weights: dict[str, Tensor]


def from_authors(weights: Mapping[str, Tensor], *, heads: int = 16) -> AuthorsTower:
    """The authors' weights under our names; the settings follow from them, but for the number of heads.

    Args:
        weights: All of a tower and nothing else, under the authors' names, bare or behind `PREFIX`.
        heads: Attention heads (MoonViT and the authors: 16).

    Raises:
        ValueError: keys are missing or surplus, or a weight is of another shape than the others ask for.
    """
    if all(name.startswith(PREFIX) for name in weights):
        weights = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    unread = sorted(name for name in weights if UNREAD.fullmatch(name))
    blocks = {int(m[1]) for m in (re.match(r"encoder\.blocks\.(\d+)\.", name) for name in weights) if m}
    mergers = {int(m[1]) for m in (re.match(r"encoder\.blocks\.(\d+)\.merger\.", name) for name in weights) if m}
    adaptive = any(".merger.attn_layer." in name for name in weights)
    names = authors_names(max(blocks, default=-1) + 1, mergers if adaptive else set())
    if weights.keys() - unread != names.keys():
        missing, surplus = names.keys() - weights.keys(), weights.keys() - unread - names.keys()
        raise ValueError(
            f"not the weights of a tower: missing are {', '.join(sorted(missing)) or 'none'}, surplus are "
            f"{', '.join(sorted(surplus)) or 'none'}; names are bare or begin with {PREFIX}"
        )
    position = weights["patch_embed.pos_emb.weight"]
    config = ViTUHDConfig(
        hidden_size=position.shape[-1],
        intermediate_size=len(weights["encoder.blocks.0.mlp.fc0.weight"]),
        num_hidden_layers=max(blocks) + 1,
        num_attention_heads=heads,
        patch_size=weights["patch_embed.proj.weight"].shape[-1],
        position_grid=position.shape[:2],
        merger_layers=sorted(mergers),
        merger="adaptive" if adaptive else "average",
        rotary_units="tokens" if mergers else "patches",
    )
    with torch.device("meta"):
        expected = ViTUHDModel(config).state_dict()
    ours: dict[str, Tensor] = {}
    for theirs, parts in names.items():
        weight = weights[theirs].flatten(1) if theirs == "patch_embed.proj.weight" else weights[theirs]
        shapes = [expected[part].shape for part in parts]
        if weight.shape != (sum(shape[0] for shape in shapes), *shapes[0][1:]):
            raise ValueError(f"{theirs} has another size than the other weights: {tuple(weights[theirs].shape)}")
        ours |= zip(parts, weight.split([shape[0] for shape in shapes]), strict=True)
    if unread:
        logger.warning("left out %d weights that have no effect: %s", len(unread), ", ".join(unread))
    return AuthorsTower(config, ours)


def authors_names(layers: int, adaptive_mergers: set[int]) -> dict[str, tuple[str, ...]]:
    """Our name of each of the authors' weights, or our names where they keep several in one, those unread apart."""
    names: dict[str, tuple[str, ...]] = {
        "patch_embed.proj.weight": ("patch_embedding.weight",),
        "patch_embed.proj.bias": ("patch_embedding.bias",),
        "patch_embed.pos_emb.weight": ("position_embedding",),
        "encoder.final_layernorm.weight": ("post_layernorm.weight",),
        "encoder.final_layernorm.bias": ("post_layernorm.bias",),
    }
    for layer in range(layers):
        for theirs, ours in LAYER.items():
            for part in ("weight", "bias"):
                names[f"encoder.blocks.{layer}.{theirs.format(part)}"] = tuple(
                    f"layers.{layer}.{name.format(part)}" for name in ours
                )
    for layer in adaptive_mergers:
        names |= {f"encoder.blocks.{layer}.{theirs}": (f"layers.{layer}.{ours}",) for theirs, ours in ADAPTIVE.items()}
    return names
