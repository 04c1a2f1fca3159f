"""From images to the tokens that enter the prompt: tower, projector, operations, for a whole batch.

Shapes: image i has T_i tiles of (H_i, W_i) patches, P_i in all, S_i placeholders, n_i tokens in the prompt; C channels
of the tower, D of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from transformers import PreTrainedModel

from mllm_vision.host import Encoded, Layout, adapter_for, find_host, images_by_grid
from mllm_vision.operations import Projection
from mllm_vision.slots import Slots, compute_device
from mllm_vision.tap import listen
from mllm_vision.tokens import Evidence, VisualTokens


@dataclass(frozen=True)
class ImageTokens:
    """What goes into the prompt for one image.

    Args:
        features: (n, D).
        slots: (n,) ascending, the placeholder that each token stands on.
        placeholders: S, how many the processor wrote.
        on_patches: the tokens on patches after the last operation, as a batch of one.
        added: how many tokens, the first ones, were added to those of the image; they stand on its first placeholder.
    """

    features: Tensor
    slots: Tensor
    placeholders: int
    on_patches: VisualTokens
    added: int

    def with_placeholders(self, more: int) -> ImageTokens:
        """As if the processor had written ``more`` placeholders ahead of the others, for the added tokens."""
        own = torch.arange(self.added, device=self.slots.device) * more // max(1, self.added)
        slots = torch.cat([own, self.slots[self.added :] + more])
        return replace(self, slots=slots, placeholders=self.placeholders + more)


@dataclass(frozen=True)
class SeenImages:
    """The images of a batch after tower and projector, before the operations.

    Args:
        model: The host.
        slots: What is plugged into it.
        images: Its inputs that describe the images.
        layouts: How each image stands in the prompt under the stock host.
        places: The placeholder of each patch of the grid that an image was seen on, -1 where there is none.
        encoded: What tower and projector made of each image.
        added: The tokens added to each image, (T * count, D).
        groups: Images of one layout: their numbers, and their tokens (B, N, D) with all evidence.
    """

    model: PreTrainedModel
    slots: Slots
    images: dict[str, Any]
    layouts: Sequence[Layout]
    places: Sequence[Tensor]
    encoded: Sequence[Encoded]
    added: Sequence[Tensor]
    groups: Sequence[tuple[Sequence[int], VisualTokens]]

    @property
    def pixels(self) -> Tensor:
        """The pixels, as the processor lays them out for this host."""
        return self.images[adapter_for(self.model.config).image_inputs[0]]

    def noise(self, seed: int) -> Tensor:
        """Normal noise for the pixels, image by image from generators with that seed, so that a batch is its images."""
        return adapter_for(self.model.config).noise(self.model, self.images, seed).to(self.pixels.device)

    def reduced(self) -> list[ImageTokens]:
        """What the prompt gets of each image: tokens added, those that the operations leave, and those on no patch."""
        out: dict[int, ImageTokens] = {}
        for members, tokens in self.groups:
            for operation in self.slots.operations:
                tokens = operation(tokens)
            for row, i in enumerate(members):
                image = tokens.image(row)
                out[i] = _in_prompt(image, self.added[i], self.places[i], self.encoded[i], self.layouts[i])
        return [out[i] for i in range(len(self.layouts))]

    def only(self, operation: Callable[[VisualTokens], VisualTokens]) -> list[ImageTokens]:
        """Of each image nothing but the tokens that ``operation`` leaves of all those on patches.

        They stand in the order it gives them, or in raster order where the host keeps positions.
        """
        keeps_positions = adapter_for(self.model.config).keeps_positions
        out: dict[int, ImageTokens] = {}
        for members, tokens in self.groups:
            left = operation(tokens)
            for row, i in enumerate(members):
                image = left.image(row)
                slots, raster = self.places[i].to(image.patch_index.device)[image.patch_index[0]].sort()
                features = image.features[0][raster] if keeps_positions else image.features[0]
                out[i] = ImageTokens(features, slots, len(self.layouts[i].patch), image, added=0)
        return [out[i] for i in range(len(self.layouts))]

    def again(self, pixels: Tensor) -> list[ImageTokens]:
        """What the prompt would get of the same images with other ``pixels``."""
        name = adapter_for(self.model.config).image_inputs[0]
        return encode_images(self.model, self.slots, {**self.images, name: pixels})


def see_images(
    model: PreTrainedModel, slots: Slots, images: dict[str, Any], requests: Sequence[Evidence] = ()
) -> SeenImages:
    """Every image of a batch through tower and projector, with the evidence of the operations and ``requests``."""
    model = find_host(model)  # which PEFT may wrap
    adapter = adapter_for(model.config)
    layouts = adapter.layouts(model, images)
    grids = [slots.grid(layout.grid, layout.tiles) for layout in layouts]
    asked = list(dict.fromkeys([*slots.requests, *requests]))
    with listen(adapter.tower(model), asked) as recording:
        encoded = adapter.encode(model, images, layouts, grids)
    evidence = {request: adapter.by_patch(model, recording[request], images, grids) for request in asked}
    seen_on = grids
    if slots.projection is not None:
        encoded, grids = _projected(slots.projection, encoded, seen_on), [slots.projection.grid(g) for g in seen_on]
        for request, maps in evidence.items():
            on = zip(maps, layouts, seen_on, grids, strict=True)
            evidence[request] = [on_grid(m.view(x.tiles, -1, 1), old, new).flatten() for m, x, old, new in on]
    added = _added(slots, encoded, seen_on)

    places = [layout.place_on(grid) for layout, grid in zip(layouts, grids, strict=True)]
    members: dict[tuple[Any, ...], list[int]] = {}
    for i, (grid, place) in enumerate(zip(grids, places, strict=True)):
        members.setdefault((grid, tuple(place.tolist())), []).append(i)
    groups = []
    for group in members.values():
        tokens = _on_patches([encoded[i].on_patches for i in group], places[group[0]], grids[group[0]])
        tokens.evidence.update({request: torch.stack([maps[i] for i in group]) for request, maps in evidence.items()})
        groups.append((group, tokens))
    return SeenImages(model, slots, images, layouts, places, encoded, added, groups)


def encode_images(model: PreTrainedModel, slots: Slots, images: dict[str, Any]) -> list[ImageTokens]:
    """The tokens of every image of a batch. Images of one layout go through the operations together."""
    return see_images(model, slots, images).reduced()


def image_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's ``inputs`` that describe images."""
    names = adapter_for(model.config).image_inputs
    return {name: inputs[name] for name in names if name in inputs and inputs[name] is not None}


