"""Parameter groups: every trainable parameter in one, with the rate and decay worked out by hand."""

import pytest
import torch

import mllm_vision as mv
from mllm_vision.projectors import SpatialTokensConfig
from mllm_vision.recipes.lora import LoraSpec, with_lora
from mllm_vision.recipes.parameters import parameter_groups, transformer_layers
from tests.hosts import HOSTS

LLAVA, QWEN = HOSTS[0], HOSTS[-1]
RATES = {"projector": 2e-5, "tower": 2e-6}


def by_parameter(model, groups):
    """Rate and decay of each trainable parameter by its name; fails where one is in no group or in two."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    grouped = [(names[id(p)], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
    assert sorted(name for name, _, _ in grouped) == sorted(names.values())
    return {name: (rate, decay) for name, rate, decay in grouped}


def expected_rate(name):
    if (
        "vision_slots" in name
        or "multi_modal_projector" in name
        or "merger" in name.removeprefix("model.visual.blocks")
    ):
        return 2e-5
    if "image_newline" in name:
        return 2e-5
    return 2e-6 if "vision_tower" in name or ".visual." in name else 2e-4


@pytest.mark.parametrize("wrapped", [True, False], ids=["lora", "full"])
def test_every_trainable_parameter_has_the_rate_of_its_part(host, model, wrapped):
    if host.name == "llava-vit-uhd":
        expected = lambda name: 2e-6 if "vision_tower" in name else expected_rate(name)  # noqa: E731
    else:
        expected = expected_rate
    mv.apply(model, SpatialTokensConfig(channels=8, scales=3))
    if wrapped:
        spec = LoraSpec(target=["language", "tower"], r=2, alpha=4, options={"use_dora": True})
        model = with_lora(model, spec, ["projector"])
    groups = parameter_groups(model, 2e-4, 0.1, learning_rates=RATES)
    for name, (rate, decay) in by_parameter(model, groups).items():
        parameter = dict(model.named_parameters())[name]
        assert rate == expected(name), name
        assert decay == (0.1 if parameter.ndim > 1 else 0.0), name
    assert len({group["name"] for group in groups}) == len(groups)
    assert {group["name"].removesuffix(".no_decay") for group in groups} == {"language", "tower", "projector"}


def test_rates_fall_with_depth():
    # 8 layers in the tower, of which the host takes what the 7th makes; 3 in the language model.
    model = LLAVA.model()
    groups = parameter_groups(
        model, 1.0, 0.0, learning_rates={"tower": 10.0}, layer_decay={"tower": 0.5, "language": 0.1}
    )
    rates = {name: rate for name, (rate, _) in by_parameter(model, groups).items()}
    tower, language = "model.vision_tower.", "model.language_model."
    for layer, rate in enumerate([10 / 64, 10 / 32, 10 / 16, 10 / 8, 10 / 4, 5.0, 10.0, 10.0]):
        assert rates[f"{tower}encoder.layers.{layer}.mlp.fc1.weight"] == rate
    ahead = ("embeddings.class_embedding", "embeddings.position_embedding.weight", "pre_layrnorm.bias")
    assert [rates[tower + name] for name in ahead] == [10 / 128] * 3
    assert rates[f"{tower}post_layernorm.weight"] == 10.0
    found = [rates[f"{language}layers.{layer}.mlp.up_proj.weight"] for layer in range(3)]
    assert found == pytest.approx([0.01, 0.1, 1.0])
    assert rates[f"{language}embed_tokens.weight"] == pytest.approx(0.001)
    assert rates[f"{language}norm.weight"] == rates["lm_head.weight"] == 1.0
    assert rates["model.multi_modal_projector.linear_1.weight"] == 1.0


def test_rates_fall_with_depth_in_what_peft_wraps():
    model = with_lora(QWEN.model(), LoraSpec(target="language", r=2, alpha=4), ["tower"])
    rates = by_parameter(model, parameter_groups(model, 1.0, 0.0, layer_decay={"tower": 0.5, "language": 0.1}))
    start = "base_model.model.model."
    for layer in range(6):
        assert rates[f"{start}visual.blocks.{layer}.modules_to_save.default.attn.qkv.weight"][0] == 0.5 ** (5 - layer)
    assert rates[f"{start}visual.patch_embed.modules_to_save.default.proj.weight"][0] == 0.5**6
    assert rates[f"{start}language_model.layers.0.self_attn.q_proj.lora_A.default.weight"][0] == pytest.approx(0.01)


def test_a_schedule_scales_every_group():
    model = with_lora(LLAVA.model(), LoraSpec(r=2, alpha=4), ["projector"])
    optimiser = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.1, learning_rates={"projector": 1e-5}))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (step + 1))
    before = {group["name"]: group["lr"] for group in optimiser.param_groups}
    assert before == {"language": 1e-3, "projector": 1e-5, "projector.no_decay": 1e-5}
    optimiser.step()
    schedule.step()
    assert {group["name"]: group["lr"] for group in optimiser.param_groups} == {n: lr / 2 for n, lr in before.items()}


def test_layers_of_layers_are_not_taken_for_layers():
    model = LLAVA.model()
    model.model.language_model.layers[0].mlp.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(9))
    assert transformer_layers(model, "language") == [f"model.language_model.layers.{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rates": {"vision": 1.0}}, "learning_rates has no part vision; the parts are language, tower"),
        ({"layer_decay": {"head": 0.5}}, "layer_decay has no part head"),
        ({"layer_decay": {"tower": 1.5}}, r"layer_decay of the tower must be in \(0, 1\], got 1.5"),
        ({"layer_decay": {"projector": 0.5}}, "the projector has no layers for layer_decay"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(LLAVA.model(), 1e-3, 0.0, **given)
