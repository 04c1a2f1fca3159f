"""Pictures of kept tokens: what is bright, what is dim, what is outlined, on small grids that a person can check."""

import numpy as np
import pytest
import torch
from PIL import Image

import mllm_vision as mv
from mllm_vision.api import KeptTokens
from mllm_vision.pictures import DIMMED, ROLE_COLOURS, SheetCell, SheetRow, contact_sheet, draw_kept, tile_pictures
from mllm_vision.reducers import HiPruneConfig, PoolConfig
from tests.hosts import HOSTS, picture

HOST = {host.name: host for host in HOSTS}
GREY = 200


def kept_tokens(grid, patches, counts=None, roles=None, tile=0):
    counts = [1] * len(patches) if counts is None else counts
    return KeptTokens(0, tile, grid, torch.tensor(patches, dtype=torch.long), torch.tensor(counts), roles, 0)


def grey_tile(width=40, height=40):
    return Image.new("RGB", (width, height), (GREY,) * 3)


def drawn(kept, *, tile=None, side=40):
    """The drawing of one tile without its legend, (height, width, 3)."""
    return np.asarray(draw_kept([tile or grey_tile()], [kept], side=side, legend=False))


def test_dropped_patches_are_dim_and_kept_ones_as_they_were():
    pixels = drawn(kept_tokens((2, 2), [1]))
    assert pixels.shape == (40, 40, 3)
    assert pixels[10, 30].tolist() == [GREY] * 3  # top right: patch 1
    for row, column in ((10, 10), (30, 10), (30, 30)):
        assert pixels[row, column] == pytest.approx([GREY * DIMMED] * 3, abs=1)


def test_outline_has_the_colour_of_the_role():
    pixels = drawn(kept_tokens((2, 2), [0, 3], roles=["anchor", "register"]))
    assert tuple(pixels[0, 10]) == ROLE_COLOURS["anchor"]
    assert tuple(pixels[39, 30]) == ROLE_COLOURS["register"]
    assert tuple(drawn(kept_tokens((2, 2), [0]))[0, 10]) == ROLE_COLOURS["kept"]


def test_roles_nobody_heard_of_have_colours_of_their_own():
    pixels = drawn(kept_tokens((1, 3), [0, 1, 2], roles=["scout", "guard", "anchor"]), side=90)
    colours = {tuple(pixels[0, x]) for x in (15, 45, 75)}
    assert len(colours) == 3
    assert ROLE_COLOURS["anchor"] in colours


def test_pooled_tokens_are_drawn_as_their_cells():
    # 3 x 3 patches in 2 x 1 cells: rows 0 and 1 (with i * 2 // 3 == 0), then row 2
    pixels = drawn(kept_tokens((3, 3), [1, 7], counts=[6, 3]), tile=grey_tile(60, 60), side=60)
    border = np.all(pixels == ROLE_COLOURS["kept"], axis=-1)
    assert border[[0, 39, 40, 59]].all()  # the edges of both cells
    assert not border[1:39, 1:59].any() and not border[41:59, 1:59].any()
    assert pixels[20, 30].tolist() == [GREY] * 3


def test_merged_tokens_that_form_no_cells_are_drawn_on_their_patch():
    pixels = drawn(kept_tokens((2, 2), [0, 1], counts=[3, 1]))
    assert pixels[10, 10].tolist() == pixels[10, 30].tolist() == [GREY] * 3
    assert pixels[30, 10] == pytest.approx([GREY * DIMMED] * 3, abs=1)


def test_a_grid_that_is_not_square_covers_the_picture():
    pixels = drawn(kept_tokens((1, 4), [3]), tile=grey_tile(80, 20), side=80)
    assert pixels.shape == (20, 80, 3)
    assert pixels[10, 70].tolist() == [GREY] * 3
    assert pixels[10, 50].max() < GREY / 2


