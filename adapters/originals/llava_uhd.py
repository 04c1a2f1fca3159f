"""Checkpoints of LLaVA-UHD v3 as its training writes them: a ViT-UHD, an MLP or a patch merger, Qwen2 or Qwen3.

Code: github.com/thunlp/LLaVA-UHD @ 13981b5 (Apache-2.0), llava/train/train.py and llava/model.

The language model is ``model.*``, the projector ``model.mm_projector.*``, the tower is in
``model.vision_tower.vision_tower.*``; by itself it makes a checkpoint, too, with names that begin so, or with
``vision_tower.vision_tower.``, or bare. How many heads it has is written in its own `config.json` only: where that is
not at hand, they are 16, as in MoonViT.

Differs: trained mergers stay as they are, while the authors' way to load a tower sets all weights of mergers to zero.
The vocabulary gains <image>, and rows up to a multiple of 64 where there is no room for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mllm_vision.adapters.originals.llava import (
    EMBEDDING,
    FIRST,
    IMAGE,
    SAY,
    SECOND,
    TOWER_REMEDY,
    language_model,
    read_tokenizer,
    refuse,
)
from mllm_vision.convert import Conversion, plugged
from mllm_vision.original import Original, checkpoint_folder, read_json
from mllm_vision.projectors import patch_merger
from mllm_vision.towers import ViTUHDConfig, ViTUHDImageProcessor, ViTUHDProcessor
from mllm_vision.towers.vit_uhd.authors import PREFIX, AuthorsTower, from_authors

TEXT_TYPES = {"llava_qwen": "qwen2", "llava_qwen3": "qwen3"}
TOWER_TYPE = "moonvit"
TOWER = f"model.{PREFIX}"
OF_TOWERS = (TOWER, PREFIX, "patch_embed.", "encoder.")
OURS = "model.vision_tower."
PROJECTOR = "model.mm_projector."
PROJECTORS = ("mlp", "merger")
SLOT = "vision_slots.projection."
NAMES = {
    OURS: OURS,
    f"{PROJECTOR}proj.0.": FIRST,
    f"{PROJECTOR}proj.2.": SECOND,
    "model.": "model.language_model.",
}
MERGERS = {"average": "avg_pooling", "adaptive": "m_pooling"}
HEADS = 16
MODE = "uhd_v2_5"

SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
THOUGHT = "{% set thought = '<think>\n\n</think>\n\n' %}"
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{{ thought }}{% endif %}{{ say(message.content) }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ thought }}{% endif %}"
)
TEMPLATES = {"qwen2": SAY + SYSTEM + TURNS, "qwen3": SAY + THOUGHT + TURNS}
"""Qwen3 was trained without a system prompt, and with a thought of no words ahead of every answer."""


def convert(original: Original, tower: str | None) -> Conversion:
    """The stock model with a ViT-UHD as its tower, or the ViT-UHD by itself where the checkpoint is no more.

    Raises:
        ValueError: a checkpoint of another layout, or one that the stock model cannot hold.
    """
    theirs, weights = original.config, original.weights
    settings = tower_settings(theirs, tower)
    if theirs.get("model_type") != TOWER_TYPE and not all(key.startswith(OF_TOWERS) for key in weights):
        return whole(original, settings)
    vision = read_tower(beginning(weights, ""), settings)
    vision.config.dtype = vision.weights["position_embedding"].dtype
    images = ViTUHDImageProcessor.for_tower(vision.config)
    return Conversion(vision.config, images, vision.weights, {}, described(vision.config))


def whole(original: Original, settings: Mapping[str, Any]) -> Conversion:
    """The stock model; ``settings`` are what the tower's own `config.json` says, as far as that is known."""
    from transformers import LlavaConfig

    theirs, weights = original.config, original.weights
    check(theirs)
    kind, text_type = theirs["mm_projector_type"], TEXT_TYPES[theirs["model_type"]]
    tokenizer = read_tokenizer(original.tokenizer)
    # The authors' class sets rope_scaling to None before it makes a layer; their training turns the cache off.
    settled = theirs | {"rope_scaling": None, "use_cache": True}
    text, matrices = language_model(text_type, settled, weights, tokenizer)
    vision = read_tower(beginning(weights, TOWER), settings)
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,  # mm_vision_select_layer says -2, which the authors' tower does not read
        vision_feature_select_strategy="full",
    )
    config.dtype = weights[EMBEDDING].dtype
    template = tokenizer.chat_template or ""
    if IMAGE not in template:  # none, or that of the language model, which cannot show an image
        template = TEMPLATES[text_type]
    processor = ViTUHDProcessor(ViTUHDImageProcessor.for_tower(vision.config), tokenizer, chat_template=template)
    ours = {OURS + name: weight for name, weight in vision.weights.items()}
    moved = [TOWER]
    if kind == "merger":
        merger = patch_merger.from_authors(beginning(weights, PROJECTOR))
        config = plugged(config, merger.config)
        ours |= {SLOT + name: weight for name, weight in merger.weights.items()}
        moved.append(PROJECTOR)
    rest = {key: weight for key, weight in weights.items() if not key.startswith(tuple(moved))}
    summary = f"llava, {kind} projector; {described(vision.config)}"
    return Conversion(config, processor, rest | matrices | ours, NAMES, summary)


