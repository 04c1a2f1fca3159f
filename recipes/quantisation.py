"""Quantisation of the language model of a host by bitsandbytes, for training LoRA on it (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from mllm_vision.host import HEAD, SLOTS, Adapter

Quantisation = Literal["nf4", "int8"]


def quantised(kind: Quantisation, adapter: Adapter, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained` takes as ``quantization_config``; tower, projector, methods and head are left alone.

    Args:
        kind: "nf4" is 4 bit, with the scales of its blocks quantised, too (QLoRA, section 3), "int8" is LLM.int8().
        compute_dtype: What 4-bit weights are multiplied in; 8-bit ones are in float16 whatever the model is in.
    """
    spared = [HEAD, adapter.tower_name, adapter.projector_name, SLOTS]
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=spared,
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=spared)
