"""A model's answers to questions about pictures, the same whatever stands beside a question in its batch.

In half precision that is so up to rounding, which the shape of a batch has a say in: a near tie may go either way.

Sampling draws by Gumbel's trick: the most probable token after noise is a fair draw, and the noise of a row comes from
its own question and step. So a sampled run can be cut into other batches, spread over processes, or taken up again,
and says the same.

Shapes: B questions, V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BatchFeature,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    ProcessorMixin,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mllm_vision.host import find_host
from mllm_vision.prompts import question_parts, write_prompt
from mllm_vision.settings import Settings


@dataclass(kw_only=True)
class Decoding(Settings):
    """How answers are drawn.

    Args:
        max_new_tokens: Longest answer; None is what each task asks for.
        temperature: 0 is greedy search.
        top_p: Share of the probability to draw from; 1 is all.
        top_k: Tokens to draw from; 0 is all.
        num_beams: More than 1 is beam search, at temperature 0.
        seed: Of the draws.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0 or self.num_beams < 1:
            raise ValueError(f"top_k must be 0 or more and num_beams 1 or more, got {self.top_k} and {self.num_beams}")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise ValueError("top_p and top_k are for sampling; give a temperature above 0, too")
        if self.temperature > 0 and self.num_beams > 1:
            raise ValueError("beams are searched at temperature 0; give either num_beams or a temperature")

    def to_dict(self) -> dict[str, Any]:
        """What has a say in answers, as JSON holds it: all fields, the seed only where answers are drawn."""
        fields = asdict(self)
        return fields if self.temperature else {name: value for name, value in fields.items() if name != "seed"}

    def processors(self, ids: Sequence[str]) -> LogitsProcessorList:
        """What turns greedy search into this kind of sampling, for a batch of questions with these ids."""
        if self.temperature == 0:
            return LogitsProcessorList()
        warpers: list[LogitsProcessor] = []
        if self.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*warpers, RowNoise(self.seed, ids)])


class RowNoise(LogitsProcessor):
    """Gumbel noise on the logits (B, V), each row's from a generator of its own."""

    def __init__(self, seed: int, ids: Sequence[str]):
        self.generators = [torch.Generator().manual_seed(_number(f"{seed}/{name}")) for name in ids]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self.generators])
        noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
        return scores + noise.to(scores.device, torch.float32)


def _number(text: str) -> int:
    """A seed: the same on every machine, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def prompt_for(processor: ProcessorMixin, question: str, images: int, system: str | None = None) -> str:
    """The prompt that asks a question about so many images."""
    return write_prompt(processor, question_parts(question, images), system)


def inputs_for(
    processor: ProcessorMixin, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]
) -> BatchFeature:
    """What the processor makes of questions, padded on the left, and of the pictures of each."""
    return processor(
        images=[picture for row in pictures for picture in row] or None,
        text=list(prompts),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: BatchFeature,
    ids: Sequence[str],
    *,
    max_new_tokens: int,
    decoding: Decoding | None = None,
    **generate: Any,
) -> list[str]:
    """The answers of one batch, without special tokens and surrounding space.

    Args:
        inputs: Of `inputs_for`.
        ids: Of each question, which sampling is seeded with.
        max_new_tokens: Longest answer; ``decoding`` has the last word.
        decoding: None is greedy search.
        generate: Passed on to `generate`.
    """
    decoding = decoding or Decoding()
    with head_on_one_block(model):
        out = model.generate(
            **inputs.to(model.device, model.dtype),
            max_new_tokens=decoding.max_new_tokens or max_new_tokens,
            do_sample=False,
            num_beams=decoding.num_beams,
            logits_processor=decoding.processors(ids),
            **generate,
        )
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


@contextmanager
def head_on_one_block(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, the head gets the states of a batch as one block of memory.

    Of a prompt, `generate` wants the last position alone, a slice with gaps, which torch multiplies on a processor
    after it has copied the head's weights for every row: half the time of an answer with a vocabulary of 49,152.
    """
    head = find_host(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
