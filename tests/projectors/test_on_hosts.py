"""A projector that adds tokens, in every host: ahead of each image, from the whole map, kept with its weights.

Shapes: T tiles of (H, W) patches, S tokens added to each, C channels of the tower, D of the language model.
"""

import copy
import logging
import re

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LlavaForConditionalGeneration, StaticCache

import mllm_vision as mv
from mllm_vision.projectors import SpatialTokensConfig
from mllm_vision.projectors.spatial_tokens import SpatialTokens
from mllm_vision.reducers import DownsampleConfig, HiPruneConfig, RandomConfig
from tests.hosts import HOSTS, PATCH, first_block
from tests.test_hosts import (
    GREEDY,
    WEIGHTS,
    greedy_by_hand,
    image_inputs,
    kept_patches,
    logits_by_hand,
    mixed_rows,
    projector,
    prompts,
    prune_by_hand,
    question,
    traces,
)

LLAVA, *_, NEXT, QWEN = HOSTS
POOLING = SpatialTokensConfig(variant="pooling", channels=8, scales=3, side=4)
CROPPING = SpatialTokensConfig(variant="cropping", channels=8, scales=4, side=4)
VARIANTS = pytest.mark.parametrize("added", [POOLING, CROPPING], ids=["pooling", "cropping"])
PRUNER = HiPruneConfig(keep=9, alpha=0.5)


def maps_by_hand(stock, inputs):
    """What the projector is given of each image, as (H, W, C) a tile, from the stock tower alone."""
    if "image_grid_thw" in inputs:
        features = stock.get_image_features(**image_inputs(inputs), return_dict=True).pooler_output
        grids = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
        return [[f.view(h, w, -1)] for f, (h, w) in zip(features, grids, strict=True)]
    pixels, layers = inputs["pixel_values"], stock.config.vision_feature_layer
    if pixels.dim() == 4 and "image_sizes" in inputs:
        seen = stock.model.vision_tower(pixels, inputs["image_sizes"])
        grids = seen.grid_hw.tolist()
        images = seen.last_hidden_state[0].split([h * w for h, w in grids])
        return [[image.view(h, w, -1)] for image, (h, w) in zip(images, grids, strict=True)]
    side = pixels.shape[-1] // PATCH
    images = pixels[:, None] if pixels.dim() == 4 else pixels
    maps = []
    for tiles in images:
        real = torch.stack([tile for tile in tiles if tile.any()])  # padding tiles are zero
        states = stock.model.vision_tower(real, output_hidden_states=True).hidden_states
        chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        maps.append(list(torch.cat(chosen, dim=-1)[:, -side * side :].unflatten(1, (side, side))))
    return maps


def averaged(tile, side):
    """A map (H, W, C) on a (side, side) grid, each cell the mean of the patches that it covers."""
    height, width, _ = tile.shape

    def covered(cell, whole):
        return slice(cell * whole // side, -(-(cell + 1) * whole // side))

    rows = [[tile[covered(r, height), covered(c, width)].mean((0, 1)) for c in range(side)] for r in range(side)]
    return torch.stack([torch.stack(row) for row in rows])


def added_by_hand(stock, module, inputs, side=4):
    """The tokens added to each image, (T * S, D), one tile at a time."""
    images = [[averaged(tile, side) for tile in tiles] for tiles in maps_by_hand(stock, inputs)]
    return [torch.cat([module(tile.flatten(0, 1)[None])[0] for tile in tiles]) for tiles in images]


def rows_by_hand(host, model, inputs, side=4):
    with torch.no_grad():
        stock = host.model()
        added = added_by_hand(stock, model.vision_slots.projector, inputs, side)
        return stock, prune_by_hand(host, stock, inputs, kept_patches(model, inputs), added)


@VARIANTS
@pytest.mark.parametrize("pruner", [(), (PRUNER,)], ids=["all", "pruned"])
def test_generate_is_stock_on_the_added_and_the_kept_tokens(host, model, added, pruner):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model, added, *pruner)
    stock, rows = rows_by_hand(host, model, inputs)
    with torch.no_grad():
        out = model.generate(**inputs, **GREEDY)
        for i, (_, embeddings, positions) in enumerate(rows):
            expected = greedy_by_hand(stock, embeddings, positions, 8)
            assert out[i].tolist() == [*inputs["input_ids"][i].tolist(), *expected]


