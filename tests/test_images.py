"""Image files of every kind become upright RGB pictures; those that cannot are errors that say why."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mllm_vision.images import load_image

RED_THEN_BLUE = np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8)  # one row


def saved(folder, image, name, **options):
    path = folder / name
    image.save(path, **options)
    return path


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def test_rgb_is_left_as_it_is(tmp_path):
    path = saved(tmp_path, Image.fromarray(RED_THEN_BLUE), "rgb.png")
    assert pixels(load_image(path)) == RED_THEN_BLUE.tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(tmp_path, orientation):
    upright = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3))
    # How a camera held this way would have stored it: the inverse of what EXIF asks a reader to do.
    transpose = Image.Transpose
    stored = {
        1: [],
        2: [transpose.FLIP_LEFT_RIGHT],
        3: [transpose.ROTATE_180],
        4: [transpose.FLIP_TOP_BOTTOM],
        5: [transpose.TRANSPOSE],
        6: [transpose.ROTATE_90],
        7: [transpose.TRANSVERSE],
        8: [transpose.ROTATE_270],
    }[orientation]
    image = upright
    for step in stored:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixels(load_image(saved(tmp_path, image, "turned.png", exif=exif))) == pixels(upright)


def test_unreadable_exif_is_ignored(tmp_path):
    path = saved(tmp_path, Image.fromarray(RED_THEN_BLUE), "exif.png", exif=b"Exif\0\0nonsense")
    assert pixels(load_image(path)) == RED_THEN_BLUE.tolist()


def test_16_bits_of_grey_are_scaled_not_clipped(tmp_path):
    grey = Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16))
    assert pixels(load_image(saved(tmp_path, grey, "grey.png"))) == [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]
    assert pixels(load_image(saved(tmp_path, grey, "grey.tiff"))) == [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]


def test_palette_with_a_transparent_colour_is_laid_on_white(tmp_path):
    image = Image.fromarray(RED_THEN_BLUE).quantize(2)
    blue = image.getpixel((1, 0))
    path = saved(tmp_path, image, "palette.png", transparency=blue)
    assert pixels(load_image(path)) == [[[255, 0, 0], [255, 255, 255]]]


def test_half_transparent_red_on_white_is_pink(tmp_path):
    image = Image.fromarray(np.array([[[255, 0, 0, 128], [0, 0, 255, 255]]], dtype=np.uint8))
    assert pixels(load_image(saved(tmp_path, image, "alpha.png"))) == [[[255, 127, 127], [0, 0, 255]]]


def test_grey_with_alpha_and_black_and_white_are_read(tmp_path):
    grey = Image.fromarray(np.array([[[10, 255], [10, 0]]], dtype=np.uint8))
    assert pixels(load_image(saved(tmp_path, grey, "la.png"))) == [[[10] * 3, [255] * 3]]
    bits = Image.fromarray(np.array([[True, False]]))
    assert pixels(load_image(saved(tmp_path, bits, "bits.png"))) == [[[255] * 3, [0] * 3]]


def test_cmyk_is_converted(tmp_path):
    path = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "cmyk.jpg", quality=100)
    red, green, blue = np.asarray(load_image(path)).reshape(-1, 3).T.astype(int)
    assert red.min() >= 250 and green.max() <= 5 and blue.max() <= 5  # JPEG is lossy


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    path = saved(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:])
    assert pixels(load_image(path)) == [[[255, 0, 0]] * 2] * 2


def test_errors_name_the_file_and_the_cause(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.png is no file; check the path"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="is a folder, not an image"):
        load_image(tmp_path)
    (tmp_path / "notes.png").write_text("to buy: milk")
    with pytest.raises(ValueError, match=r"notes\.png is not an image"):
        load_image(tmp_path / "notes.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty\.png is not an image"):
        load_image(tmp_path / "empty.png")
    floats = saved(tmp_path, Image.new("F", (2, 2)), "floats.tiff")
    with pytest.raises(ValueError, match=r"floats\.tiff has brightness in floats"):
        load_image(floats)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.gif", "cut.bmp", "cut.webp"])
def test_a_cut_off_file_is_an_error(tmp_path, name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    path = saved(tmp_path, noise, name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ValueError, match=r"cut\.\w+ is (damaged or cut off|not an image)"):
        load_image(path)


def test_damaged_bytes_are_an_error(tmp_path):
    path = saved(tmp_path, Image.fromarray(RED_THEN_BLUE), "damaged.png")
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 4] ^= 0xFF  # the head of the compressed stream
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged\.png is damaged or cut off"):
        load_image(path)


@pytest.mark.parametrize(("size", "accepted"), [((1, 200), True), ((1, 201), False), ((5000, 1), False)])
def test_an_extreme_shape_is_an_error_with_the_rule_and_the_remedy(tmp_path, size, accepted):
    path = saved(tmp_path, Image.new("RGB", size), "thin.png")
    if accepted:
        assert load_image(path).size == size
    else:
        with pytest.raises(ValueError, match=r"at most 200 times the other.*crop or pad it"):
            load_image(path)


def test_a_decompression_bomb_is_not_unpacked(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    png.seek(0, io.SEEK_END)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        png.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    (tmp_path / "bomb.png").write_bytes(png.getvalue())
    with pytest.raises(ValueError, match=r"bomb\.png would unpack to too large a picture.*shrink it first"):
        load_image(tmp_path / "bomb.png")


def test_a_picture_may_come_as_the_bytes_of_its_file(tmp_path):
    path = saved(tmp_path, Image.fromarray(RED_THEN_BLUE), "rgb.png")
    assert pixels(load_image(path.read_bytes())) == RED_THEN_BLUE.tolist()
    with pytest.raises(ValueError, match="picture of 3 bytes is not an image"):
        load_image(b"abc")
