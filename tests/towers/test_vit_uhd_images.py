"""The image processor of ViT-UHD: sizes of every ratio, and every kind of picture, handled or refused in words."""

import base64
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import httpx
from PIL import Image

from mllm_vision.towers import ViTUHDConfig, ViTUHDImageProcessor, ViTUHDModel
from mllm_vision.towers.vit_uhd.image_processing import fitted_size, patchify

BOUNDS = dict(min_pixels=20**2, max_pixels=60**2)
TINY = dict(patch_size=5, merge_size=2, **BOUNDS)
RAW = dict(do_rescale=False, do_normalize=False)


def pixels_of(image, **settings):
    """The picture (3, H, W) that the processor encodes, in 0..255, put together from its patches."""
    out = ViTUHDImageProcessor(**TINY)(image, return_tensors="np", **RAW | settings)
    ((height, width),) = out["image_sizes"]
    cells = out["pixel_values"].reshape(height // 5, width // 5, 3, 5, 5)
    return cells.transpose(2, 0, 3, 1, 4).reshape(3, height, width)


def colours(width=40, height=20):
    """A picture whose four quarters are red, green, blue and grey, of the size that it is encoded in."""
    image = Image.new("RGB", (width, height), "red")
    for box, colour in (((1, 0), "lime"), ((0, 1), "blue"), ((1, 1), (102, 102, 102))):  # a palette has them all
        image.paste(colour, tuple(c * s // 2 for c, s in zip((*box, 2, 2), (width, height) * 2, strict=True)))
    return image


def channels_first(image):
    return np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)


def test_a_picture_that_fits_is_cut_and_not_changed():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    out = ViTUHDImageProcessor(**TINY)([image, colours(40, 40)], return_tensors="pt")
    assert out["image_sizes"].tolist() == [[20, 40], [40, 40]]
    assert out["pixel_values"].dtype == torch.float32
    # patch (2, 3) by eye: rows 10 to 14, columns 15 to 19; brightness 0..255 becomes -1..1
    patch = torch.from_numpy(np.asarray(image)[10:15, 15:20].copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(out["pixel_values"][2 * 8 + 3], patch)
    assert out["pixel_values"].shape == (4 * 8 + 8 * 8, 3, 5, 5)
    np.testing.assert_array_equal(pixels_of(image), channels_first(image))


def test_a_picture_that_does_not_fit_is_resized_bicubically():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8))
    expected = image.resize((40, 30), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels_of(image), channels_first(expected))


def test_patches_by_eye():
    image = np.arange(16).reshape(1, 4, 4)
    assert patchify(image, 2)[:, 0].tolist() == [
        [[0, 1], [4, 5]],
        [[2, 3], [6, 7]],
        [[8, 9], [12, 13]],
        [[10, 11], [14, 15]],
    ]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((20, 40), (20, 40)),  # fits
        ((24, 36), (20, 30)),  # 2.4 x 3.6 units: of the four pairs around, 2 x 3 keeps the ratio
        ((1, 1), (20, 20)),  # scaled until it has min_pixels
        ((2, 60), (10, 300)),  # the shorter side becomes one unit, the other follows
        ((600, 800), (50, 70)),  # scaled until it has max_pixels
    ],
)
def test_sizes_by_eye(size, expected):
    assert fitted_size(*size, 10, **BOUNDS) == expected


def test_every_size_is_in_bounds_and_distorted_by_the_rounding_alone():
    rng = random.Random(0)
    for _ in range(2000):
        unit, least = rng.choice([1, 8, 40]), rng.choice([0, 100, 512**2])
        most = max(2 * least, unit**2) + rng.choice([0, 10, 1560**2])
        height, width = (round(math.exp(rng.uniform(0, 8))) for _ in range(2))
        if max(height, width) * unit**2 > min(height, width) * most:
            continue
        new = fitted_size(height, width, unit, least, most)
        assert new[0] % unit == new[1] % unit == 0
        assert least <= new[0] * new[1] <= most
        # One scale brings both sides to less than a unit from where they are put.
        ranges = [((n - unit) / side, (n + unit) / side) for n, side in zip(new, (height, width), strict=True)]
        assert max(low for low, _ in ranges) < min(high for _, high in ranges)
        if least <= height * width <= most and height % unit == width % unit == 0:
            assert new == (height, width)


def test_the_number_of_tokens_is_known_before():
    config = ViTUHDConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        patch_size=5,
        merger_layers=(0,),
    )
    processor, tower = ViTUHDImageProcessor.for_tower(config, **BOUNDS), ViTUHDModel(config)
    sizes = [(1, 1), (20, 600), (33, 47), (400, 300)]
    out = processor([Image.new("RGB", (width, height)) for height, width in sizes], return_tensors="pt")
    with torch.no_grad():
        encoded = tower(out["pixel_values"], out["image_sizes"])
    counts = [processor.token_count(*size) for size in sizes]
    assert counts == encoded.grid_hw.prod(1).tolist() == [4, 32, 12, 35]
    assert sum(counts) == encoded.last_hidden_state.shape[1]
    assert ViTUHDImageProcessor().token_count(1024, 1024) == 26**2