@VARIANTS
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_is_stock_on_the_added_and_the_kept_tokens(host, model, added, side):
    inputs = host.inputs(*mixed_rows(), padding_side=side)
    mv.apply(model, added, PRUNER)
    stock, rows = rows_by_hand(host, model, inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
        for got, (_, embeddings, positions) in zip(logits, rows, strict=True):
            n = embeddings.shape[1]
            # The tiles go through the kernels together, and one by one by hand: rounding of sums of thousands.
            expected = logits_by_hand(stock, embeddings, positions)[0]
            assert_close(got[-n:] if side == "left" else got[:n], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_down_sampling_shows_the_projector_what_the_tower_saw(host, model):
    inputs, stock = host.inputs(question()), host.model()
    mv.apply(model, POOLING, DownsampleConfig(keep=0.3))
    with mv.using(model, DownsampleConfig(keep=0.3)):
        maps = [image.maps for image in _encoded(model, inputs)]
        kept = mv.inspect_tokens(model, **inputs)
    tiles = [averaged(tile.view(*kept[0].grid, -1), 4) for tile in maps[0]]
    expected = torch.cat([model.vision_slots.projector(tile.flatten(0, 1)[None])[0] for tile in tiles])
    assert expected.shape == (POOLING.scales * len(kept), stock.config.text_config.hidden_size)
    first = inputs["input_ids"][0].tolist().index(model.config.image_token_id)
    assert_close(_shown(model, inputs)[0, first : first + len(expected)], expected)


def _encoded(model, inputs):
    from mllm_vision.host import adapter_for

    adapter, images = adapter_for(model.config), image_inputs(inputs)
    layouts = adapter.layouts(model, images)
    return adapter.encode(model, images, layouts, [model.vision_slots.grid(x.grid, x.tiles) for x in layouts])


def _shown(model, inputs):
    """The embeddings that the language model is given."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("pruner", [(), (PRUNER,)], ids=["all", "pruned"])
def test_a_processor_that_knows_of_the_added_tokens_works_too(host, model, pruner):
    processor = host.processor
    if not hasattr(processor, "num_additional_image_tokens"):
        pytest.skip("this processor has no num_additional_image_tokens")
    mv.apply(model, CROPPING, *pruner)
    inputs = host.inputs(*mixed_rows())
    known = processor.num_additional_image_tokens
    processor.num_additional_image_tokens = known + CROPPING.scales
    try:
        longer = host.inputs(*mixed_rows())
    finally:
        processor.num_additional_image_tokens = known
    pictures = len(maps_by_hand(model, inputs))
    assert (longer["input_ids"] == model.config.image_token_id).sum() == (
        (inputs["input_ids"] == model.config.image_token_id).sum() + CROPPING.scales * pictures
    )
    new = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    out = model.generate(**longer, **GREEDY)
    assert torch.equal(out[:, : longer["input_ids"].shape[1]], longer["input_ids"])
    assert torch.equal(out[:, longer["input_ids"].shape[1] :], new)
    assert_close(model(**longer).logits, model(**inputs).logits)


@torch.no_grad()
def test_a_mask_of_pairs_goes_through_where_placeholders_and_tokens_are_equally_many():
    model = mv.apply(LLAVA.model(), CROPPING)
    inputs = LLAVA.inputs(question())
    ids, at = inputs["input_ids"], inputs["input_ids"][0].tolist().index(model.config.image_token_id)
    longer = torch.cat([ids[:, :at], ids[:, at : at + 1].expand(-1, CROPPING.scales), ids[:, at:]], dim=1)
    causal = torch.ones(1, 1, longer.shape[1], longer.shape[1], dtype=torch.bool).tril()
    out = model(input_ids=longer, pixel_values=inputs["pixel_values"], attention_mask=causal)
    assert_close(out.logits, model(**inputs).logits)


@torch.no_grad()
def test_a_prompt_without_an_image_is_stock(host, model):
    inputs = host.inputs(("Is grass green?", []))
    expected = host.model()(**inputs).logits
    assert_close(mv.apply(model, POOLING)(**inputs).logits, expected, rtol=0, atol=0)


@torch.no_grad()
def test_inspect_tells_what_is_kept_from_what_is_added(host, model):
    inputs = host.inputs(*mixed_rows())
    kept = mv.inspect_tokens(mv.apply(model, PRUNER), **inputs)
    both = mv.inspect_tokens(mv.apply(model, POOLING), **inputs)
    with_pruner = mv.inspect_tokens(mv.apply(model, PRUNER), **inputs)
    assert {tile.added for tile in kept} == {0}
    assert {tile.added for tile in both} == {tile.added for tile in with_pruner} == {POOLING.scales}
    assert [t.patch_index.tolist() for t in with_pruner] == [t.patch_index.tolist() for t in kept]


# --- weights ----------------------------------------------------------------------------------------------------------


@VARIANTS
@torch.no_grad()
def test_weights_come_back_with_the_checkpoint(host, checkpoint, added, tmp_path):
    inputs = host.inputs(*mixed_rows())
    model, _ = mv.load(checkpoint(host), added, PRUNER)
    host.save(tmp_path)
    model.save_pretrained(tmp_path)
    stored, stock = load_file(tmp_path / WEIGHTS), load_file(checkpoint(host) / WEIGHTS)
    new = {f"vision_slots.projector.{name}" for name in model.vision_slots.projector.state_dict()}
    assert stored.keys() == stock.keys() | new

    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.vision_slots.methods == [added, PRUNER]
    assert_close(loaded(**inputs).logits, model(**inputs).logits)
    assert_close(mv.load(tmp_path)[0](**inputs).logits, model(**inputs).logits)


def test_a_checkpoint_without_its_spatial_weights_is_refused(host, model, tmp_path):
    mv.apply(model, POOLING).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    del weights["vision_slots.projector.kernels.1.weight"]
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"lacks 1 weights, .*: vision_slots.projector.kernels.1.weight"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


@VARIANTS
def test_load_starts_from_the_stock_projector_and_torchs_own_initialisation(host, checkpoint, added, caplog):
    with caplog.at_level(logging.WARNING, "mllm_vision"):
        model, _ = mv.load(checkpoint(host), added)
    [message] = caplog.messages
    assert re.fullmatch(
        r"spatial_tokens starts from 0\.\d+ million untrained weights: train vision_slots.projector before .*", message
    )
    expected = projector(host.model()).state_dict()
    for name, weight in projector(model).state_dict().items():
        assert_close(weight, expected[name], rtol=0, atol=0)
    for name, weight in model.vision_slots.projector.named_parameters():
        if weight.ndim > 1:  # uniform within 1 / sqrt(inputs), as nn.Conv2d and nn.Linear start
            bound = weight[0].numel() ** -0.5
            assert 0.8 * bound < weight.abs().max() <= bound, name


def test_weights_stay_until_their_kind_is_replaced(host, model, caplog):
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    stock(**inputs)  # in which transformers installs hooks of its own
    before = traces(stock)
    weights = mv.apply(model, POOLING).vision_slots.projector
    caplog.clear()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "mllm_vision"):
        alone = model(**inputs).logits
        mv.apply(model, PRUNER)
        assert model.vision_slots.methods == [POOLING, PRUNER]
        pruned = model(**inputs).logits
        with mv.using(model):
            assert_close(model(**inputs).logits, alone, rtol=0, atol=0)
        with mv.using(model, CROPPING):
            assert model.vision_slots.methods == [CROPPING]
        with mv.using(model, POOLING, RandomConfig(keep=4)):
            mv.remove(model)
        assert_close(model(**inputs).logits, pruned, rtol=0, atol=0)
        assert model.vision_slots.projector is weights
        goes, starts = sorted(caplog.messages)
        assert goes == f"spatial_tokens goes, and its weights with it: {POOLING}" and "untrained" in starts
    mv.remove(model)
    assert traces(model) == before


@torch.no_grad()
def test_load_keeps_the_trained_weights_of_a_checkpoint(host, checkpoint, tmp_path, caplog):
    inputs = host.inputs(*mixed_rows())
    model = mv.load(checkpoint(host), POOLING)[0]
    host.save(tmp_path)
    model.save_pretrained(tmp_path)
    mv.apply(model, PRUNER)
    caplog.clear()
    for methods in ((PRUNER,), (POOLING, PRUNER)):
        loaded, _ = mv.load(tmp_path, *methods)
        assert loaded.vision_slots.methods == [POOLING, PRUNER]
        assert_close(loaded(**inputs).logits, model(**inputs).logits)
    assert not caplog.messages


@VARIANTS
def test_gradients_reach_every_weight(host, model, added):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model.train(), added, PRUNER)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    model(**inputs, labels=labels).loss.backward()
    for module in (model.vision_slots.projector, projector(model), first_block(model)):
        assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@VARIANTS
def test_half_precision_and_autocast(host, model, added):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model, added)
    with torch.no_grad():
        full = model(**inputs).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(**inputs).logits
        half = model.bfloat16()
        low = half(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}).logits
    assert low.dtype == torch.bfloat16
    for other in (mixed, low):  # bfloat16 keeps 8 bits, and eleven layers add their roundings up
        assert (other.float() - full).norm() < 0.1 * full.norm()


@torch.no_grad()
def test_new_weights_have_the_dtype_and_the_device_of_the_model(host, checkpoint):
    model = mv.load(checkpoint(host), POOLING, dtype=torch.bfloat16)[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert mv.apply(host.model().to("meta"), POOLING).vision_slots.projector.project.weight.is_meta


FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.parametrize("asked", [FOUR_BIT, {"load_in_4bit": True}], ids=["config", "dict"])
def test_quantisation_leaves_the_added_weights_alone(tmp_path, asked):
    config = copy.deepcopy(LLAVA.model().config)
    for part in (config.vision_config, config.text_config):  # 4-bit kernels want multiples of 64 channels
        part.hidden_size, part.intermediate_size = 64, 128
    config.text_config.head_dim = 16
    mv.apply(LlavaForConditionalGeneration(config), CROPPING).save_pretrained(tmp_path)
    before = copy.deepcopy(asked)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=asked)
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    assert classes["lm_head"] == "Linear"
    assert classes["model.multi_modal_projector.linear_1"] == "Linear4bit"
    assert "Linear4bit" not in {c for name, c in classes.items() if name.startswith("vision_slots")}
    assert asked == before if isinstance(asked, dict) else asked.to_dict() == before.to_dict()
    inputs = LLAVA.inputs(question())
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] + CROPPING.scales


@torch.no_grad()
def test_a_quantised_model_comes_back_with_weights_that_were_added_to_it(tmp_path):
    config = copy.deepcopy(LLAVA.model().config)
    for part in (config.vision_config, config.text_config):
        part.hidden_size, part.intermediate_size = 64, 128
    config.text_config.head_dim = 16
    LLAVA.save(tmp_path / "stock")
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "stock")
    model, _ = mv.load(tmp_path / "stock", CROPPING, quantization_config=FOUR_BIT)
    model.save_pretrained(tmp_path / "slotted")
    inputs = LLAVA.inputs(question())
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "slotted")
    assert type(again.model.multi_modal_projector.linear_1).__name__ == "Linear4bit"
    assert type(again.vision_slots.projector.project).__name__ == "Linear"
    stored = again.state_dict()  # with what quantisation keeps beside its weights
    for name, weight in model.state_dict().items():
        assert torch.equal(stored.pop(name), weight), name
    assert not stored
    # 4-bit products of the same weights are 1.5e-3 apart at times: on a processor they are made in bf16.
    assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-2)
    assert mv.remove(model).config.quantization_config.llm_int8_skip_modules is None


@torch.no_grad()
def test_added_weights_may_be_of_another_dtype(host, model):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model.bfloat16(), CROPPING)
    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = model(**low).logits
    model.vision_slots.float()
    logits = model(**low).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected.float()).norm() < 0.1 * expected.float().norm()


def test_a_config_that_changes_later_changes_nothing_that_was_built():
    config = SpatialTokensConfig(channels=8, scales=3)
    model = mv.apply(LLAVA.model(), config)
    config.channels = 16
    assert model.vision_slots.methods[0].channels == 8
    mv.apply(model, config)
    assert model.vision_slots.projector.project.in_features == 2 * 16


@torch.no_grad()
def test_a_cache_without_room_for_the_added_tokens_is_refused(host, model):
    mv.apply(model, CROPPING)
    inputs = host.inputs(question())
    length = inputs["input_ids"].shape[1]
    most = length + 8 + CROPPING.scales * len(mv.inspect_tokens(model, **inputs))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=most)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), expected)
    small = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
    with pytest.raises(ValueError, match=rf"the cache has {length} columns, but the prompt takes {most - 8} with"):
        model.generate(**inputs, **GREEDY, past_key_values=small)


@torch.no_grad()
def test_added_weights_may_lie_on_disk(tmp_path):
    inputs = LLAVA.inputs(question())
    model = mv.apply(LLAVA.model(), CROPPING)
    expected = model(**inputs).logits
    parts = {"model": "cpu", "lm_head": "cpu", "vision_slots": "disk"}
    dispatch_model(model, parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.vision_slots.projector.project.weight.is_meta
    assert_close(model(**inputs).logits, expected)
    mv.apply(model, PRUNER)
    assert model(**inputs).logits.shape[1] == expected.shape[1] - 27


@torch.no_grad()
def test_a_device_map_does_not_part_the_added_layers(host, model):
    stock = model._no_split_modules.copy()
    mv.apply(model, POOLING)
    assert model._no_split_modules == stock | {"SpatialTokens"}
    assert mv.remove(model)._no_split_modules == stock


def test_lora_trains_and_saves_the_added_weights(host, checkpoint, tmp_path):
    inputs = host.inputs(*mixed_rows())
    base = mv.load(checkpoint(host), CROPPING, PRUNER)[0]
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", modules_to_save=["vision_slots.projector"])
    model = get_peft_model(base, lora)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == base.config.image_token_id, -100)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs, labels=labels).loss.backward()
    optimiser.step()
    model.eval().save_pretrained(tmp_path / "adapter")

    again = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    with torch.no_grad():
        expected = model(**inputs).logits
        assert_close(again.eval()(**inputs).logits, expected)
        with mv.using(again, CROPPING):  # other reducers, the same trained weights
            everything = again(**inputs).logits
        assert everything.shape[1] > expected.shape[1]
        merged = again.merge_and_unload()
        assert_close(merged(**inputs).logits, expected)
        assert isinstance(merged.vision_slots.projector, SpatialTokens)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_scales_that_do_not_fit_the_grid_are_refused_before_a_weight_is_read(checkpoint):
    with pytest.raises(ValueError, match=r"scales must be in 1\.\.6 on a 6 x 6 grid, got 12"):
        mv.load(checkpoint(LLAVA), SpatialTokensConfig(scales=12))
    with pytest.raises(ValueError, match=r"scales must be in 1\.\.24 on a 24 x 24 grid, got 25"):
        mv.apply(QWEN.model(), SpatialTokensConfig(scales=25, channels=1))
    with pytest.raises(ValueError, match=r"scales must be in 1\.\.4 on a 4 x 4 grid, got 6"):
        mv.apply(NEXT.model(), SpatialTokensConfig())
    with pytest.raises(ValueError, match=r"side must be in 1\.\.6 for a tower that sees 6 x 6, got 7"):
        mv.load(checkpoint(LLAVA), SpatialTokensConfig(side=7))


def test_two_projectors_are_refused():
    with pytest.raises(ValueError, match="only one method can add tokens, and more do among spatial_tokens, spatial_"):
        mv.apply(LLAVA.model(), POOLING, CROPPING)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "cropped"}, "variant must be one of 'pooling', 'cropping', got 'cropped'"),
        ({"side": 0}, "side must be 1 or more, got 0"),
        ({"scale": 3}, "SpatialTokensConfig has no field scale"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SpatialTokensConfig(**settings)


def test_placeholders_that_fit_neither_way_are_refused():
    model = mv.apply(LLAVA.model(), POOLING)
    inputs = LLAVA.inputs(question())
    ids = torch.cat([inputs["input_ids"], torch.full((1, 2), model.config.image_token_id)], dim=1)
    with pytest.raises(
        ValueError, match=r"hold 38 .* need 36 \(by image: \[36\]\), or 3 more for each tile if the proc"
    ):
        model(input_ids=ids, pixel_values=inputs["pixel_values"])


def test_a_mark_too_many_is_not_taken_for_room():
    model = mv.apply(LLAVA.model(), SpatialTokensConfig(channels=2, scales=6))
    pixels = LLAVA.inputs(question())["pixel_values"].expand(6, -1, -1, -1)
    text, image = torch.tensor([[5]]), torch.full((1, 36), model.config.image_token_id)
    seven = torch.cat([part for _ in range(7) for part in (text, image)], dim=1)  # 7 * 36 = 6 * (36 + 6)
    with pytest.raises(ValueError, match=r"hold 252 image placeholders .* need 216"):
        model(input_ids=seven, pixel_values=pixels)


def test_prompts_of_the_tests_have_images_of_several_shapes():
    inputs = NEXT.inputs(*mixed_rows())
    assert len({len(tiles) for tiles in maps_by_hand(NEXT.model(), inputs)}) > 1
    assert len(prompts(inputs)) == 4
