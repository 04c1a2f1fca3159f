"""A patch merger in place of the host's projector: windows by hand, then every host that lets go of its own."""

import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import gelu
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

import mllm_vision as mv
from mllm_vision.decoding import DamroConfig
from mllm_vision.encoding import see_images
from mllm_vision.operations import TowerFacts
from mllm_vision.projectors import PatchMergerConfig, SpatialTokensConfig
from mllm_vision.projectors.patch_merger import PatchMerger, from_authors
from mllm_vision.reducers import DownsampleConfig, HiPruneConfig
from mllm_vision.slots import Slots
from mllm_vision.tokens import AttentionReceived
from tests.hosts import HOSTS, first_block, rows_of_pixels
from tests.projectors.test_on_hosts import maps_by_hand
from tests.test_hosts import (
    GREEDY,
    WEIGHTS,
    greedy_by_hand,
    image_inputs,
    kept_patches,
    logits_by_hand,
    mixed_rows,
    prompts,
    question,
    traces,
)

BY_NAME = {host.name: host for host in HOSTS}
LETS_GO = [host for host in HOSTS if host.name not in ("llava-clip-two-layers-full", "qwen2.5-vl")]
MERGER = PatchMergerConfig()
PRUNER = HiPruneConfig(keep=4, alpha=0.5)
SPATIAL = SpatialTokensConfig(variant="pooling", channels=8, scales=2, side=4)


@pytest.fixture(params=LETS_GO, ids=lambda host: host.name)
def host(request):
    return request.param


def merger(width=3, out=5, size=2):
    torch.manual_seed(0)
    module = PatchMerger(PatchMergerConfig(size=size), width, out)
    torch.nn.init.normal_(module.norm.weight)
    torch.nn.init.normal_(module.norm.bias)
    return module


def merged_by_hand(module, tile, size=2):
    """A map (H, W, C) as the tokens (h, w, D), one window at a time; beyond the last row and column they repeat."""
    height, width, _ = tile.shape
    normed = module.norm(tile)
    rows = []
    for top in range(0, height, size):
        row = []
        for left in range(0, width, size):
            window = [
                normed[min(top + y, height - 1), min(left + x, width - 1)] for y in range(size) for x in range(size)
            ]
            hidden = module.hidden.weight @ torch.cat(window) + module.hidden.bias
            row.append(module.project.weight @ gelu(hidden) + module.project.bias)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize(("grid", "size"), [((4, 6), 2), ((3, 5), 2), ((5, 7), 3), ((1, 1), 2), ((2, 3), 1)])
def test_a_window_is_one_token(grid, size):
    module, maps = merger(size=size), torch.randn(2, *grid, 3)
    tokens = module(maps.flatten(1, 2), grid)
    expected = torch.stack([merged_by_hand(module, tile, size) for tile in maps])
    assert expected.shape[1:3] == module.grid(grid)
    assert_close(tokens, expected.flatten(1, 2))


@torch.no_grad()
def test_weights_of_the_authors_come_under_our_names():
    module = merger(width=3, out=5)
    names = {"norm": "nl", "hidden": "mlp.0", "project": "mlp.2"}
    theirs = {}
    for name, weight in module.state_dict().items():
        layer, _, part = name.partition(".")
        theirs[f"mm_projector.{names[layer]}.{part}"] = weight
    found = from_authors(theirs)
    assert (found.config, found.width, found.out) == (MERGER, 3, 5)
    again = PatchMerger(found.config, found.width, found.out)
    again.load_state_dict(found.weights)
    maps = torch.randn(1, 16, 3)
    assert torch.equal(again(maps, (4, 4)), module(maps, (4, 4)))
    with pytest.raises(ValueError, match=r"missing are mm_projector.nl.bias, surplus are mm_projector.x"):
        from_authors({n: w for n, w in theirs.items() if n != "mm_projector.nl.bias"} | {"mm_projector.x": maps})
    with pytest.raises(ValueError, match=r"mm_projector.mlp.0.bias must be \(12,\) beside the others, got \(11,\)"):
        from_authors(theirs | {"mm_projector.mlp.0.bias": torch.zeros(11)})


