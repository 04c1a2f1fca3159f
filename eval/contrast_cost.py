"""What contrastive decoding costs: a further token, over stock generation of two rows and over two passes a step.

    mllm-vision overhead --contrast --out contrast_cost.json

The language model has the proportions of SmolLM2-135M, behind a toy tower on LLaVA-1.5's grid of 576 patches; weights
are random on purpose. A token's time is that of the further tokens of an answer, without encoding and prefill. Runs
take turns in one process, and a ratio is formed of neighbours.

The two passes are the scheme of the authors' code: a cache for each prompt, then the contrast of their logits. They run
in a bare loop, without what `generate` does beside, so that the comparison is on their side.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import mllm_vision as mv
from mllm_vision.contrast import contrasted
from mllm_vision.decoding import DamroConfig
from mllm_vision.encoding import see_images
from mllm_vision.eval import shapes
from mllm_vision.eval.environment import environment
from mllm_vision.eval.measurement import in_turn, torch_threads
from mllm_vision.eval.overhead import TOWER, build_model, random_images, ratio_row
from mllm_vision.fitting import fit_prompt

LANGUAGE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
}
_TOY_TOWER = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1)


def measure(
    *,
    repeats: int = 7,
    new_tokens: int = 33,
    tower: dict[str, Any] = TOWER,
    language: dict[str, Any] = LANGUAGE,
    threads: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Seconds a token as rows of ratios, as `overhead.report` shows them.

    Args:
        repeats: Turns a ratio is the median of.
        new_tokens: Of the longer of the two answers whose difference is measured; the other has one.
        tower: Fields of the vision config.
        language: Fields of the text config.
        threads: Of torch.
        seed: Of weights and images.
    """
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    method = DamroConfig(layer=-1, topk=min(10, patches))
    with torch_threads(threads), torch.inference_mode():
        stock = build_model(tower | _TOY_TOWER, language, seed)
        ours = mv.apply(shapes.sharing_weights(stock), method)
        ids = shapes.prompt(stock.config, patches)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": random_images(tower, 1)}
        two_rows = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
        answers: list[Callable[[int], Any]] = [
            partial(answer, stock, two_rows),
            partial(two_passes, ours, inputs),
            partial(answer, stock, inputs),
            partial(answer, ours, inputs),
        ]
        turns = in_turn([partial(seconds_a_token, run, new_tokens) for run in answers], repeats)
        cases = {"over stock, two rows": 1.05, "over two passes a step": 0.9, "over stock, one row": None}
        rows = [
            ratio_row("a further token by contrast", case, "s", [(turn[i], turn[-1]) for turn in turns], target)
            for i, (case, target) in enumerate(cases.items())
        ]
        settings = {"repeats": repeats, "new_tokens": new_tokens, "seed": seed, "dtype": "float32", "weights": "random"}
        return {
            "environment": environment(),
            "settings": {**settings, "method": method.to_dict(), "tower": tower | _TOY_TOWER, "language": language},
            "rows": rows,
        }


def seconds_a_token(run: Callable[[int], Any], new_tokens: int) -> float:
    """Seconds of each token after the first."""
    times = []
    for count in (1, new_tokens):
        start = time.perf_counter()
        run(count)
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / (new_tokens - 1)


def answer(model: PreTrainedModel, inputs: dict[str, Tensor], new_tokens: int) -> Tensor:
    """Greedy generation of exactly so many tokens."""
    return model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)


def two_passes(model: PreTrainedModel, inputs: dict[str, Tensor], new_tokens: int) -> list[int]:
    """Greedy contrastive decoding of one prompt with two forward passes a step, each over a cache of its own."""
    slots = model.vision_slots
    contrast = slots.decoding
    seen = see_images(model, slots, {"pixel_values": inputs["pixel_values"]}, contrast.requests)
    prompts = [fit_prompt(model, slots, inputs, images, generating=True) for images in (seen.reduced(), contrast(seen))]
    for prompt in prompts:
        prompt |= {"past_key_values": DynamicCache(config=model.config.get_text_config()), "logits_to_keep": 1}
    chosen: list[int] = []
    while True:
        full, other = (model(**prompt).logits[:, -1] for prompt in prompts)
        token = contrasted(full.float(), other.float(), contrast.config.alpha, contrast.config.beta).argmax(-1)
        chosen.append(int(token))
        if len(chosen) == new_tokens:
            return chosen
        prompts = [{"input_ids": token[:, None], "past_key_values": prompt["past_key_values"]} for prompt in prompts]
