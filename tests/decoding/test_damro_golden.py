"""DAMRO against tokens and scores that the authors' code produced (tests/golden; the case names its source)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

import mllm_vision as mv
from mllm_vision.decoding import DamroConfig, damro

GOLDEN = Path(__file__).parent.parent / "golden" / "damro_a2_k5"
STEPS = 12


@pytest.fixture
def model():
    config = LlavaConfig.from_pretrained(GOLDEN)
    weights = load_file(GOLDEN / "weights.safetensors")
    return LlavaForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights).eval()


def answer(model, case, **settings):
    ids = case["input_ids"].repeat_interleave(torch.where(case["input_ids"][0] == 150, 16, 1), dim=1)
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=case["pixel_values"].float(),
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )


@pytest.mark.parametrize("plugged_in", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tokens_and_scores_of_every_step(model, plugged_in, attention):
    case = load_file(GOLDEN / "case.safetensors")
    model.set_attn_implementation({"vision_config": attention})
    if plugged_in:
        out = answer(mv.apply(model, DamroConfig(alpha=2.0, beta=0.1, topk=5, attention="single")), case)
    else:
        out = answer(model, case, custom_generate=damro(alpha=2.0, beta=0.1, topk=5, attention="single"))
    assert out.sequences[:, -STEPS:].tolist() == case["damro_tokens"].tolist()
    # Another release of transformers made these scores.
    torch.testing.assert_close(torch.stack(out.scores, dim=1), case["damro_scores"], atol=1e-4, rtol=0)


def test_without_a_contrast_the_tokens_are_those_of_the_stock_model(model):
    case = load_file(GOLDEN / "case.safetensors")
    out = answer(model, case, custom_generate=damro(alpha=0, beta=0, topk=5))
    assert out.sequences[:, -STEPS:].tolist() == case["greedy_tokens"].tolist()
    torch.testing.assert_close(torch.stack(out.scores, dim=1), case["greedy_logits"], atol=1e-4, rtol=0)