def rows_by_hand(host, model, inputs, kept=None):
    """The stock model, and for each row its embeddings (1, M, D): text, and the tokens made of each image by hand.

    Args:
        kept: The tokens kept of each image, as lists; None for all.
    """
    stock = host.model()
    module, embed, mark = model.vision_slots.projection, stock.get_input_embeddings(), stock.config.image_token_id
    maps, rows, image = maps_by_hand(stock, inputs), [], 0
    for ids in prompts(inputs):
        embeddings, column = [], 0
        while column < len(ids):
            if ids[column] != mark:
                embeddings.append(embed.weight[ids[column]])
                column += 1
                continue
            placeholders, (height, width) = host.placeholders(inputs, image), maps[image][0].shape[:2]
            tokens = torch.cat([merged_by_hand(module, tile).flatten(0, 1) for tile in maps[image]])
            h, w = module.grid((height, width))
            newline = getattr(stock.model, "image_newline", None)
            stands = {place: newline for place, patch in enumerate(placeholders) if patch is None}
            for tile, row, cell in itertools.product(range(len(maps[image])), range(h), range(w)):
                # A token stands where the patch in the middle of its cell stands.
                middle = (2 * row + 1) * height // (2 * h) * width + (2 * cell + 1) * width // (2 * w)
                patch, token = tile * height * width + middle, (tile * h + row) * w + cell
                if patch in placeholders and (kept is None or token in kept[image]):
                    stands[placeholders.index(patch)] = tokens[token]
            embeddings += [stands[place] for place in sorted(stands)]
            column, image = column + len(placeholders), image + 1
        rows.append(torch.stack(embeddings)[None])
    assert image == len(rows_of_pixels(inputs))
    return stock, rows


@torch.no_grad()
@pytest.mark.parametrize("pruner", [(), (PRUNER,)], ids=["all", "pruned"])
def test_generate_is_stock_on_the_merged_tokens(host, model, pruner):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model, MERGER, *pruner)
    stock, rows = rows_by_hand(host, model, inputs, kept_patches(model, inputs) if pruner else None)
    out = model.generate(**inputs, **GREEDY)
    for i, embeddings in enumerate(rows):
        assert out[i].tolist() == [*inputs["input_ids"][i].tolist(), *greedy_by_hand(stock, embeddings, None, 8)]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_is_stock_on_the_merged_tokens(host, model, side):
    inputs = host.inputs(*mixed_rows(), padding_side=side)
    mv.apply(model, MERGER)
    stock, rows = rows_by_hand(host, model, inputs)
    for got, embeddings in zip(model(**inputs).logits, rows, strict=True):
        n = embeddings.shape[1]
        expected = logits_by_hand(stock, embeddings, None)[0]
        assert_close(got[-n:] if side == "left" else got[:n], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_evidence_of_a_token_is_the_mean_of_its_patches(host, model):
    images, request = image_inputs(host.inputs(question())), AttentionReceived(1)
    [(_, plain)] = see_images(model, Slots([], model.config), images, [request]).groups
    mv.apply(model, MERGER)
    [(_, merged)] = see_images(model, model.vision_slots, images, [request]).groups
    height, width = plain.grid
    assert merged.grid == (height // 2, width // 2)
    by_window = plain.evidence[request].view(plain.tiles, height // 2, 2, width // 2, 2)
    assert_close(merged.evidence[request], by_window.mean((2, 4)).view(1, -1))
    mv.apply(model, DamroConfig(topk=1))
    assert "projection" in model.vision_slots.places
    inputs = host.inputs(*mixed_rows())
    assert model.generate(**inputs, **GREEDY).shape == (4, inputs["input_ids"].shape[1] + 8)


@torch.no_grad()
def test_down_sampling_spatial_tokens_and_a_merger_go_together(host, model):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model, MERGER, SPATIAL, DownsampleConfig(keep=0.5), PRUNER)
    kept = mv.inspect_tokens(model, **inputs)
    assert {tile.added for tile in kept} == {2}
    batch = model.generate(**inputs, **GREEDY)
    n = inputs["input_ids"].shape[1]
    for i, row in enumerate(mixed_rows()):
        alone = host.inputs(row)
        assert torch.equal(batch[i, n:], model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :])


def test_taken_out_the_model_is_stock_again(host, model):
    inputs, stock = host.inputs(*mixed_rows()), host.model()
    stock(**inputs)  # in which transformers installs hooks of its own
    before = traces(stock)
    mv.apply(model, MERGER)
    merged, weights = model(**inputs).logits, model.vision_slots.projection
    with mv.using(model, PRUNER, SPATIAL):
        assert model.vision_slots.projection is weights
    with mv.using(model, PatchMergerConfig(size=3)):
        assert model.vision_slots.projection is not weights
    assert_close(model(**inputs).logits, merged, rtol=0, atol=0)
    mv.remove(model)
    assert traces(model) == before
    assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=0, atol=0)
    mv.apply(model, MERGER)
    assert traces(mv.remove(model.double()).float()) == before