def test_tiles_stand_side_by_side_above_the_legend():
    kept = [kept_tokens((2, 2), [0], tile=0), kept_tokens((2, 2), [], tile=1)]
    picture_of_both = draw_kept([grey_tile(), grey_tile()], kept, side=80)
    pixels = np.asarray(picture_of_both)
    assert picture_of_both.width == 80 + 2 + 80
    assert picture_of_both.height > 80
    assert pixels[20, 20].tolist() == [GREY] * 3
    assert pixels[20, 80 + 2 + 20].max() < GREY / 2
    legend = pixels[80:].reshape(-1, 3).tolist()
    assert list(ROLE_COLOURS["kept"]) in legend and list(ROLE_COLOURS["anchor"]) not in legend


def test_a_tile_without_a_picture_is_an_error():
    with pytest.raises(ValueError, match="every tile needs a picture, got 1 pictures for 2 tiles"):
        draw_kept([grey_tile()], [kept_tokens((2, 2), [0]), kept_tokens((2, 2), [0], tile=1)])
    with pytest.raises(ValueError, match="got 1 pictures for 0 tiles"):
        draw_kept([grey_tile()], [])


def test_tile_pictures_undo_the_normalisation():
    host, image = HOST["llava-clip"], picture(1)
    inputs = host.inputs(("{} What?", [picture(2)]), ("{} What?", [image]))
    (seen,) = tile_pictures(image, 1, inputs, host.processor.image_processor)
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(image)).max() <= 1  # rounding


def test_tile_pictures_of_a_host_that_cuts_images_are_its_tiles():
    host, image = HOST["llava-next"], picture(1, 112, 112)
    inputs = host.inputs(("{} What?", [image]))
    tiles = tile_pictures(image, 0, inputs, host.processor.image_processor)
    assert len(tiles) == len(mv.inspect_tokens(host.model(), **inputs)) == 5
    # Tile 0 is the whole image, made smaller; the others are its quarters.
    for tile, box in zip(tiles[1:], ((0, 0), (56, 0), (0, 56), (56, 56)), strict=True):
        quarter = np.asarray(image.crop((*box, box[0] + 56, box[1] + 56))).astype(int)
        assert np.abs(np.asarray(tile) - quarter).max() <= 1


def test_tile_pictures_of_a_host_that_takes_patches_are_the_image():
    host, image = HOST["qwen2.5-vl"], picture(1)
    inputs = host.inputs(("{} What?", [image]))
    assert tile_pictures(image, 0, inputs, host.processor.image_processor) == [image]


@pytest.mark.parametrize("config", [HiPruneConfig(keep=9, alpha=0.5), PoolConfig(keep=9)], ids=lambda c: c.type)
def test_every_host_can_be_drawn(host, config):
    image = picture(1, 112, 84)
    inputs = host.inputs(("{} What?", [image]))
    kept = mv.inspect_tokens(mv.apply(host.model(), config), **inputs)
    tiles = tile_pictures(image, 0, inputs, host.processor.image_processor)
    assert len(tiles) == len(kept)
    assert draw_kept(tiles, kept, side=112).mode == "RGB"


def test_contact_sheet_has_a_cell_for_each_question_and_method():
    kept = [kept_tokens((2, 2), [0], roles=["buffer"])]
    small = Image.new("RGB", (60, 60), (1, 2, 3))
    cells = [SheetCell(small, kept, "red", True), SheetCell(small, kept, "blue", False)]
    rows = [SheetRow("what color is the very small circle?", "red", cells), SheetRow("is it?", "yes", cells)]
    pixels = np.asarray(contact_sheet(["all\n4 tokens", "hiprune\n1 token"], rows))
    pictured = np.all(pixels == (1, 2, 3), axis=-1)
    assert pictured.sum() == 4 * 60 * 60
    assert pictured.any(0).sum() == pictured.any(1).sum() == 2 * 60
    colours = set(map(tuple, pixels.reshape(-1, 3).tolist()))
    assert ROLE_COLOURS["buffer"] in colours  # the legend
    assert ROLE_COLOURS["anchor"] not in colours
