"""The untrained `tiny-llava`: a stock LLaVA small enough to train on a CPU, with its own tokenizer and processor."""

import string
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm_vision.prompts import CHAT_TEMPLATE
from mllm_vision.scenes.draw import COLOURS, SHAPES, SIZES, TEXTS, TEXTURES
from mllm_vision.settings import Settings

BACKGROUND, CENTRE, REST = "background", "centre", "rest"  # words for patches that carry no thing, its middle, the rest

_SCENE_WORDS = (*SHAPES, *COLOURS, *SIZES, *TEXTURES, *TEXTS, BACKGROUND, CENTRE, REST)
_SENTENCE_WORDS = """
user: assistant: yes no 0 1 2 3 4 5 6 7 8 9 a an and the of is are there do does you see in on what which how
many word number text say show written printed describe list picture image thing things shapes color colour
left right above below
"""
_SPACE = "▁"


@dataclass(kw_only=True)
class NewModelSpec(Settings):
    """Sizes of a new model: fields of `CLIPVisionConfig` and of `LlamaConfig`."""

    vision: dict[str, Any]
    text: dict[str, Any]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word that the scenes use; letters, then bytes, for all others. Case is folded."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    words = [_SPACE + word for word in dict.fromkeys((*_SCENE_WORDS, *_SENTENCE_WORDS.split()))]
    letters = [_SPACE, *string.ascii_lowercase, *string.digits, *string.punctuation]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    # Unigram maximises the sum of scores: a word beats its letters, and a word that is none falls apart into letters.
    scored = [(token, 0.0) for token in special] + [(token, -1.0) for token in words]
    scored += [(token, -10.0) for token in letters] + [(token, -10.0) for token in byte_tokens]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1, right=0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", special.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_processor(side: int, patch: int) -> LlavaProcessor:
    """LLaVA's processor for square pictures of `side` pixels, on the PIL image processor (no torchvision needed)."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_center_crop=True
        ),
        tokenizer=build_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    vision: dict[str, Any], text: dict[str, Any], processor: LlavaProcessor
) -> LlavaForConditionalGeneration:
    """A randomly initialised stock LLaVA whose sizes fit the processor.

    Args:
        vision: Fields of `CLIPVisionConfig`.
        text: Fields of `LlamaConfig`; the vocabulary and the special tokens come from the processor's tokenizer.
    """
    tokenizer = processor.tokenizer
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **special, **text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        **special,
    )
    return LlavaForConditionalGeneration(config)