@torch.no_grad()
def test_a_checkpoint_has_the_mergers_weights_and_not_the_stock_projectors(host, checkpoint, tmp_path):
    inputs = host.inputs(*mixed_rows())
    model, _ = mv.load(checkpoint(host), MERGER)
    host.save(tmp_path)
    model.save_pretrained(tmp_path)
    stored, stock = load_file(tmp_path / WEIGHTS), load_file(checkpoint(host) / WEIGHTS)
    own = {name for name in stock if "multi_modal_projector" in name}
    new = {f"vision_slots.projection.{name}" for name in model.vision_slots.projection.state_dict()}
    assert len(own) == 4
    assert stored.keys() == stock.keys() - own | new

    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_close(loaded(**inputs).logits, model(**inputs).logits)
    pruned, _ = mv.load(tmp_path, PRUNER)
    assert pruned.vision_slots.methods == [MERGER, PRUNER]
    logits = pruned(**inputs).logits
    with pytest.raises(ValueError, match="the checkpoint has no projector of the stock host"):
        mv.remove(pruned)
    assert_close(pruned(**inputs).logits, logits, rtol=0, atol=0)

    made = type(loaded)(loaded.config)  # as loaders do that build a model first and fill it afterwards
    made.load_state_dict(loaded.state_dict())
    with pytest.raises(ValueError, match="the checkpoint has no projector of the stock host"):
        mv.remove(made)


def test_gradients_reach_every_weight(host, model):
    inputs = host.inputs(*mixed_rows())
    mv.apply(model.train(), MERGER, PRUNER)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    model(**inputs, labels=labels).loss.backward()
    for module in (model.vision_slots.projection, first_block(model)):
        assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_lora_trains_and_saves_it(host, checkpoint, tmp_path):
    inputs = host.inputs(*mixed_rows())
    model, _ = mv.load(checkpoint(host), MERGER)
    weights = model.vision_slots.state_dict()
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["vision_slots.projection"]))
    torch.nn.init.normal_(model.vision_slots.projection.project.bias)
    with torch.no_grad():
        expected = lora(**inputs).logits
    lora.save_pretrained(tmp_path)
    fresh, _ = mv.load(checkpoint(host), MERGER)
    fresh.vision_slots.load_state_dict(weights)
    with torch.no_grad():
        assert_close(PeftModel.from_pretrained(fresh, tmp_path)(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llava-clip-two-layers-full", "the CLS token goes through it, too; set vision_feature_select_strategy"),
        ("qwen2.5-vl", "it is a part of the tower, a patch merger already"),
    ],
)
def test_a_host_that_cannot_do_without_its_own_says_why(name, reason):
    model = BY_NAME[name].model()
    before = traces(model)
    with pytest.raises(ValueError, match=f"patch_merger cannot take the place of the host's projector: {reason}"):
        mv.apply(model, MERGER)
    assert traces(model) == before


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="size must be 1 or more, got 0"):
        PatchMergerConfig(size=0)
    facts = TowerFacts(depth=2, has_cls=False, object_layer=0, deep_layer=1, width=4, out=4, grid=(3, 4))
    with pytest.raises(ValueError, match=r"size must be in 1\.\.3 for a tower that sees 3 x 4, got 4"):
        PatchMergerConfig(size=4).check(facts)
    with pytest.raises(ValueError, match="only one method can be the projector, and more do among patch_merger"):
        mv.apply(BY_NAME["llava-clip"].model(), MERGER, PatchMergerConfig(size=3))
