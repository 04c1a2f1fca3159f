"""Models of a published geometry with random weights, and what to show them: speed needs no download.

What a weight holds changes neither time nor memory. Shapes: B prompts of L columns.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BaseImageProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

from mllm_vision.eval.measurement import available_memory
from mllm_vision.host import adapter_for

FILE = Path(__file__).parent / "shapes.yaml"

TEXT_TOKENS = 40
"""Columns of a prompt beside the placeholders, a chat template and a question."""
_BEFORE_IMAGE = 5


class MakeInputs(Protocol):
    """Makes the inputs of B prompts with an image each."""

    def __call__(self, batch: int) -> BatchFeature: ...


@dataclass(frozen=True)
class Shape:
    """Geometry of a published model.

    Args:
        name: As in `shapes.yaml`.
        published: The model's hub id.
        picture: (width, height) of a picture to show it.
        image_processor: The ``type`` of an image processor and its settings.
        config: As in the model's `config.json`.
        layers: Layers of the language model to run, of those in ``config``; None is all. The tower is always whole.
    """

    name: str
    published: str
    picture: tuple[int, int]
    image_processor: dict[str, Any]
    config: dict[str, Any]
    layers: int | None = None

    @property
    def depth(self) -> int:
        """Layers that the published language model has."""
        return self.config["text_config"]["num_hidden_layers"]

    def cut(self, layers: int) -> Shape:
        """The same with only ``layers`` of the language model.

        Raises:
            ValueError: it does not have so many.
        """
        if not 1 <= layers <= self.depth:
            raise ValueError(f"layers must be in 1..{self.depth}, the language model's own, got {layers}")
        return replace(self, layers=layers)

    def build_config(self) -> PreTrainedConfig:
        """The stock config."""
        text = self.config["text_config"] | {"num_hidden_layers": self.layers or self.depth}
        return AutoConfig.for_model(**self.config | {"text_config": text})

    def load(self, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[PreTrainedModel, MakeInputs]:
        """The model with random weights, and what makes its inputs.

        Raises:
            ValueError: the weights do not fit into the memory of ``device``.
        """
        self.require_memory(dtype, available_memory(device), device.type)
        model = build_model(self.build_config(), seed, device, dtype)
        return model, partial(make_inputs, model, self.build_image_processor(), self.picture, seed)

    def build_image_processor(self) -> BaseImageProcessor:
        """The image processor, in the variant that needs Pillow only."""
        settings = {name: value for name, value in self.image_processor.items() if name != "type"}
        return get_image_processor_class_from_name(self.image_processor["type"])(**settings)

    def require_memory(self, dtype: torch.dtype, available: int | None, place: str) -> None:
        """Raise ValueError where the weights alone need more than ``available`` bytes (None: who knows)."""
        needed = weight_bytes(self.build_config(), dtype)
        if available is None or needed <= available:
            return
        one, two = (weight_bytes(self.cut(n).build_config(), dtype) for n in (1, 2))
        fitting = int((0.8 * available - one) // (two - one)) + 1  # the rest is for what runs
        advice = f"--layers {fitting} fits" if fitting >= 1 else "not even --layers 1 fits; use a smaller dtype"
        raise ValueError(
            f"the weights of {self.name} with {self.layers or self.depth} language layers need {needed / 1e9:.1f} GB "
            f"in {str(dtype).removeprefix('torch.')}, and {place} has {available / 1e9:.1f} GB left; {advice}"
        )


@cache
def shapes() -> dict[str, Shape]:
    """The shapes that come along, by name."""
    stored = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {name: Shape(name, **fields | {"picture": tuple(fields["picture"])}) for name, fields in stored.items()}


def published_shape(name: str) -> Shape:
    """The shape of this name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in shapes():
        raise ValueError(f"there is no shape {name!r}; there are {', '.join(shapes())}")
    return shapes()[name]


def build_model(
    config: PreTrainedConfig,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A stock model with random weights, made where it shall live."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` in everything but its tensors, which both use."""
    return deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the stock model with this config, counted without making one."""
    model = build_model(config, 0, "meta")
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Memory that those parameters take."""
    return parameter_count(config) * dtype.itemsize


def random_pictures(count: int, size: tuple[int, int], seed: int) -> list[Image.Image]:
    """Noise, (width, height) pixels each."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def make_inputs(
    model: PreTrainedModel, processor: BaseImageProcessor, picture: tuple[int, int], seed: int, batch: int
) -> BatchFeature:
    """What a stock processor makes of ``batch`` prompts with a picture each, for any supported host.

    No tokenizer is at hand, so the text is ids without a meaning.
    """
    images = processor(images=random_pictures(batch, picture, seed), return_tensors="pt")
    layouts = adapter_for(model.config).layouts(model, images)
    ids = torch.cat([prompt(model.config, len(layout.patch)) for layout in layouts])
    inputs = BatchFeature({**images, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return inputs.to(model.device, model.dtype)


def prompt(config: PreTrainedConfig, placeholders: int) -> Tensor:
    """Ids (1, L) of a prompt with one image."""
    named = [*vars(config).items(), *vars(config.get_text_config()).items()]
    special = [value for name, value in named if name.endswith(("_token_id", "_token_index"))]
    ordinary = (i for i in range(config.get_text_config().vocab_size) if i not in special)
    text = torch.tensor([next(ordinary) for _ in range(TEXT_TOKENS)])
    image = torch.full((placeholders,), config.image_token_id)
    return torch.cat([text[:_BEFORE_IMAGE], image, text[_BEFORE_IMAGE:]])[None]
