"""Tiny random checkpoints of every supported host: the stock class, the stock processor, a real tokenizer, no download.

A row of `HOSTS` is what the host tests sweep. Pictures and prompts are made from seeds. Of the
library nothing is known here but its towers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BatchFeature,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from mllm_vision.towers import ViTUHDConfig, ViTUHDImageProcessor, ViTUHDProcessor

PATCH = 14
GAIN = 1.2
"""Spread of the weights: attention is far from uniform, yet rounding does not grow from layer to layer."""
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SENTENCES = (
    "What is left of the red circle?",
    "How many blue squares are in the picture?",
    "Is there a small green triangle? Answer yes or no.",
    "Describe what both pictures have in common.",
)


@dataclass(frozen=True)
class Host:
    """One row of the host tests.

    Args:
        name: Id of the row.
        build: Makes the model, random but always the same.
        build_processor: Makes the stock processor that belongs to it.
        image_mark: What stands for an image in a prompt.
        placeholders: Makes, from the processor's output and the number of an image, what the stock host puts on each of
            that image's placeholders: the number of a patch, or None for a CLS or newline token.
        has_cls: Whether the tower has a CLS token.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    build_processor: Callable[[], ProcessorMixin]
    placeholders: Callable[[BatchFeature, int], list[int | None]]
    image_mark: str = "<image>"
    has_cls: bool = True

    def model(self) -> PreTrainedModel:
        """A fresh copy of the model, in eval mode."""
        return deepcopy(_built(self))

    @property
    def processor(self) -> ProcessorMixin:
        """The stock processor."""
        return _processor(self)

    def inputs(self, *rows: tuple[str, Sequence[Image.Image]], **kwargs) -> BatchFeature:
        """What the stock processor makes of prompts with their images; ``{}`` in a prompt stands for an image."""
        images = [image for _, row in rows for image in row]
        text = [prompt.replace("{}", self.image_mark) for prompt, _ in rows]
        return self.processor(images=images or None, text=text, padding=True, return_tensors="pt", **kwargs)

    def save(self, folder: Path) -> Path:
        """Write model, tokenizer and image processor into ``folder`` as a checkpoint on the hub has them."""
        self.model().save_pretrained(folder)
        if type(self.processor) is _ImagesOnlyProcessor:
            self.processor.tokenizer.save_pretrained(folder)
            self.processor.image_processor.save_pretrained(folder)
        else:
            self.processor.save_pretrained(folder)
        return folder


def first_block(model: PreTrainedModel) -> torch.nn.Module:
    """The first layer of the tower."""
    ends = ("encoder.layers.0", "encoder.layer.0", "vision_tower.layers.0", "visual.blocks.0")
    (block,) = (module for name, module in model.named_modules() if name.endswith(ends))
    return block


def rows_of_pixels(inputs: BatchFeature) -> list[int]:
    """How many rows of the pixels each image has: its patches where they stand in one row, else one."""
    if "image_grid_thw" in inputs:
        return inputs["image_grid_thw"].prod(-1).tolist()
    pixels = inputs["pixel_values"]
    if "image_sizes" in inputs and pixels.dim() == 4:
        return (inputs["image_sizes"] // pixels.shape[-1]).prod(-1).tolist()
    return [1] * len(pixels)


@cache
def _built(host: Host) -> PreTrainedModel:
    torch.manual_seed(0)
    model = host.build().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=GAIN / parameter[0].numel() ** 0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():  # as a trained model, it never says <image>
        model.lm_head.weight[list(host.processor.tokenizer.added_tokens_decoder)] = 0
    return model


@cache
def _processor(host: Host) -> ProcessorMixin:
    return host.build_processor()


def picture(seed: int, width: int = 84, height: int = 84) -> Image.Image:
    """Random colours in blocks of 7 x 7 pixels."""
    shape = (-(-height // 7), -(-width // 7), 3)
    blocks = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(blocks.repeat(7, axis=0).repeat(7, axis=1)[:height, :width])


def _tokenizer(special: list[str], *, with_bos: bool) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PAD, BOS, EOS, *special]
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    core.train_from_iterator(SENTENCES, trainer)
    if with_bos:
        core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="left"
    )


@cache
def _llava_tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer(["<image>"], with_bos=True)


@cache
def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"], with_bos=False)


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _llama() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        **_ids(_llava_tokenizer()),
    )


def _tower_size(image_size: int) -> dict[str, int]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": PATCH,
    }


