"""From pretrained towers to ViT-UHD: the same features where nothing is resized, like ones where something is."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import interpolate
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mllm_vision.towers import ViTUHDConfig, ViTUHDModel
from mllm_vision.towers.vit_uhd import from_authors
from mllm_vision.towers.vit_uhd.conversion import resized_kernel
from mllm_vision.towers.vit_uhd.image_processing import patchify
from tests.towers.reference import HEADS, SIDE, random_weights, slow_tower

CELLS = 6  # patches along a side of the pictures that the towers were made for
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, layer_norm_eps=0.01)


def random(tower):
    """The tower with weights that make every part matter, and a table of positions as smooth as trained ones are."""
    torch.manual_seed(0)
    for name, weight in tower.state_dict().items():
        if not name.endswith("position_ids"):
            weight.normal_(std=max(weight.shape) ** -0.5).add_("norm" in name and name.endswith("weight"))
        if name.endswith("position_embedding.weight"):
            weight[-(CELLS**2) :] = (
                interpolate(torch.randn(1, 32, 2, 2), (CELLS, CELLS), mode="bicubic")[0].flatten(1).T
            )
    return tower.eval()


def siglip():
    return random(SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=CELLS * 7, patch_size=7)))


def siglip2():
    return random(Siglip2VisionModel(Siglip2VisionConfig(**SIZES, num_patches=CELLS**2, patch_size=7)))


def clip():
    return random(CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=CELLS * 7, patch_size=7)))


def moonvit():
    """Stands in for MoonViT, whose class comes with its checkpoint: all that is asked of it."""
    weights = random_weights(table=(CELLS, CELLS))
    smooth = interpolate(
        torch.randn(1, 32, 2, 2, generator=torch.Generator().manual_seed(0)), (CELLS, CELLS), mode="bicubic"
    )
    weights["patch_embed.pos_emb.weight"] = smooth[0].permute(1, 2, 0)
    config = SimpleNamespace(model_type="moonvit", num_attention_heads=HEADS)
    facts = dict(device=torch.device("cpu"), dtype=torch.float32, training=False)
    return SimpleNamespace(config=config, state_dict=lambda: weights, **facts)


def own_features(tower, picture):
    """What the tower itself makes of a picture (3, S, S), row-major, without CLS."""
    if tower.config.model_type == "siglip_vision_model":
        return tower(picture[None]).last_hidden_state[0]
    if tower.config.model_type == "siglip2_vision_model":
        patches = torch.from_numpy(patchify(picture.numpy(), 7)).permute(0, 2, 3, 1).flatten(1)
        shapes, mask = torch.tensor([[CELLS, CELLS]]), torch.ones(1, len(patches), dtype=torch.long)
        return tower(patches[None], pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state[0]
    if tower.config.model_type == "clip_vision_model":
        patches = tower.pre_layrnorm(tower.embeddings(picture[None])[:, 1:])  # no CLS to attend to
        return tower.encoder(inputs_embeds=patches).last_hidden_state[0]
    patches = torch.from_numpy(patchify(picture.numpy(), SIDE))
    return slow_tower(tower.state_dict(), patches, [(CELLS, CELLS)])


def features(tower, picture):
    patches = torch.from_numpy(patchify(picture.numpy(), tower.config.patch_size))
    return tower(patches, [picture.shape[1:]]).last_hidden_state[0]


def smooth_picture(pixels):
    """Waves a few patches long, drawn at any size."""
    at = (torch.arange(pixels) + 0.5) / pixels * torch.pi
    row, column = at[:, None], at[None]
    return torch.stack(
        [torch.sin(2 * row + column), torch.cos(row - 2 * column), torch.sin(3 * row) * torch.cos(column)]
    )


TOWERS = {"siglip": (siglip, 7), "siglip2": (siglip2, 7), "clip": (clip, 7), "moonvit": (moonvit, SIDE)}
SMALLER = {7: 5, SIDE: 4}  # about as 14 to 10


@pytest.fixture(params=TOWERS)
def source(request):
    """A tower and the side of its patches."""
    make, side = TOWERS[request.param]
    return make(), side


@torch.no_grad()
def test_without_resizing_the_features_are_the_towers_own(source):
    tower, side = source
    picture = torch.randn(3, CELLS * side, CELLS * side, generator=torch.Generator().manual_seed(1))
    converted = ViTUHDModel.from_vit(tower, patch_size=side, merger_layers=())
    assert converted.config.position_grid == (CELLS, CELLS)
    assert not converted.training
    torch.testing.assert_close(features(converted, picture), own_features(tower, picture), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("smaller", [True, False])
def test_a_smooth_picture_embeds_alike_and_far_less_so_by_plain_resizing(source, smaller):
    tower, side = source
    to = SMALLER[side] if smaller else 10
    expected = own_features(tower, smooth_picture(CELLS * side))
    converted = ViTUHDModel.from_vit(tower, patch_size=to, merger_layers=())
    assert converted.config.position_grid == (round(CELLS * side / to),) * 2
    error = (features(converted, smooth_picture(CELLS * to)) - expected).norm() / expected.norm()
    same_patches = ViTUHDModel.from_vit(tower, patch_size=side, merger_layers=()).patch_embedding.weight
    plain = interpolate(same_patches.view(-1, 3, side, side), (to, to), mode="bilinear", antialias=True)
    converted.patch_embedding.weight.copy_(plain.flatten(1))
    plain_error = (features(converted, smooth_picture(CELLS * to)) - expected).norm() / expected.norm()
    assert error < 0.04  # of a picture with waves only three or four patches long
    assert plain_error > 0.25


@torch.no_grad()
def test_the_table_of_positions_is_resampled_to_the_grid_asked_for():
    tower = siglip()
    (table,) = (weight.T for name, weight in tower.state_dict().items() if name.endswith("position_embedding.weight"))
    expected = interpolate(table.view(1, -1, CELLS, CELLS), (9, 11), mode="bicubic")[0].permute(1, 2, 0)
    converted = ViTUHDModel.from_vit(tower, patch_size=5, merger_layers=(), position_grid=(9, 11))
    assert converted.config.position_grid == (9, 11)
    torch.testing.assert_close(converted.position_embedding, expected)


def test_a_larger_kernel_makes_exactly_the_same_of_a_resized_patch():
    torch.manual_seed(0)
    kernel, patch = torch.randn(4, 3, 5, 5), torch.randn(1, 3, 5, 5)
    larger = interpolate(patch, (8, 8), mode="bilinear", antialias=True)
    expected = (kernel * patch).sum((1, 2, 3))
    torch.testing.assert_close((resized_kernel(kernel, 8) * larger).sum((1, 2, 3)), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(resized_kernel(kernel, 5), kernel)


def test_a_smaller_kernel_is_the_nearest_one():
    torch.manual_seed(0)
    kernel = torch.randn(1, 1, 6, 6)
    pixels = torch.eye(36).view(36, 1, 6, 6)
    resize = interpolate(pixels, (4, 4), mode="bilinear", antialias=True).flatten(1)  # (36, 16)
    nearest = torch.linalg.lstsq(resize, kernel.flatten()[:, None]).solution.view(1, 1, 4, 4)
    torch.testing.assert_close(resized_kernel(kernel, 4), nearest, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_mergers_start_as_averages():
    tower, picture = siglip(), torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1))
    sizes, patches = [(16, 16)], torch.from_numpy(patchify(picture.numpy(), 4))
    adaptive, average = (
        ViTUHDModel.from_vit(tower, patch_size=4, merger_layers=(0, 1), merger=merger)
        for merger in ("adaptive", "average")
    )
    assert not [name for name in average.state_dict() if ".merger." in name]
    out = adaptive(patches, sizes)
    assert out.grid_hw.tolist() == [[1, 1]]
    torch.testing.assert_close(out.last_hidden_state, average(patches, sizes).last_hidden_state)


@torch.no_grad()
def test_a_vit_uhd_without_mergers_converts_as_the_tower_it_holds():
    tower = moonvit()
    theirs = from_authors(tower.state_dict(), heads=HEADS)
    held = ViTUHDModel(theirs.config).eval()
    held.load_state_dict(theirs.weights)
    expected = ViTUHDModel.from_vit(tower, patch_size=4, merger_layers=(1,), merger="average")
    again = ViTUHDModel.from_vit(held, patch_size=4, merger_layers=(1,), merger="average")
    assert again.config.to_dict() == expected.config.to_dict()
    for (name, weight), (same_name, same) in zip(
        again.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert name == same_name
        torch.testing.assert_close(weight, same)
    with pytest.raises(ValueError, match=r"merges tokens already, after layers \(1,\)"):
        ViTUHDModel.from_vit(again, patch_size=4, merger_layers=())


def test_the_source_is_left_as_it_is_and_its_precision_kept():
    tower = siglip().bfloat16().train()
    before = {name: weight.clone() for name, weight in tower.state_dict().items()}
    converted = ViTUHDModel.from_vit(tower, patch_size=4, merger_layers=(0,))
    assert {weight.dtype for weight in converted.state_dict().values()} == {torch.bfloat16}
    assert converted.training and all(weight.requires_grad for weight in converted.parameters())
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, before[name])
    with torch.no_grad():
        converted.layers[0].mlp.fc1.weight.zero_()
    assert tower.state_dict()["encoder.layers.0.mlp.fc1.weight"].any()


def test_towers_that_cannot_be_converted():
    text = CLIPTextModel(CLIPTextConfig(**SIZES, vocab_size=50, max_position_embeddings=8))
    with pytest.raises(
        ValueError, match="cannot convert a tower of type 'clip_text_model'; supported are siglip_vision"
    ):
        ViTUHDModel.from_vit(text, patch_size=4, merger_layers=())
    odd = Siglip2VisionModel(Siglip2VisionConfig(**SIZES, num_patches=35, patch_size=7))
    with pytest.raises(ValueError, match="positions of a square grid, got 35"):
        ViTUHDModel.from_vit(odd, patch_size=4, merger_layers=())


def test_the_units_of_rotary_positions_are_kept():
    tower = ViTUHDModel(
        ViTUHDConfig(
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=2,
            patch_size=5,
            merger_layers=(),
            position_grid=(4, 4),
            rotary_units="tokens",
        )
    )
    assert ViTUHDModel.from_vit(tower, patch_size=5, merger_layers=(0,)).config.rotary_units == "tokens"
    assert from_authors(random_weights(mergers=()), heads=HEADS).config.rotary_units == "patches"
