"""Which patches DAMRO calls outliers, and what its settings refuse."""

import logging

import pytest
import torch

import mllm_vision as mv
from mllm_vision.decoding import DamroConfig, damro, falling
from mllm_vision.encoding import see_images
from mllm_vision.slots import Slots
from mllm_vision.tokens import AttentionFromCLS, AttentionReceived, VisualTokens
from tests.hosts import HOSTS
from tests.test_hosts import image_inputs, mixed_rows

HOST = {host.name: host for host in HOSTS}
BY_DEFAULT = {"alpha": 2.0, "beta": 0.1, "topk": 10, "attention": "heads", "layer": -2}


def test_the_default_is_that_of_the_authors():
    assert vars(DamroConfig()) == BY_DEFAULT
    assert damro(alpha=0.5, topk=4).config == DamroConfig(alpha=0.5, topk=4)


def test_falling_is_the_best_first():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8], [0.4, 0.0, 0.2, 1.0]])
    assert falling(scores, torch.tensor([True, True, True, False]), 2).tolist() == [[1, 2], [0, 2]]
    assert falling(scores, torch.tensor([True, False, True, False]), 5).tolist() == [[2, 0], [0, 2]]


def test_outliers_lie_in_the_first_tile_and_where_the_prompt_has_a_token():
    # Two tiles of 2 x 2, of whose patches 1 and 6 have no placeholder; the highest of all lies in the second tile.
    index = torch.tensor([[0, 2, 3, 4, 5, 7]])
    attention = torch.tensor([[0.2, 0.7, 0.1, 0.5, 0.6, 0.9, 0.3, 0.8]])
    tower = HOST["llava-clip"].model().config
    built = Slots([DamroConfig(topk=2)], tower).decoding
    tokens = VisualTokens(torch.arange(6.0).view(1, 6, 1), index, torch.ones_like(index), (2, 2), 2)
    tokens.evidence[built.attention] = attention
    assert built.outliers(tokens).patch_index.tolist() == [[3, 0]]


def heads_of(name, layer, pixels):
    tower = HOST[name].model().model.vision_tower
    heard = {}
    for part in ("q_proj", "k_proj"):
        attention = tower.vision_model.encoder.layers[layer].self_attn if hasattr(tower, "vision_model") else None
        attention = attention or tower.encoder.layers[layer].self_attn
        getattr(attention, part).register_forward_hook(lambda m, a, out, part=part: heard.update({part: out}))
    tower(pixels)
    return heard["q_proj"], heard["k_proj"]


@torch.no_grad()
def test_single_is_one_softmax_over_the_full_width():
    host = HOST["llava-clip"]
    inputs, model = host.inputs(*mixed_rows()), host.model()
    query, key = heads_of("llava-clip", -2, inputs["pixel_values"])
    whole = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)[:, 0, 1:]
    split = [states.view(*states.shape[:2], 4, 8).transpose(1, 2) for states in (query, key)]
    by_head = (split[0] @ split[1].transpose(2, 3) / 8**0.5).softmax(-1).mean(1)[:, 0, 1:]
    single, heads = (Slots([DamroConfig(attention=a)], model.config).decoding for a in ("single", "heads"))
    assert (single.attention, heads.attention) == (AttentionFromCLS(6, heads=False), AttentionFromCLS(6))
    requests = [*single.requests, *heads.requests]
    ((_, tokens),) = see_images(model, Slots([], model.config), image_inputs(inputs), requests).groups
    torch.testing.assert_close(tokens.evidence[single.attention], whole)
    torch.testing.assert_close(tokens.evidence[heads.attention], by_head)
    assert whole.argsort(1).tolist() != by_head.argsort(1).tolist()


@pytest.mark.parametrize("name", ["llava-siglip", "qwen2.5-vl"])
def test_a_tower_without_cls_has_its_substitute_and_says_so_once(name, caplog):
    host = HOST[name]
    inputs, model = host.inputs(*mixed_rows()), host.model()
    log = logging.getLogger("mllm_vision.decoding.damro")
    log.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=1, custom_generate=damro(topk=3))
        mv.apply(model, DamroConfig(topk=3))
    said = [record.getMessage() for record in caplog.records if record.name == log.name]
    assert said == [
        "damro: this tower has no CLS token, whose attention the paper reads; the attention that each patch receives, "
        "mean over heads and queries, stands in for it"
    ]
    depth = model.vision_slots.decoding.attention.layer + 2
    assert model.vision_slots.decoding.attention == AttentionReceived(depth - 2)
    assert depth == (8 if name == "llava-siglip" else 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha must be a finite number of 0 or more, got -0.1"),
        ({"alpha": float("nan")}, "alpha must be a finite number of 0 or more, got nan"),
        ({"alpha": float("inf")}, "alpha must be a finite number of 0 or more, got inf"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
        ({"beta": -0.1}, r"beta must be in \[0, 1\), got -0.1"),
        ({"topk": 0}, "topk must be 1 or more, got 0"),
        ({"topk": 2.5}, "topk must be of type int, got 2.5"),
        ({"attention": "mean"}, "attention must be one of 'heads', 'single', got 'mean'"),
        ({"k": 5}, "DamroConfig has no field k; its fields are alpha, beta, topk, attention, layer"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DamroConfig(**settings)
    with pytest.raises(ValueError, match=message):
        damro(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 37}, "topk must be in 1..36, the visual tokens of an image, got 37"),
        ({"layer": -9}, "the tower has 8 layers, so a layer is in -8..7, got -9"),
    ],
)
def test_what_the_tower_does_not_have_is_refused(settings, message, checkpoint):
    host = HOST["llava-clip"]
    model, inputs = host.model(), host.inputs(*mixed_rows())
    with pytest.raises(ValueError, match=message):
        mv.apply(model, DamroConfig(**settings))
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, custom_generate=damro(**settings))
    with pytest.raises(ValueError, match=message):
        mv.load(checkpoint(host), DamroConfig(**settings))


@pytest.mark.parametrize("name", ["llava-next", "qwen2.5-vl"])
@torch.no_grad()
def test_where_the_image_decides_how_many_tokens_there_are_all_are_the_most(name):
    host = HOST[name]
    inputs, model = host.inputs(*mixed_rows()), host.model()
    asked = [
        model.generate(**inputs, max_new_tokens=4, do_sample=False, custom_generate=damro(topk=k)).tolist()
        for k in (36, 1000)
    ]
    assert asked[0] == asked[1]
