"""Flash attention, which needs a GPU, stood in for by a function with its interface: packed sequences and all."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import mllm_vision as mv
from mllm_vision.reducers import HiPruneConfig
from tests.hosts import HOSTS, picture

FAKE = "fake_flash"


def fake_flash(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
    """As the flash integration: asks the module's config which kernel to load, and keeps packed sequences apart."""
    assert module.config._attn_implementation == FAKE
    assert next(module.parameters()).dtype == query.dtype
    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
        kwargs.pop(name, None)
    lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    out = [sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)[0] for q, k, v in parts]
    return torch.cat(out, dim=1), None


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl"])
def test_a_flash_tower_keeps_what_an_sdpa_tower_keeps(name):
    AttentionInterface.register(FAKE, fake_flash)
    host = next(host for host in HOSTS if host.name == name)
    inputs = host.inputs(("Both {} and {}: which?", [picture(2, 120, 60), picture(3, 60, 120)]))
    model = mv.apply(host.model(), HiPruneConfig(keep=0.5))
    with torch.no_grad():
        expected, kept = model(**inputs).logits, mv.inspect_tokens(model, **inputs)
        model.config.vision_config._attn_implementation = FAKE
        logits, again = model(**inputs).logits, mv.inspect_tokens(model, **inputs)
    assert [tile.patch_index.tolist() for tile in again] == [tile.patch_index.tolist() for tile in kept]
    torch.testing.assert_close(logits, expected)
    assert model.config.vision_config._attn_implementation == FAKE
