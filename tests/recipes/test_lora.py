"""LoRA sits where it is asked for, gradients reach it, and the adapter folder makes the same model of a fresh base."""

import pytest
import torch
from torch.testing import assert_close

import mllm_vision as mv
from mllm_vision.adapter_folder import save_adapter
from mllm_vision.projectors import PatchMergerConfig, SpatialTokensConfig
from mllm_vision.recipes.lora import LoraSpec, linear_layers, trained_in_full, with_lora
from mllm_vision.reducers import HiPruneConfig
from tests.hosts import HOSTS
from tests.test_hosts import mixed_rows

LLAVA, QWEN = HOSTS[0], HOSTS[-1]
PRUNED = (HiPruneConfig(keep=1 / 3),)
METHODS = {
    "stock": (),
    "hiprune": PRUNED,
    "spatial-tokens": (SpatialTokensConfig(channels=8, scales=3), *PRUNED),
    "patch-merger": (PatchMergerConfig(),),
}
LANGUAGE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOWER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
QWEN_TOWER = ["attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
USED_LAYERS = {"llava-siglip": 8, "llava-vit-uhd": 8}
"""Of the 8 layers of the tower, those ahead of the one that the host takes; 7 where that is the last but one."""


def spec(target="language", **given):
    return LoraSpec(**{"target": target, "r": 2, "alpha": 4, "options": {"init_lora_weights": False}, **given})


def expected_layers(host, part):
    """Written out: the linear layers of a part of the toy ``host``."""
    qwen = host is QWEN
    if part == "language":
        pieces = [f"{'mlp' if 'up' in n or 'gate' in n or 'down' in n else 'self_attn'}.{n}" for n in LANGUAGE]
        return {f"model.language_model.layers.{i}.{piece}" for i in range(3) for piece in pieces}
    if part == "projector":
        names = ["visual.merger.mlp.0", "visual.merger.mlp.2"] if qwen else ["linear_1", "linear_2"]
        return {f"model.{name}" if qwen else f"model.multi_modal_projector.{name}" for name in names}
    if qwen:
        return {f"model.visual.blocks.{i}.{piece}" for i in range(6) for piece in QWEN_TOWER}
    layers = {"llava-vit-uhd": "layers", "llava-dinov2": "encoder.layer"}.get(host.name, "encoder.layers")
    attention = "attention" if host.name == "llava-dinov2" else "self_attn"
    pieces = [f"{'mlp' if n.startswith('fc') else attention}.{n}" for n in TOWER]
    if host.name == "llava-dinov2":
        pieces = [piece.replace("out_proj", "o_proj") for piece in pieces]
    used = USED_LAYERS.get(host.name, 7)
    merger = {"model.vision_tower.layers.3.merger.hidden", "model.vision_tower.layers.3.merger.score"}
    names = {f"model.vision_tower.{layers}.{i}.{piece}" for i in range(used) for piece in pieces}
    return names | (merger if host.name == "llava-vit-uhd" else set())


def adapted(model):
    """The layers that have LoRA, by the names that they have without."""
    names = {name for name, _ in model.base_model.model.named_modules() if name.endswith(".lora_A")}
    return {name.removesuffix(".lora_A") for name in names}


def loss_of(model, host, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == mv.api.find_host(model).config.image_token_id, -100)
    return model(**inputs, labels=labels).loss


def step(model, host, inputs):
    """One step of gradient descent on what is trained; the gradients are kept."""
    model.train()
    loss_of(model, host, inputs).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return model.eval()


@pytest.mark.parametrize("target", ["language", "tower", "projector", "all", ["tower", "projector"]], ids=str)
def test_lora_sits_on_the_linear_layers_of_the_parts(host, model, target):
    parts = ["language", "tower", "projector"] if target == "all" else [target] if isinstance(target, str) else target
    expected = set().union(*(expected_layers(host, part) for part in parts))
    lora = with_lora(model, spec(target))
    assert adapted(lora) == expected
    trainable = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in lora.named_parameters() if "lora_" in name}
    step(lora, host, host.inputs(*mixed_rows()))
    assert [
        name for name, p in lora.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())
    ] == []


@pytest.mark.parametrize(
    ("methods", "trains"),
    [*((methods, ["projector"]) for methods in METHODS), ("stock", []), ("hiprune", ["tower", "projector"])],
    ids=str,
)
def test_the_adapter_makes_the_same_model_of_a_fresh_base(host, checkpoint, tmp_path, methods, trains):
    if methods == "patch-merger" and host.name in ("llava-clip-two-layers-full", "qwen2.5-vl"):
        pytest.skip("the host's projector stays")
    base, _ = mv.load(checkpoint(host), *METHODS[methods])
    inputs = host.inputs(*mixed_rows())
    lora = step(with_lora(base, spec(dropout=0.1), trains), host, inputs)
    save_adapter(lora, tmp_path, checkpoint(host))
    again, _ = mv.load(tmp_path)
    expected, found = lora.state_dict(), again.state_dict()
    original = (".original_module.", "NoProjector")  # of methods, these are random and never used
    for name, weight in expected.items():
        if not any(piece in name for piece in original):
            assert torch.equal(found.pop(name), weight), name
    assert all(any(piece in name for piece in original) for name in found)
    with torch.no_grad():
        assert_close(again(**inputs).logits, lora(**inputs).logits)


