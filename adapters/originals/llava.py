"""Checkpoints of LLaVA-1.5 and LLaVA-1.6 as their own repository writes them: a CLIP tower, an MLP, Llama or Mistral.

Code: github.com/haotian-liu/LLaVA @ c121f04 (Apache-2.0), llava/train/train.py and llava/model/builder.py.

The language model is ``model.*``, the projector ``model.mm_projector.*``, the newline of 1.6 ``model.image_newline``.
The tower is ``model.vision_tower.vision_tower.*`` where it was trained; where not, `config.json` names it.

The result sees and reads what the authors' evaluation feeds their model: pictures padded to a square with the mean
colour where they padded, tiles by their list of sizes, their system prompt, and text tokenised apart from the images.

Differs: the vocabulary gains <image>, a padding token, and rows up to a multiple of 64.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm_vision.convert import Conversion, with_rows
from mllm_vision.original import Original, checkpoint_folder, read_json, read_weights
from mllm_vision.sentence_pieces import fast_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

TEXT_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
OF_THE_WHOLE = {"_name_or_path", "architectures", "dtype", "model_type", "transformers_version"}
SELECTED = {"patch": "default", "cls_patch": "full"}
TOWER = "model.vision_tower.vision_tower.vision_model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAMES = {
    TOWER: "model.vision_tower.",
    "model.image_newline": "model.image_newline",
    "model.": "model.language_model.",
}
FIRST, SECOND = (f"model.multi_modal_projector.linear_{i}." for i in (1, 2))
PROJECTORS = {
    "mlp2x_gelu": {"model.mm_projector.0.": FIRST, "model.mm_projector.2.": SECOND},
    "linear": {"model.mm_projector.": FIRST, SECOND: SECOND},
}
ROWS = 64
IMAGE = "<image>"
TOWER_REMEDY = "give the vision tower, --tower DIR"

SAY = (
    "{% macro say(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{{ '<image>\n' if part.type == 'image' else part.text }}{% endfor %}{% endif %}{% endmacro %}"
)
VICUNA = SAY + (
    "{% if messages[0].role != 'system' %}A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. {% endif %}"
    "{% for message in messages %}{% if message.role == 'system' %}{{ say(message.content) }} "
    "{% elif message.role == 'user' %}USER: {{ say(message.content) }} "
    "{% else %}ASSISTANT: {{ say(message.content) }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MISTRAL = SAY + (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] "
    "{% if loop.index == 2 and messages[0].role == 'system' %}<<SYS>>\n{{ say(messages[0].content) }}\n<</SYS>>\n\n"
    "{% endif %}{{ say(message.content) }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ say(message.content) }} </s>{% endif %}{% endfor %}"
)
CHATML = SAY + (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nAnswer the questions.<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ say(message.content) }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def convert(original: Original, tower: str | None) -> Conversion:
    """The stock model with these weights; LLaVA-NeXT's where images are cut into tiles.

    Raises:
        ValueError: a checkpoint of another layout, or one that the stock model cannot hold.
    """
    theirs, weights = original.config, dict(original.weights)
    check(theirs)
    tokenizer = read_tokenizer(original.tokenizer)
    text, matrices = language_model(TEXT_TYPES[theirs["model_type"]], theirs, weights, tokenizer)
    weights |= matrices
    folder = checkpoint_folder(tower or theirs["mm_vision_tower"], TOWER_REMEDY)
    if not any(key.startswith(TOWER) for key in weights):
        clip = {key: weight for key, weight in read_weights(folder).items() if key.startswith("vision_model.")}
        weights |= {TOWER + key.removeprefix("vision_model."): weight for key, weight in clip.items()}
    config = stock_config(theirs, folder, text, tokenizer.convert_tokens_to_ids(IMAGE))
    config.dtype = weights[EMBEDDING].dtype
    kind = theirs.get("mm_projector_type", "linear")
    if kind == "linear":
        # The stock projector is two layers and a function between: without a function, the second may pass all through.
        config.projector_hidden_act = "linear"
        width = config.text_config.hidden_size
        weights |= {f"{SECOND}weight": torch.eye(width), f"{SECOND}bias": torch.zeros(width)}
    processor = stock_processor(theirs, config, folder, tokenizer)
    return Conversion(config, processor, weights, PROJECTORS[kind] | NAMES, f"{config.model_type}, {kind} projector")


def check(theirs: dict[str, Any]) -> None:
    """Raise ValueError where their `config.json` lacks something, or asks for what the stock model does not have."""
    kind, model_type = theirs.get("mm_projector_type", "linear"), theirs.get("model_type")
    selected, merge = theirs.get("mm_vision_select_feature", "patch"), theirs.get("mm_patch_merge_type", "flat")
    tiles = theirs.get("image_aspect_ratio") == "anyres"
    needed = ["mm_vision_tower", "mm_vision_select_layer", *["image_grid_pinpoints"] * tiles]
    lacking = [name for name in needed if name not in theirs]
    problems = [
        (lacking, f"has no {', '.join(lacking)}, as every checkpoint of the original repository"),
        (model_type not in TEXT_TYPES, f"has model_type {model_type!r}, expected one of {', '.join(TEXT_TYPES)}"),
        (kind not in PROJECTORS, f"has mm_projector_type {kind!r}, expected one of {', '.join(PROJECTORS)}"),
        (selected not in SELECTED, f"has mm_vision_select_feature {selected!r}, expected one of {', '.join(SELECTED)}"),
        (theirs.get("mm_use_im_start_end"), "sets mm_use_im_start_end, but stock prompts put no marks around an image"),
        (theirs.get("s2"), "sets s2, but the stock tower sees an image at one scale"),
        (
            tiles != ("unpad" in merge),
            f"has image_aspect_ratio {theirs.get('image_aspect_ratio')!r} with mm_patch_merge_type {merge!r}, but the "
            "stock models either cut an image into tiles (anyres) and unpad them, or do neither",
        ),
    ]
    refuse(problems)


def refuse(problems: Iterable[tuple[object, str]]) -> None:
    """Raise ValueError for the first problem of their `config.json` that there is."""
    for holds, problem in problems:
        if holds:
            raise ValueError(f"config.json {problem}")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Their tokenizer with <image> and a padding token of its own, padding on the left as generation needs it.

    Raises:
        ValueError: there is none in the folder.
    """
    from transformers import AddedToken, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    elif (folder / "tokenizer.model").is_file():
        tokenizer = fast_tokenizer(folder / "tokenizer.model")
        if (folder / "added_tokens.json").is_file():
            added = read_json(folder / "added_tokens.json")
            in_order = sorted(added, key=lambda token: added[token])
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in in_order])
    else:
        raise ValueError(f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model")
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token in (None, tokenizer.unk_token):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def language_model(
    kind: str, theirs: dict[str, Any], weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerFast
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """The config of the language model, whose settings are among theirs, and its two matrices with rows for all tokens.

    Raises:
        ValueError: a matrix is missing, or the two are not one though `config.json` says so.
    """
    from transformers import AutoConfig

    tied = theirs.get("tie_word_embeddings", False)
    if lacking := [key for key in (EMBEDDING, *[HEAD] * (not tied)) if key not in weights]:
        raise ValueError(
            f"the checkpoint has no {' and no '.join(lacking)}: it is part of a model, which needs its base"
        )
    matrices = {EMBEDDING: weights[EMBEDDING], HEAD: weights.get(HEAD, weights[EMBEDDING])}
    if tied and not torch.equal(*matrices.values()):
        raise ValueError(f"config.json sets tie_word_embeddings, but {HEAD} is not {EMBEDDING}; one of them is wrong")
    rows = max(len(weights[EMBEDDING]), -(-len(tokenizer) // ROWS) * ROWS)
    known = AutoConfig.for_model(kind).to_dict().keys() | {"rope_theta", "rope_scaling"}
    settings = {name: theirs[name] for name in known - OF_THE_WHOLE if name in theirs}
    settings |= {"vocab_size": rows, "pad_token_id": tokenizer.pad_token_id}
    return AutoConfig.for_model(kind, **settings), {key: with_rows(matrix, rows) for key, matrix in matrices.items()}


def stock_config(theirs: dict[str, Any], tower: Path, text: PreTrainedConfig, image_token: int) -> PreTrainedConfig:
    """The config of the stock model.

    Raises:
        ValueError: the tower is not CLIP's.
    """
    from transformers import AutoConfig, LlavaConfig, LlavaNextConfig

    vision = AutoConfig.from_pretrained(tower)
    vision = getattr(vision, "vision_config", vision)
    if vision.model_type != "clip_vision_model":
        raise ValueError(f"{tower} is a tower of type {vision.model_type!r}, expected a CLIP vision model")
    strategy = SELECTED[theirs.get("mm_vision_select_feature", "patch")]
    settings = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": image_token,
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2 + (strategy == "full"),
        "vision_feature_layer": theirs["mm_vision_select_layer"],
        "vision_feature_select_strategy": strategy,
    }
    if theirs.get("image_aspect_ratio") != "anyres":
        return LlavaConfig(**settings)
    sizes = theirs["image_grid_pinpoints"]
    sizes = ast.literal_eval(sizes) if isinstance(sizes, str) else sizes
    return LlavaNextConfig(image_grid_pinpoints=[[height, width] for width, height in sizes], **settings)


def stock_processor(
    theirs: dict[str, Any], config: PreTrainedConfig, tower: Path, tokenizer: PreTrainedTokenizerFast
) -> ProcessorMixin:
    """The processor of the stock model, with the authors' way to look at images and to write a prompt."""
    from transformers import (
        CLIPImageProcessorPil,
        LlavaImageProcessorPil,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
        LlavaProcessor,
    )

    template = MISTRAL if TEXT_TYPES[theirs["model_type"]] == "mistral" else VICUNA
    if "<|im_start|>" in tokenizer.get_vocab():
        template = CHATML
    make: type[ProcessorMixin] = LlavaProcessor
    if config.model_type == "llava_next":
        make = LlavaNextProcessor
        images = LlavaNextImageProcessorPil.from_pretrained(tower, image_grid_pinpoints=config.image_grid_pinpoints)
    elif theirs.get("image_aspect_ratio") == "pad":
        images = LlavaImageProcessorPil.from_pretrained(tower, do_pad=True)
    else:
        images = CLIPImageProcessorPil.from_pretrained(tower)
    return make(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=template,
    )