def _llava(tower: PreTrainedConfig, layer: int | list[int], strategy: str) -> PreTrainedModel:
    config = LlavaConfig(
        vision_config=tower,
        text_config=_llama(),
        image_token_index=_llava_tokenizer().convert_tokens_to_ids("<image>"),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    return LlavaForConditionalGeneration(config)


def _llava_placeholders(*, cls: bool) -> list[int | None]:
    return [None] * cls + list(range(36))


def _llava_processor(*, cls: bool, strategy: str) -> ProcessorMixin:
    size = {"height": 84, "width": 84}
    if cls:
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": 84}, crop_size=size)
    else:
        image_processor = SiglipImageProcessorPil(size=size)
    return LlavaProcessor(
        image_processor,
        _llava_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(cls),
    )


def _llava_dinov2() -> PreTrainedModel:
    tower = _tower_size(84) | {"mlp_ratio": 2}
    del tower["intermediate_size"]
    return _llava(Dinov2Config(**tower), -2, "default")


def _llava_uhd() -> PreTrainedModel:
    tower = _tower_size(84) | {"patch_size": 7, "position_grid": (12, 12), "merger_layers": (3,)}
    del tower["image_size"]
    return _llava(ViTUHDConfig(**tower), -1, "full")


def _llava_uhd_processor() -> ProcessorMixin:
    image_processor = ViTUHDImageProcessor(patch_size=7, merge_size=2, min_pixels=56 * 56, max_pixels=140 * 140)
    return ViTUHDProcessor(image_processor, _llava_tokenizer())


PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168]]  # (height, width), of tiles of 56 x 56 pixels


def _llava_next() -> PreTrainedModel:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_tower_size(56)),
        text_config=_llama(),
        image_token_index=_llava_tokenizer().convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextForConditionalGeneration(config)


def _llava_next_placeholders(inputs: BatchFeature, image: int) -> list[int | None]:
    """The base tile, then the rows of the mosaic without its padding, each closed by a newline token."""
    size = inputs["image_sizes"][image].tolist()
    height, width = select_best_resolution(size, PINPOINTS)
    tiles = 1 + torch.arange(height // 56 * width // 56).view(height // 56, width // 56)
    numbers = tiles[:, None, :, None] * 16 + torch.arange(16).view(1, 4, 1, 4)
    mosaic = unpad_image(numbers.reshape(1, height // PATCH, width // PATCH), size)[0]
    return [*range(16), *(patch for row in mosaic.tolist() for patch in (*row, None))]


def _llava_next_processor() -> ProcessorMixin:
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        image_processor,
        _llava_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _qwen() -> PreTrainedModel:
    tokenizer = _qwen_tokenizer()
    text = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]},
        **_ids(tokenizer),
    }
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "depth": 6,
        "num_heads": 4,
        "out_hidden_size": 48,
        "patch_size": PATCH,
        "window_size": 56,
        "fullatt_block_indexes": [2, 5],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen_placeholders(inputs: BatchFeature, image: int) -> list[int | None]:
    """Row by row, one token for 2 x 2 patches."""
    return list(range(int(inputs["image_grid_thw"][image].prod()) // 4))


class _ImagesOnlyProcessor(Qwen2_5_VLProcessor):
    """The stock processor without its video processor, which cannot be made where torchvision is not installed."""

    def __init__(self, image_processor, tokenizer):
        super().__init__(image_processor, tokenizer)


def _qwen_processor() -> ProcessorMixin:
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 112 * 112, "longest_edge": 168 * 168})
    return _ImagesOnlyProcessor(image_processor, _qwen_tokenizer())


HOSTS = (
    Host(
        "llava-clip",
        lambda: _llava(CLIPVisionConfig(**_tower_size(84)), -2, "default"),
        lambda: _llava_processor(cls=True, strategy="default"),
        lambda inputs, image: _llava_placeholders(cls=False),
    ),
    Host(
        "llava-clip-two-layers-full",
        lambda: _llava(CLIPVisionConfig(**_tower_size(84)), [-3, -2], "full"),
        lambda: _llava_processor(cls=True, strategy="full"),
        lambda inputs, image: _llava_placeholders(cls=True),
    ),
    Host(
        "llava-dinov2",
        _llava_dinov2,
        lambda: _llava_processor(cls=True, strategy="default"),
        lambda inputs, image: _llava_placeholders(cls=False),
    ),
    Host(
        "llava-siglip",
        lambda: _llava(SiglipVisionConfig(**_tower_size(84), vision_use_head=False), -1, "full"),
        lambda: _llava_processor(cls=False, strategy="full"),
        lambda inputs, image: _llava_placeholders(cls=False),
        has_cls=False,
    ),
    Host(
        "llava-vit-uhd",
        _llava_uhd,
        _llava_uhd_processor,
        lambda inputs, image: list(range(int(inputs["image_sizes"][image].prod()) // 14**2)),
        has_cls=False,
    ),
    Host("llava-next", _llava_next, _llava_next_processor, _llava_next_placeholders),
    Host(
        "qwen2.5-vl",
        _qwen,
        _qwen_processor,
        _qwen_placeholders,
        image_mark="<|vision_start|><|image_pad|><|vision_end|>",
        has_cls=False,
    ),
)
