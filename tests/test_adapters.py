"""What down-sampling asks of the adapters: places on a coarser grid, and pixels brought to it."""

import torch
from torch.nn.functional import interpolate

from mllm_vision.adapters import llava_next, qwen2_5_vl
from mllm_vision.host import Layout
from tests.hosts import HOSTS, picture


def host(name):
    return next(host for host in HOSTS if host.name == name)


def test_a_coarse_cell_stands_where_the_patch_at_its_centre_stands():
    # A CLS token, then 4 x 6 patches; a 2 x 3 grid has its centres at rows 1 and 3, columns 1, 3 and 5.
    layout = Layout((4, 6), 1, torch.tensor([-1, *range(24)]))
    assert layout.place.tolist() == list(range(1, 25))
    assert layout.place_on((2, 3)).tolist() == [1 + row * 6 + column for row in (1, 3) for column in (1, 3, 5)]
    assert layout.place_on((1, 1)).tolist() == [1 + 2 * 6 + 3]


def test_a_coarse_cell_over_padding_has_no_place():
    # Two tiles of 2 x 2; of the second only the lower row is shown, with a newline (-1) behind it.
    layout = Layout((2, 2), 2, torch.tensor([0, 1, 2, 3, 6, 7, -1]))
    assert layout.place.tolist() == [0, 1, 2, 3, -1, -1, 4, 5]
    assert layout.place_on((2, 1)).tolist() == [1, 3, -1, 5]


def patchify(frames, side=14, merge=2):
    """Frames (F, 3, H, W) to patches in the order of blocks of merge x merge, with loops."""
    _, _, height, width = frames.shape
    block = side * merge
    return torch.stack(
        [
            frames[:, :, y : y + side, x : x + side].transpose(0, 1).flatten()
            for top in range(0, height, block)
            for left in range(0, width, block)
            for y in range(top, top + block, side)
            for x in range(left, left + block, side)
        ]
    )


def test_patches_are_resized_as_the_picture_they_were_cut_from():
    row = host("qwen2.5-vl")
    image = picture(1, 168, 112)
    processor = row.processor.image_processor
    inputs = processor(images=[image], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 12]]
    levels = torch.tensor(list(image.getdata())).view(112, 168, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    frames = ((levels - mean) / std).repeat(2, 1, 1, 1)
    torch.testing.assert_close(inputs["pixel_values"], patchify(frames))  # the loops are the processor's order
    smaller = interpolate(frames, size=(56, 84), mode="bicubic", antialias=True)
    vision = row.model().config.vision_config
    resized = qwen2_5_vl.resize_patches(inputs["pixel_values"], (1, 8, 12), (1, 4, 6), vision)
    torch.testing.assert_close(resized, patchify(smaller))


@torch.no_grad()
def test_tiles_on_their_own_grid_are_encoded_as_by_the_stock_method():
    row = host("llava-next")
    model, adapter = row.model(), llava_next.ADAPTER
    inputs = row.inputs(("Both {} and {}", [picture(2, 120, 60), picture(3, 60, 120)]))
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    layouts = adapter.layouts(model, images)
    stock = adapter.encode(model, images, layouts, [layout.grid for layout in layouts])
    projected, maps = adapter._encode_resized(model, images, [layout.grid for layout in layouts])
    for i, (layout, expected) in enumerate(zip(layouts, stock, strict=True)):
        shown = layout.place >= 0
        torch.testing.assert_close(projected[i].flatten(0, 1)[shown], expected.on_patches[shown])
        torch.testing.assert_close(maps[i], expected.maps)
