"""What the library knows of a host family: the `Adapter`, one file in `adapters/` for each.

Shapes: B prompts of L columns; image i has T_i tiles of (H_i, W_i) patches, P_i patches in all, S_i placeholders.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm_vision.operations import TowerFacts

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

PARTS = ("language", "tower", "projector")
"""What a host is made of, as recipes speak of it."""

ENTRY_POINT_GROUP = "mllm_vision.adapters"
SLOTTED_PREFIX = "mllm_vision_"
HEAD, SLOTS = "lm_head", "vision_slots"
"""Submodules of every host: what makes logits, and what holds its methods."""
_WRAPPED_BY_PEFT = re.compile(r"^base_model\.model\.|\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")


@dataclass(frozen=True)
class Layout:
    """How the visual tokens of one image stand in its prompt.

    Args:
        grid: (H, W), patches of a tile.
        tiles: T.
        patch: (S,), the patch whose token the stock host puts on each placeholder, -1 where it puts another token there
            (a newline, the CLS token).
    """

    grid: tuple[int, int]
    tiles: int
    patch: Tensor

    @property
    def place(self) -> Tensor:
        """(P,): the placeholder of each patch, -1 for a patch that the host leaves out (padding)."""
        return self.place_on(self.grid)

    def place_on(self, grid: tuple[int, int]) -> Tensor:
        """(T * h * w,): the placeholder of each cell of a coarser ``grid`` (h, w), that of the patch at its centre."""
        (height, width), (h, w) = self.grid, grid
        place = torch.full((self.tiles * height * width,), -1)
        on = (self.patch >= 0).nonzero().squeeze(1)
        place[self.patch[on]] = on
        rows = (2 * torch.arange(h) + 1) * height // (2 * h)
        columns = (2 * torch.arange(w) + 1) * width // (2 * w)
        return place.view(self.tiles, height, width)[:, rows[:, None], columns].flatten()


@dataclass(frozen=True)
class Encoded:
    """What the tower and the projector made of one image.

    Args:
        on_patches: (P, D), by patch of the grid that was encoded; rows of patches that the host leaves out are unused.
            (P, C) where a method is the projector.
        others: (F, D), the tokens that stand on no patch, in the order of their placeholders.
        maps: (T, H * W, C), what the projector made them of, by tile, without CLS.
    """

    on_patches: Tensor
    others: Tensor
    maps: Tensor


class NoProjector(nn.Identity):
    """Stands where the host's projector stood as long as a method takes its place, and holds it, weights and all.

    Args:
        held: The projector; kept out of the tree of modules, so that no checkpoint has its weights.
    """

    def __init__(self, held: nn.Module):
        super().__init__()
        self._held = (held,)

    def take_back(self, like: Tensor) -> nn.Module:
        """The projector, on the device and in the dtype that its neighbour ``like`` has by now.

        Raises:
            ValueError: it never had weights, because the model was loaded from a checkpoint without it.
        """
        (held,) = self._held
        if any(parameter.is_meta for parameter in held.parameters()):
            raise ValueError(
                "the checkpoint has no projector of the stock host, so that the one in its place cannot be taken out; "
                "put another in its place"
            )
        return held.to(like.device, like.dtype)


class Adapter(ABC):
    """Everything that is particular to one host family. Stateless; every method takes the model it speaks of.

    Attributes:
        model_type: The stock model type.
        config_name, model_name: The stock classes, by their names in transformers.
        image_inputs: Names of the inputs that describe images, the pixels first.
        language_name: The submodule that is the language model, without its head.
        tower_name: The submodule that is the tower.
        projector_name: The submodule that brings the tower's tokens to the width of the language model; it may lie
            inside the tower.
        keeps_positions: Whether kept tokens retain their positions; where not, positions close up.
    """

    model_type: str
    config_name: str
    model_name: str
    image_inputs: tuple[str, ...]
    language_name: str = "model.language_model"
    tower_name: str
    projector_name: str
    keeps_positions: bool = False

    def on_tower(self, config: PreTrainedConfig) -> Adapter:
        """The adapter for a host with the tower of this config; another one where a family has towers of two kinds."""
        return self

    @property
    def slotted_type(self) -> str:
        """The model type under which a model with slots is saved."""
        return SLOTTED_PREFIX + self.model_type

    @property
    def stock_model(self) -> type[PreTrainedModel]:
        """The stock class with a language-model head."""
        return _from_transformers(self.model_name)

    @property
    def stock_config(self) -> type[PreTrainedConfig]:
        """The stock config class."""
        return _from_transformers(self.config_name)

    def load_processor(self, source: str | Path, **hub: Any) -> ProcessorMixin:
        """The stock processor of a checkpoint; ``hub`` says how to get it, as for `from_pretrained`."""
        return _from_transformers("AutoProcessor").from_pretrained(source, **hub)

    @abstractmethod
    def facts(self, config: PreTrainedConfig) -> TowerFacts:
        """What a method may know of the tower."""

    def tower(self, model: PreTrainedModel) -> PreTrainedModel:
        """The vision tower."""
        tower: Any = model.get_submodule(self.tower_name)
        return tower

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """What brings the tower's tokens to the width of the language model, or `NoProjector` in its place."""
        return model.get_submodule(self.projector_name)

    def part_of(self, name: str) -> str:
        """The part, one of `PARTS`, that a parameter or submodule is of, by its name in the host.

        The head is of the language model. What stands between the two, such as weights of methods, is of the projector.
        """
        if inside(name, self.projector_name):
            return "projector"
        if inside(name, self.tower_name):
            return "tower"
        return "language" if inside(name, self.language_name) or inside(name, HEAD) else "projector"

    def idle(self, config: PreTrainedConfig) -> tuple[str, ...]:
        """Submodules of the tower that compute nothing the host takes, so that no gradient reaches them."""
        return ()

    @abstractmethod
    def layouts(self, model: PreTrainedModel, images: dict[str, Any]) -> list[Layout]:
        """How the tokens of each image stand in the prompt, under the stock host."""

    @abstractmethod
    def encode(
        self,
        model: PreTrainedModel,
        images: dict[str, Any],
        layouts: Sequence[Layout],
        grids: Sequence[tuple[int, int]],
    ) -> list[Encoded]:
        """Tower and projector over all images, each seen on its ``grids`` (h, w) instead of its layout's (H, W)."""

    @abstractmethod
    def by_patch(
        self, model: PreTrainedModel, heard: list[Tensor], images: dict[str, Any], grids: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """One piece of evidence, brought from what the tap ``heard`` in the tower's order into (P_i,) by patch."""

    @abstractmethod
    def noise(self, model: PreTrainedModel, images: dict[str, Any], seed: int) -> Tensor:
        """Normal noise of the shape of the pixels: `seeded_noise` of each image, so that a batch is its images."""

    def positions(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor | None:
        """(axes, B, L) positions of the caller's prompt where the host `keeps_positions`, else None."""
        return None

    def after_fit(self, model: PreTrainedModel, inputs: dict[str, Any], *, generating: bool) -> None:
        """Bring what the stock model expects or remembers of a prompt into line with the fitted ``inputs``."""
        return


@cache
def adapters() -> dict[str, Adapter]:
    """Every host family that is installed, by model type."""
    package = importlib.import_module("mllm_vision.adapters")
    names = [found.name for found in pkgutil.iter_modules(package.__path__) if not found.ispkg]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    modules += [point.load() for point in entry_points(group=ENTRY_POINT_GROUP)]
    return {module.ADAPTER.model_type: module.ADAPTER for module in modules}


def adapter_for(config: PreTrainedConfig) -> Adapter:
    """The adapter of the host with this config, stock or with slots.

    Raises:
        ValueError: nobody supports that host; the message lists those that are supported.
    """
    return adapter_of_type(config.model_type).on_tower(config)


def adapter_of_type(model_type: str) -> Adapter:
    """The adapter of the hosts with this model type, stock or with slots, whatever their towers.

    Raises:
        ValueError: nobody supports that host; the message lists those that are supported.
    """
    stock = model_type.removeprefix(SLOTTED_PREFIX)
    if stock not in adapters():
        raise ValueError(f"model type {stock!r} is not supported; supported are {', '.join(sorted(adapters()))}")
    return adapters()[stock]


def find_host(model: nn.Module) -> PreTrainedModel:
    """The supported host that ``model`` is or wraps (PEFT, data parallel).

    Raises:
        ValueError: there is none; the message lists the supported ones.
    """
    for module in model.modules():
        model_type = getattr(getattr(module, "config", None), "model_type", "")
        adapter = adapters().get(model_type.removeprefix(SLOTTED_PREFIX))
        if adapter is not None and isinstance(module, adapter.stock_model):
            return module
    names = ", ".join(sorted(adapter.model_name for adapter in adapters().values()))
    raise ValueError(f"{type(model).__name__} is not a supported host and wraps none; supported are {names}")


def inside(name: str, module: str) -> bool:
    """Whether ``name`` is that of ``module`` or of something in it."""
    return name == module or name.startswith(f"{module}.")


def without_peft(name: str) -> str:
    """The name that a parameter or submodule has where PEFT wraps nothing."""
    return _WRAPPED_BY_PEFT.sub("", name)


def images_by_grid(grids: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """The numbers of the images that are seen on the same grid, for every grid."""
    members: dict[tuple[int, int], list[int]] = {}
    for i, grid in enumerate(grids):
        members.setdefault(grid, []).append(i)
    return members


def seeded_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Normal noise that depends on nothing but its shape and the seed: on no device, and on no other image."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _from_transformers(name: str) -> Any:
    return getattr(importlib.import_module("transformers"), name)