def _on_patches(features: Sequence[Tensor], place: Tensor, grid: tuple[int, int]) -> VisualTokens:
    """The tokens (B, N, D) of images of one layout, on the N of their P patches that have a placeholder."""
    patch = (place >= 0).nonzero().squeeze(1).to(features[0].device)
    index = patch.expand(len(features), -1)
    tiles = len(place) // (grid[0] * grid[1])
    return VisualTokens(torch.stack([f[patch] for f in features]), index, torch.ones_like(index), grid, tiles)


def _projected(projection: Projection, encoded: Sequence[Encoded], grids: Sequence[tuple[int, int]]) -> list[Encoded]:
    """Every image with the tokens that ``projection`` makes of its maps."""
    projected = _made_of_maps(projection, projection, encoded, grids)
    return [
        replace(image, on_patches=tokens, others=image.others if len(image.others) else tokens[:0])
        for image, tokens in zip(encoded, projected, strict=True)
    ]


def _added(slots: Slots, encoded: Sequence[Encoded], grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The tokens added to each image, (T_i * count, D), tile after tile."""
    if (projector := slots.projector) is None:
        return [image.on_patches[:0] for image in encoded]
    return _made_of_maps(projector, lambda maps, grid: projector(on_grid(maps, grid, projector.grid)), encoded, grids)


def _made_of_maps(
    module: nn.Module,
    make: Callable[[Tensor, tuple[int, int]], Tensor],
    encoded: Sequence[Encoded],
    grids: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """What ``make`` makes, by means of ``module``, of the maps (T_i, H_i * W_i, C) of each image: (T_i * n_i, D).

    Images of one grid go through together.
    """
    device, dtype = compute_device(module), next(module.parameters()).dtype  # weights may be trained in float32
    made: dict[int, Tensor] = {}
    for grid, members in images_by_grid(grids).items():
        maps = torch.cat([encoded[i].maps for i in members])
        tokens = make(maps.to(device, dtype), grid).to(maps)
        made |= zip(members, tokens.split([len(encoded[i].maps) for i in members]), strict=True)
    return [made[i].flatten(0, 1) for i in range(len(encoded))]


def on_grid(maps: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Maps (T, H * W, C) on the grid that is ``wanted``, each cell the mean of the patches that it covers."""
    if grid == wanted:
        return maps
    return adaptive_avg_pool2d(maps.transpose(1, 2).unflatten(2, grid), wanted).flatten(2).transpose(1, 2)


def _in_prompt(tokens: VisualTokens, added: Tensor, place: Tensor, encoded: Encoded, layout: Layout) -> ImageTokens:
    """Tokens of one image in the order of the prompt: those added, then patches among those on no patch."""
    on_patches = place.to(tokens.patch_index.device)[tokens.patch_index[0]]
    others = (layout.patch < 0).nonzero().squeeze(1).to(on_patches.device)
    first = on_patches.new_zeros(len(added))
    slots, order = torch.cat([first, on_patches, others]).sort(stable=True)
    features = torch.cat([added, tokens.features[0], encoded.others])[order]
    return ImageTokens(features, slots, len(layout.patch), tokens, len(added))
