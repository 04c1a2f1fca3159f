"""Checkpoints of LLaVA-SP: those of LLaVA-1.5 with the spatial branch beside the projector.

Code: github.com/CnFaker/LLaVA-SP @ 24d8a8f (Apache-2.0), llava/model/llava_arch.py.

The branch is ``model.conv_*`` and ``model.*_projector.*``; the variant, which their source sets, follows from it.
"""

from __future__ import annotations

from dataclasses import replace

from mllm_vision.adapters.llava import tile_grid
from mllm_vision.adapters.originals import llava
from mllm_vision.convert import Conversion, plugged
from mllm_vision.original import Original
from mllm_vision.projectors.spatial_tokens import from_authors, scale_sizes

LLAVA = (
    "model.vision_tower.",
    "model.embed_tokens.",
    "model.layers.",
    "model.norm.",
    "model.image_newline",
    "lm_head.",
)
SLOT = "vision_slots.projector."


def convert(original: Original, tower: str | None) -> Conversion:
    """LLaVA with spatial tokens plugged in.

    Raises:
        ValueError: a checkpoint of another layout, or one that the stock model cannot hold.
    """
    projectors = {key: weight for key, weight in original.weights.items() if not key.startswith(LLAVA)}
    if not any(key.startswith("model.conv_") for key in projectors):
        raise ValueError("the checkpoint has no spatial branch (model.conv_4.weight, ...); is its layout llava?")
    spatial = {key for key in projectors if not key.startswith("model.mm_projector.")}
    weights = {key: weight for key, weight in original.weights.items() if key not in spatial}
    found = llava.convert(replace(original, weights=weights), tower)
    side, _ = tile_grid(found.config)
    theirs = from_authors({key.removeprefix("model."): weight for key, weight in projectors.items()}, side)
    sizes = ", ".join(str(side) for side, _ in scale_sizes(theirs.grid, theirs.config.scales))
    grid = " x ".join(map(str, theirs.grid))
    return replace(
        found,
        config=plugged(found.config, theirs.config),
        weights=found.weights | {SLOT + name: weight for name, weight in theirs.spatial.items()},
        summary=f"{found.summary}; spatial tokens by {theirs.config.variant} at scales {sizes} of a {grid} grid, "
        f"{theirs.config.channels} channels",
    )