def check(theirs: dict[str, Any]) -> None:
    """Raise ValueError where their `config.json` is not of this layout, or asks for what the stock model lacks."""
    kind, model_type, mode = (theirs.get(name) for name in ("mm_projector_type", "model_type", "model_mode"))
    known = ", ".join([*TEXT_TYPES, TOWER_TYPE])
    refuse(
        [
            (model_type not in TEXT_TYPES, f"has model_type {model_type!r}, expected one of {known}"),
            (kind not in PROJECTORS, f"has mm_projector_type {kind!r}, supported are {', '.join(PROJECTORS)}"),
            (mode not in (None, MODE), f"has model_mode {mode!r}, expected {MODE!r}, which encodes a picture whole"),
            (
                theirs.get("mm_use_im_start_end"),
                "sets mm_use_im_start_end, but stock prompts put no marks around an image",
            ),
        ]
    )


def tower_settings(theirs: dict[str, Any], tower: str | None) -> dict[str, Any]:
    """The tower's own `config.json`, or nothing where it is not at hand: authors name a folder on their machine."""
    if tower is None and theirs.get("model_type") == TOWER_TYPE:
        return theirs
    named = tower or theirs.get("mm_vision_tower") or ""
    if tower is None and not (named and Path(named).is_dir()):
        return {}
    return read_json(checkpoint_folder(named, TOWER_REMEDY) / "config.json")


def beginning(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with ``prefix``, their names without ``model.``."""
    return {key.removeprefix("model."): weight for key, weight in weights.items() if key.startswith(prefix)}


def read_tower(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> AuthorsTower:
    """The tower under our names.

    Args:
        weights: All of a tower and nothing else.
        settings: What its own `config.json` says, as far as that is known.

    Raises:
        ValueError: keys are missing or surplus, or weights and settings contradict each other.
    """
    found = from_authors(weights, heads=settings.get("num_attention_heads", HEADS))
    if not settings and not found.config.merger_layers:
        raise ValueError(
            "the weights name no mergers, but average ones need not have any, and the tower's config.json, which would "
            "tell, is not at hand: pass its folder with --tower"
        )
    layers, method = list(found.config.merger_layers), MERGERS[found.config.merger]
    for name, value in [("merger_layer_index", layers), *[("merging_method", method)] * bool(layers)]:
        if settings.get(name) not in (None, value):
            raise ValueError(
                f"the tower's config.json has {name} {settings[name]!r}, but its weights are for {value!r}"
            )
    return found


def described(config: ViTUHDConfig) -> str:
    """The tower in a few words."""
    layers = ", ".join(map(str, config.merger_layers))
    mergers = f"{config.merger} mergers after layers {layers}" if layers else "no mergers"
    return f"ViT-UHD of {config.num_hidden_layers} layers and {config.num_attention_heads} heads, {mergers}"
