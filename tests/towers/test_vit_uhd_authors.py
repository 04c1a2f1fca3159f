"""The authors' checkpoints: every weight is accounted for, and trained mergers survive."""

import logging

import pytest
import torch

from mllm_vision.towers import ViTUHDModel
from mllm_vision.towers.vit_uhd import from_authors
from tests.towers.reference import HEADS, random_weights


@pytest.mark.parametrize("prefix", ["", "vision_tower.vision_tower."])
def test_trained_mergers_survive_and_every_weight_is_accounted_for(prefix, caplog):
    weights = random_weights(mergers=(1, 3))
    with caplog.at_level(logging.WARNING, "mllm_vision"):
        theirs = from_authors({prefix + name: weight for name, weight in weights.items()}, heads=HEADS)
    tower = ViTUHDModel(theirs.config)
    tower.load_state_dict(theirs.weights)
    for layer in (1, 3):
        merger, block = tower.layers[layer].merger, f"encoder.blocks.{layer}.merger.attn_layer"
        assert torch.equal(merger.hidden.weight, weights[f"{block}.0.weight"])
        assert torch.equal(merger.hidden.bias, weights[f"{block}.0.bias"])
        assert torch.equal(merger.score.weight, weights[f"{block}.2.weight"])
    unread = [weight for name, weight in weights.items() if "zero_init_fc" in name or "attn_layer.2.bias" in name]
    assert sum(w.numel() for w in tower.parameters()) == sum(w.numel() for w in [*weights.values()]) - sum(
        w.numel() for w in unread
    )
    (record,) = caplog.records
    assert record.getMessage() == (
        "left out 4 weights that have no effect: encoder.blocks.1.merger.attn_layer.2.bias, "
        "encoder.blocks.1.merger.zero_init_fc.weight, encoder.blocks.3.merger.attn_layer.2.bias, "
        "encoder.blocks.3.merger.zero_init_fc.weight"
    )


def test_settings_follow_from_the_weights(caplog):
    config = from_authors(random_weights(layers=3, mergers=(1,), adaptive=False, table=(6, 5)), heads=8).config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 48, 3)
    assert (config.num_attention_heads, config.patch_size, config.position_grid) == (8, 5, (6, 5))
    assert (config.merger, config.merger_layers, config.rotary_units) == ("average", (1,), "tokens")
    caplog.clear()
    assert from_authors(random_weights(), heads=HEADS).config.merger_layers == ()  # a MoonViT
    assert caplog.records == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("encoder.blocks.2.wo.bias"), "missing are encoder.blocks.2.wo.bias, surplus are none"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(1)}), "missing are none, surplus are lm_head.weight"),
        (lambda w: w.pop("encoder.blocks.1.merger.attn_layer.0.bias"), "missing are .*1.merger.attn_layer.0.bias"),
        (lambda w: w.clear(), "missing are encoder.final_layernorm.bias"),
        (
            lambda w: w.update({"encoder.blocks.0.wqkv.weight": torch.zeros(95, 32)}),
            r"blocks.0.wqkv.weight has another size .* \(95, 32\)",
        ),
        (
            lambda w: w.update({"encoder.blocks.1.norm0.bias": torch.zeros(31)}),
            r"blocks.1.norm0.bias has another size .* \(31,\)",
        ),
    ],
)
def test_weights_that_are_no_tower(change, message):
    weights = random_weights(mergers=(1,))
    change(weights)
    with pytest.raises(ValueError, match=message):
        from_authors(weights, heads=HEADS)