def test_methods_are_always_trained_and_gradients_reach_them(host, model):
    method = SpatialTokensConfig(channels=8, scales=3)
    lora = with_lora(mv.apply(model, method, *PRUNED), spec())
    step(lora, host, host.inputs(*mixed_rows()))
    trained = {name for name, p in lora.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, p in lora.named_parameters() if p.requires_grad}
    copies = {name for name in trained if "lora_" not in name}
    assert {name.split(".modules_to_save.")[0] for name in copies} == {"base_model.model.vision_slots.projector"}
    assert len(copies) == len(list(mv.apply(host.model(), method).vision_slots.parameters()))


@pytest.mark.parametrize("part", ["tower", "language"])
def test_a_part_that_is_trained_in_full_is_all_of_it(host, part):
    model = host.model()
    names = trained_in_full(model, part)
    inside = {name for name, _ in model.named_parameters() if any(name.startswith(f"{whole}.") for whole in names)}
    outside = {"tower": ("language_model", "lm_head", "projector", "merger.mlp", "merger.ln_q", "newline")}
    outside["language"] = ("vision_tower", "visual", "projector", "newline")
    assert inside == {name for name, _ in model.named_parameters() if not any(o in name for o in outside[part])}


def test_the_tap_hears_a_tower_that_is_trained_in_full(host, model):
    inputs = host.inputs(*mixed_rows())
    expected = mv.inspect_tokens(mv.apply(host.model(), *PRUNED), **inputs)
    lora = with_lora(mv.apply(model, *PRUNED), spec(), ["tower"])
    for found in (mv.inspect_tokens(lora, **inputs), _without_adapter(lora, inputs)):
        assert [k.patch_index.tolist() for k in found] == [k.patch_index.tolist() for k in expected]
    with torch.no_grad():  # what is heard is of the copy, which is trained
        for name, parameter in lora.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num())
    found = mv.inspect_tokens(lora, **inputs)
    assert [k.patch_index.tolist() for k in found] != [k.patch_index.tolist() for k in expected]


def _without_adapter(lora, inputs):
    with lora.disable_adapter():
        return mv.inspect_tokens(lora, **inputs)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}], ids=str
)
def test_options_of_peft_are_passed_on(options):
    lora = with_lora(LLAVA.model(), spec("all", options=options))
    settings = lora.peft_config["default"]
    assert {name: getattr(settings, name) for name in options} == options
    layer = lora.get_submodule("base_model.model.model.language_model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == (4 / 2**0.5 if "use_rslora" in options else 2)
    assert bool(layer.lora_magnitude_vector) == ("use_dora" in options)


@pytest.mark.parametrize("numbers", [1, [0, 2]], ids=str)
def test_layers_are_chosen_by_their_numbers(numbers):
    found = linear_layers(QWEN.model(), "language", numbers)
    wanted = [numbers] if isinstance(numbers, int) else numbers
    everything = expected_layers(QWEN, "language")
    assert set(found) == {name for name in everything if int(name.split(".")[3]) in wanted}
    lora = with_lora(QWEN.model(), spec("all", options={"layers_to_transform": numbers}))
    assert {name for name in adapted(lora) if "language" in name} == set(found)
    assert not any("merger" in name for name in adapted(lora))  # whose layers 0 and 2 are of no transformer


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": "vision"}, "target must be one of 'all', 'language', 'tower', 'projector' or a list"),
        ({"target": []}, "target must name a part"),
        ({"r": 0}, "r must be 1 or more, got 0"),
        ({"alpha": 0}, "alpha must be more than 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"options": {"use_dorra": True}}, "options has no field use_dorra; its fields are .*use_dora"),
        ({"options": {"lora_alpha": 3}}, "options has no field lora_alpha"),
        ({"rank": 3}, "LoraSpec has no field rank"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        spec(**given)


@pytest.mark.parametrize(
    ("given", "trains", "message"),
    [
        ({"target": "projector"}, ["projector"], "projector is both trained in full and adapted"),
        ({"target": "all"}, ["tower"], "tower is both trained in full and adapted"),
        ({}, ["vision"], "trains must be of language, tower, projector or the name of a submodule, got 'vision'"),
        ({"options": {"layers_to_transform": 9}}, [], "the language of this model has no linear layer"),
        ({"target": "all", "options": {"layers_to_transform": 9}}, [], "there is no linear layer for LoRA in"),
    ],
)
def test_contradictions_are_refused(given, trains, message):
    model = LLAVA.model()
    with pytest.raises(ValueError, match=message):
        with_lora(model, spec(**given), trains)
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_a_projector_that_is_a_method_takes_no_lora():
    with pytest.raises(ValueError, match="the projector of this model has no linear layer"):
        with_lora(mv.apply(LLAVA.model(), PatchMergerConfig()), spec("projector"))


def test_embeddings_that_are_the_head_are_not_parted():
    model = LLAVA.model()
    model.lm_head.weight = model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        with_lora(model, spec("tower"), ["language"])


def test_an_adapter_on_an_adapter_is_refused():
    with pytest.raises(ValueError, match="has an adapter already"):
        with_lora(with_lora(LLAVA.model(), spec()), spec())