def test_one_pixel_and_20_x_4000_are_enlarged_and_keep_their_ratio():
    dot = ViTUHDImageProcessor()(Image.new("RGB", (1, 1), (10, 20, 30)), return_tensors="np", **RAW)
    assert dot["image_sizes"].tolist() == [[520, 520]]
    assert (dot["pixel_values"] == np.array([10, 20, 30])[:, None, None]).all()
    strip = ViTUHDImageProcessor()(Image.new("RGB", (4000, 20)), return_tensors="np")
    assert strip["image_sizes"].tolist() == [[40, 8000]]


def test_grids_of_several_pictures_are_independent_of_their_company():
    processor = ViTUHDImageProcessor(**TINY)
    pictures = [colours(40, 20), colours(23, 61), colours(31, 29)]
    together = processor(pictures, return_tensors="pt")
    alone = [processor(picture, return_tensors="pt") for picture in pictures]
    for name in ("pixel_values", "image_sizes"):
        assert torch.equal(together[name], torch.cat([out[name] for out in alone]))
    nested = processor([pictures[:1], pictures[1:]], return_tensors="pt")
    assert torch.equal(nested["pixel_values"], together["pixel_values"])


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "P", "RGBA", "PA", "YCbCr"])
def test_a_picture_is_encoded_alike_in_every_mode(mode):
    image = colours().convert("RGBA").convert("PA") if mode == "PA" else colours().convert(mode)
    limit = 2 if mode == "YCbCr" else 0  # which rounds
    assert np.abs(pixels_of(image) - channels_first(colours())).max() <= limit


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16", "I"])
def test_a_grey_picture_is_encoded_alike_in_every_mode(mode):
    grey = np.where(np.arange(40) < 20, 0, 255).astype(np.uint8)[None].repeat(20, 0)
    image = Image.fromarray(grey)
    if mode in ("I;16", "I"):
        image = Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey.astype(np.int32) * 257)
        assert image.mode == mode
    else:
        image = image.convert(mode)
    np.testing.assert_array_equal(pixels_of(image), np.broadcast_to(grey, (3, 20, 40)))


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 40).astype(np.uint16)[None].repeat(20, 0)
    expected = np.broadcast_to(ramp // 257, (3, 20, 40))
    for image in (Image.fromarray(ramp), ramp, ramp[..., None].repeat(3, -1), torch.from_numpy(ramp)):
        np.testing.assert_array_equal(pixels_of(image), expected)


def test_what_is_transparent_becomes_white():
    image = colours().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    keyed = colours().convert("P")
    keyed.info["transparency"] = keyed.getpixel((0, 0))  # red
    expected = channels_first(colours()).copy()
    expected[:, :10, :20] = 255
    np.testing.assert_array_equal(pixels_of(image), np.full((3, 20, 40), 255))
    np.testing.assert_array_equal(pixels_of(np.asarray(image)), np.full((3, 20, 40), 255))
    np.testing.assert_array_equal(pixels_of(keyed), expected)


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen turned right by a quarter
    colours().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for image in (tmp_path / "turned.png", str(tmp_path / "turned.png"), Image.open(tmp_path / "turned.png")):
        np.testing.assert_array_equal(pixels_of(image), channels_first(colours()))


def test_a_file_keeps_its_sixteen_bits(tmp_path):
    ramp = np.linspace(0, 65535, 40).astype(np.uint16)[None].repeat(20, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(pixels_of([str(tmp_path / "deep.png")])[0], ramp // 257)


@pytest.mark.parametrize("change", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_arrays_and_tensors_are_encoded_as_pictures(dtype, change):
    last = np.asarray(colours()).astype(dtype)
    first = np.ascontiguousarray(np.moveaxis(last, -1, 0))
    for pixels in (last, first):
        np.testing.assert_array_equal(pixels_of(change(pixels)), channels_first(colours()))


def test_floats_that_are_rescaled_already():
    floats = np.asarray(colours()).astype(np.float32) / 255
    processor = ViTUHDImageProcessor(**TINY)
    expected = processor(colours(), return_tensors="pt")["pixel_values"]
    rescaled = processor(floats, do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(rescaled, expected, atol=0.01, rtol=0)  # Pillow takes 8 bits, cut off
    grey = processor(floats[..., :1], do_rescale=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(grey[:, 0], rescaled[:, 0]) and torch.equal(grey[:, 2], rescaled[:, 0])
    with pytest.raises(ValueError, match="got floats up to 1, which are rescaled already; set do_rescale to False"):
        processor(floats)


@pytest.mark.parametrize(
    ("image", "settings", "message"),
    [
        (Image.new("F", (40, 20)), {}, "brightness in floats of no defined range"),
        (np.full((20, 40, 3), 256), {}, r"integers in 0\.\.255, uint16 or floats, got int64 in 256\.\.256"),
        (np.full((20, 40, 3), -1), {}, r"got int64 in -1\.\.-1"),
        (np.zeros((20, 40, 3), bool), {}, "got bool"),
        (np.zeros((20, 40, 4), np.float32), {}, "floats with transparency are not supported"),
        (np.zeros((20, 40, 2), np.uint8), {}, "Unable to infer channel dimension"),
        (Image.new("RGB", (0, 20)), {}, "needs pixels, got 20 x 0"),
        (
            Image.new("RGB", (600, 10)),
            {},
            "10 x 600 pixels is too long and thin: one side may be at most 36 times the other",
        ),
        (Image.new("RGB", (45, 20)), dict(do_resize=False), "multiples of 10 .* got 20 x 45"),
        (Image.new("RGB", (40, 20)), dict(min_pixels=2000), "at least twice min_pixels and 10 x 10, got 3600 and 2000"),
        ([], {}, "got no images"),
        ("no/such/picture.png", {}, "no/such/picture.png"),
    ],
)
def test_pictures_that_are_refused(image, settings, message):
    with pytest.raises(ValueError, match=message):
        pixels_of(image, **settings)


def test_a_call_may_override_the_settings():
    image = Image.new("RGB", (40, 20))
    out = ViTUHDImageProcessor(**TINY)(image, patch_size=10, merge_size=1, do_resize=False, return_tensors="np")
    assert out["pixel_values"].shape == (8, 3, 10, 10)
    assert out["image_sizes"].tolist() == [[20, 40]]


@pytest.mark.parametrize("name", ["path", "data", "base64", "url"])
def test_whatever_a_string_names_keeps_its_bits_and_its_white_ground(name, tmp_path, monkeypatch):
    deep = Image.fromarray(np.full((20, 40), 32768, dtype=np.uint16))
    clear = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    for image, level in ((deep, 127), (clear, 255)):
        path = tmp_path / "image.png"
        image.save(path)
        text = base64.b64encode(path.read_bytes()).decode()
        reply = httpx.Response(200, content=path.read_bytes(), request=httpx.Request("GET", "http://example.org"))
        monkeypatch.setattr(httpx, "get", lambda url, reply=reply, **_: reply)
        named = {
            "path": str(path),
            "data": f"data:image/png;base64,{text}",
            "base64": text,
            "url": "http://example.org",
        }
        assert (pixels_of(named[name]) == level).all()


def test_a_string_that_names_nothing_is_said():
    with pytest.raises(ValueError, match=r"'no such\.png' is no file, no URL and no base64; check the path"):
        ViTUHDImageProcessor(**TINY)("no such.png")
    with pytest.raises(ValueError, match="is a folder, not an image"):
        ViTUHDImageProcessor(**TINY)(str(Path(__file__).parent))


def test_a_file_may_be_as_thin_as_a_picture(tmp_path):
    Image.new("RGB", (4000, 19)).save(tmp_path / "strip.png")
    out = ViTUHDImageProcessor()(str(tmp_path / "strip.png"), return_tensors="np")
    assert out["image_sizes"].tolist() == ViTUHDImageProcessor()(Image.new("RGB", (4000, 19)))["image_sizes"].tolist()


@pytest.mark.parametrize("most", [1, 255])
def test_floats_are_resized_as_floats(most):
    board = np.indices((50, 50)).sum(0) % 2 * 1.0  # nothing between black and white
    fractions = np.random.default_rng(0).random((50, 50))
    for levels in (board, fractions):
        picture = np.repeat(levels[None], 3, axis=0)
        out = pixels_of((picture * most).astype(np.float32), do_resize=True, min_pixels=400, max_pixels=900)
        channel = Image.fromarray(levels.astype(np.float32)).resize(out.shape[:0:-1], Image.Resampling.BICUBIC)
        expected = np.asarray(channel).clip(levels.min(), levels.max()) * most
        np.testing.assert_allclose(out, np.repeat(expected[None], 3, axis=0), rtol=1e-4, atol=1e-4 * most)


def test_numbers_that_are_no_brightness_are_refused():
    for wrong in (np.nan, np.inf):
        picture = np.full((3, 20, 40), 0.5, dtype=np.float32)
        picture[1, 2, 3] = wrong
        with pytest.raises(ValueError, match="no brightness"):
            ViTUHDImageProcessor(**TINY)(picture, do_rescale=False)


def test_tensors_of_a_graph_and_of_half_precision_are_pictures_too():
    picture = torch.rand(3, 20, 40)
    expected = ViTUHDImageProcessor(**TINY)(picture, do_rescale=False, return_tensors="pt")["pixel_values"]
    tracked = ViTUHDImageProcessor(**TINY)(picture.requires_grad_(), do_rescale=False, return_tensors="pt")
    assert torch.equal(tracked["pixel_values"], expected)
    coarse = ViTUHDImageProcessor(**TINY)(picture.bfloat16(), do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(coarse, expected, atol=0.01, rtol=0.01)  # bf16 keeps 8 bits
