"""FLOPs of a tiny model, exactly those of formulas."""

from dataclasses import asdict

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import mllm_vision as mv
from mllm_vision.eval.flops import counting_flops
from mllm_vision.eval.measurement import measure_steps
from mllm_vision.eval.shapes import TEXT_TOKENS
from mllm_vision.reducers import HiPruneConfig
from tests.eval.toy_shapes import LANGUAGE, TOWER, toy_shape

CPU = torch.device("cpu")
NEW = 4


def linear(tokens, inside, outside):
    return 2 * inside * outside * tokens


def attention(queries, keys, width):
    return 4 * queries * keys * width


def encoding(patches=16, side=14):
    c, hidden, width = TOWER["hidden_size"], TOWER["intermediate_size"], LANGUAGE["hidden_size"]
    n = patches + 1  # CLS
    layer = 4 * linear(n, c, c) + linear(n, c, hidden) + linear(n, hidden, c) + attention(n, n, c)
    embedding = linear(patches, 3 * side * side, c)
    return embedding + TOWER["num_hidden_layers"] * layer + linear(patches, c, width) + linear(patches, width, width)


def language(tokens, cached):
    """One pass over ``tokens`` that come after ``cached`` ones."""
    d, hidden = LANGUAGE["hidden_size"], LANGUAGE["intermediate_size"]
    key_value = LANGUAGE["num_key_value_heads"] * d // LANGUAGE["num_attention_heads"]
    layer = 2 * linear(tokens, d, d) + 2 * linear(tokens, d, key_value) + 3 * linear(tokens, d, hidden)
    layer += attention(tokens, cached + tokens, d)
    return LANGUAGE["num_hidden_layers"] * layer + linear(1, d, LANGUAGE["vocab_size"])


def counted(*methods, batch=1):
    model, inputs_for = toy_shape("llava-1.5-7b").load(CPU, torch.float32, seed=0)
    inputs = inputs_for(batch)
    with mv.using(model, *methods), torch.inference_mode(), counting_flops() as clock:
        return asdict(measure_steps(model, inputs, NEW, clock))


@pytest.mark.parametrize("batch", [1, 3])
def test_stock_model_costs_what_the_formulas_say(batch):
    n = 16 + TEXT_TOKENS
    steps = [language(1, cached) for cached in range(n, n + NEW - 1)]
    assert counted(batch=batch) == {
        "encode": batch * encoding(),
        "prefill": batch * language(n, 0),
        "first_token": batch * (encoding() + language(n, 0)),
        "decode": batch * sum(steps) / len(steps),
    }


def test_pruned_prompt_costs_what_its_length_says_and_choosing_is_counted():
    n = 4 + TEXT_TOKENS
    steps = [language(1, cached) for cached in range(n, n + NEW - 1)]
    # HiPrune reads the attention of two layers: queries times keys, half of what attention costs.
    evidence = 2 * attention(17, 17, TOWER["hidden_size"]) / 2
    assert counted(HiPruneConfig(keep=4)) == {
        "encode": encoding() + evidence,
        "prefill": language(n, 0),
        "first_token": encoding() + evidence + language(n, 0),
        "decode": sum(steps) / len(steps),
    }


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_counts_the_same_under_every_kernel(kernel, key_heads):
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, key_heads, 7, 8), torch.randn(2, key_heads, 7, 8)
    with sdpa_kernel(kernel), counting_flops() as clock:
        scaled_dot_product_attention(query, key, value, enable_gqa=key_heads < 4)
    assert clock.read() == 2 * attention(5, 7, 4 * 8)
