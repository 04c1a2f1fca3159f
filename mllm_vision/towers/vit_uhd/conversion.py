"""From a pretrained vision transformer to a ViT-UHD: its layers as they are, its patches and positions resized.

Paper: LLaVA-UHD v3, arXiv 2511.21150 (refined patch embedding); FlexiViT, arXiv 2212.08013 (the rule for the kernel).

Shapes: (rows, columns) of the table of positions, C channels, p and s pixels along a patch before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedModel

from mllm_vision.towers.vit_uhd.authors import from_authors
from mllm_vision.towers.vit_uhd.configuration import ViTUHDConfig
from mllm_vision.towers.vit_uhd.modeling import ViTUHDModel
from mllm_vision.towers.vit_uhd.packing import positions_on

__all__ = ["resized_kernel"]


@dataclass(frozen=True)
class Pretrained:
    """A tower in the terms of a ViT-UHD, before anything is resized.

    Args:
        settings: Of its config, patches, positions and mergers apart.
        kernel: (C, 3, p, p).
        positions: (rows, columns, C).
        layers: The other weights of `ViTUHDModel`.
    """

    settings: dict[str, Any]
    kernel: Tensor
    positions: Tensor
    layers: dict[str, Tensor]


@torch.no_grad()
def converted(
    tower: PreTrainedModel,
    *,
    patch_size: int,
    merger_layers: Sequence[int],
    merger: str = "adaptive",
    position_grid: tuple[int, int] | None = None,
) -> ViTUHDModel:
    """What `ViTUHDModel.from_vit` returns."""
    model_type = getattr(getattr(tower, "config", None), "model_type", type(tower).__name__)
    if model_type not in FAMILIES:
        raise ValueError(
            f"cannot convert a tower of type {model_type!r}; supported are {', '.join(FAMILIES)} (of a model that "
            "reads text, too, pass the vision part)"
        )
    source = FAMILIES[model_type](tower)
    before = source.kernel.shape[-1]
    rows, columns = position_grid or (max(1, round(n * before / patch_size)) for n in source.positions.shape[:2])
    config = ViTUHDConfig(
        **source.settings,
        patch_size=patch_size,
        position_grid=(rows, columns),
        merger_layers=merger_layers,
        merger=merger,
    )
    weights = source.layers | {
        "patch_embedding.weight": resized_kernel(source.kernel, patch_size).flatten(1),
        "position_embedding": positions_on(source.positions, [(rows, columns)]).unflatten(0, (rows, columns)),
    }
    model = ViTUHDModel(config).to(tower.device, tower.dtype)
    fresh = {name: weight for name, weight in model.state_dict().items() if ".merger." in name}
    model.load_state_dict(fresh | weights)
    return model.train(tower.training)


def resized_kernel(kernel: Tensor, side: int) -> Tensor:
    """A kernel (C, 3, p, p) for patches of ``side`` s pixels, (C, 3, s, s), that makes the same of a resized patch.

    With R the (s, p) matrix that resizes a line bilinearly, a patch x becomes R x R^T. The kernel w that gives the same
    products is solved for with the pseudo-inverse of R^T: exact where s >= p, else the least-squares solution.
    """
    before = kernel.shape[-1]
    line = torch.eye(before, dtype=torch.float64, device=kernel.device)  # every pixel by itself
    resize = interpolate(line[:, None, None], size=(1, side), mode="bilinear", antialias=True)[:, 0, 0].T
    solve = torch.linalg.pinv(resize.T)  # (s, p)
    return (solve @ kernel.double() @ solve.T).to(kernel.dtype)


def _siglip(tower: PreTrainedModel) -> Pretrained:
    config, weights = tower.config, _without_prefix(tower)
    kernel = weights.pop("embeddings.patch_embedding.weight")
    if kernel.dim() == 2:  # SigLIP 2 embeds patches as rows of (p, p, 3)
        kernel = kernel.unflatten(1, (config.patch_size, config.patch_size, 3)).permute(0, 3, 1, 2)
    positions = _on_square(weights.pop("embeddings.position_embedding.weight"))
    layers = {"patch_embedding.bias": weights["embeddings.patch_embedding.bias"]} | {
        name.removeprefix("encoder."): weight
        for name, weight in weights.items()
        if name.startswith(("encoder.", "post_layernorm."))
    }
    return Pretrained(_settings(config) | dict(rotary_theta=None), kernel, positions, layers)


def _clip(tower: PreTrainedModel) -> Pretrained:
    config, weights = tower.config, _without_prefix(tower)
    kernel = weights["embeddings.patch_embedding.weight"]
    positions = _on_square(weights["embeddings.position_embedding.weight"][1:])  # the first is that of CLS
    layers = {"patch_embedding.bias": kernel.new_zeros(len(kernel))} | {
        name.removeprefix("encoder.").replace("pre_layrnorm", "pre_layernorm"): weight
        for name, weight in weights.items()
        if name.startswith(("encoder.", "pre_layrnorm."))
    }
    settings = _settings(config) | dict(rotary_theta=None, pre_norm=True, post_norm=False)
    return Pretrained(settings, kernel, positions, layers)


def _moonvit(tower: PreTrainedModel) -> Pretrained:
    theirs = from_authors(tower.state_dict(), heads=tower.config.num_attention_heads)
    return _uhd_parts(theirs.config, theirs.weights)


def _vit_uhd(tower: PreTrainedModel) -> Pretrained:
    return _uhd_parts(tower.config, tower.state_dict())


FAMILIES: dict[str, Callable[[PreTrainedModel], Pretrained]] = {
    "siglip_vision_model": _siglip,
    "siglip2_vision_model": _siglip,
    "clip_vision_model": _clip,
    "moonvit": _moonvit,
    "vit_uhd": _vit_uhd,
}


def _uhd_parts(config: ViTUHDConfig, weights: dict[str, Tensor]) -> Pretrained:
    if config.merger_layers:
        raise ValueError(
            f"the tower merges tokens already, after layers {config.merger_layers}; convert the one that it came from"
        )
    kernel = weights["patch_embedding.weight"].unflatten(1, (3, config.patch_size, config.patch_size))
    layers = {n: w for n, w in weights.items() if n not in ("patch_embedding.weight", "position_embedding")}
    own = {name: getattr(config, name) for name in ("pre_norm", "post_norm", "rotary_theta", "rotary_units")}
    return Pretrained(_settings(config) | own, kernel, weights["position_embedding"], layers)


def _settings(config: Any) -> dict[str, Any]:
    """The settings that every family gives the same name."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(config, name) for name in (*names, "hidden_act", "layer_norm_eps")}


def _without_prefix(tower: PreTrainedModel) -> dict[str, Tensor]:
    """The weights by their names inside the vision part, which some classes wrap once more."""
    return {name.removeprefix("vision_model."): weight for name, weight in tower.state_dict().items()}


def _on_square(positions: Tensor) -> Tensor:
    """Rows of a table (P, C) on the square grid that they stand for."""
    side = round(len(positions) ** 0.5)
    if side * side != len(positions):
        raise ValueError(f"expected positions of a square grid, got {len(positions)} of them")
    return positions.unflatten(0, (side, side))
