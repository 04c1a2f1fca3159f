"""Spatial tokens: the algorithm written slowly, sizes on every grid, precision, gradients, the authors' key names."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mllm_vision.projectors import SpatialTokensConfig
from mllm_vision.projectors.spatial_tokens import (
    SpatialTokens,
    authors_names,
    centre_crop,
    detail_window,
    from_authors,
    scale_sizes,
)
from mllm_vision.registry import MethodConfig

VARIANTS = pytest.mark.parametrize("variant", ["pooling", "cropping"])
C, CHANNELS, D = 6, 4, 5


def built(variant, grid, scales, channels=CHANNELS, width=C, seed=0):
    torch.manual_seed(seed)
    config = SpatialTokensConfig(variant=variant, channels=channels, scales=scales)
    return SpatialTokens(config, grid, width, D)


def features_of(grid, images=2, width=C):
    return torch.randn(images, grid[0] * grid[1], width, generator=torch.Generator().manual_seed(1))


def normed(x, layers):
    norm, projection = layers
    x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
    return projection.weight @ x + projection.bias


def convolved(patches, kernel, top, left):
    """The kernel (O, C, h, w) on the patches (H, W, C) from row ``top`` and column ``left`` on: (O,)."""
    total = torch.zeros(len(kernel))
    for row in range(kernel.shape[2]):
        for column in range(kernel.shape[3]):
            total = total + kernel[:, :, row, column] @ patches[top + row, left + column]
    return total


def slow_pool(patches, h, w):
    height, width, channels = patches.shape
    cells = torch.zeros(h, w, channels)
    for r in range(h):
        for c in range(w):
            rows = range(r * height // h, math.ceil((r + 1) * height / h))
            columns = range(c * width // w, math.ceil((c + 1) * width / w))
            cells[r, c] = sum(patches[i, j] for i in rows for j in columns) / (len(rows) * len(columns))
    return cells


def slow_tokens(module, features, grid, details):
    """The tokens of one image; ``details``: kernel and stride along both sides."""
    (height, width), scales = grid, len(module.kernels)
    patches, tokens = features.view(height, width, -1), []
    for i, layer in enumerate(module.kernels, start=1):
        h, w = math.floor(height * i / scales), math.floor(width * i / scales)
        if module.details is None:
            tokens.append(convolved(slow_pool(patches, h, w), layer.weight, 0, 0))
        else:
            tokens.append(convolved(patches, layer.weight, math.floor((height - h) / 2), math.floor((width - w) / 2)))
    if module.details is not None:
        (tall, down), (across, right) = details
        places = [
            convolved(patches, module.details.conv.weight, top, left)
            for top in range(0, height - tall + 1, down)
            for left in range(0, width - across + 1, right)
        ]
        keys = torch.stack([normed(place, module.details.key) for place in places])
        values = torch.stack([normed(place, module.details.value) for place in places])
        for i, token in enumerate(tokens):
            scores = keys @ normed(token, module.details.query) / math.sqrt(len(token))
            tokens[i] = torch.cat([token, (scores.softmax(0)[:, None] * values).sum(0)])
    tokens = torch.stack(tokens)
    active = tokens * (1 + torch.erf(tokens / math.sqrt(2))) / 2
    projected = active @ module.project.weight.T
    return projected if module.project.bias is None else projected + module.project.bias


@VARIANTS
@pytest.mark.parametrize(
    ("grid", "scales", "details"),
    [
        ((10, 10), 6, ((6, 1), (6, 1))),
        ((27, 27), 3, ((19, 2), (19, 2))),
        ((12, 24), 6, ((8, 1), (16, 2))),
        ((7, 5), 5, ((3, 1), (1, 1))),
        ((4, 9), 3, ((1, 1), (5, 1))),
        ((2, 3), 2, ((1, 1), (1, 1))),
        ((1, 1), 1, ((1, 1), (1, 1))),
    ],
)
def test_equals_the_algorithm_written_slowly(grid, scales, details, variant):
    module, features = built(variant, grid, scales), features_of(grid)
    if module.details is not None:  # as if trained: by default the norms do nothing
        for role in (module.details.query, module.details.key, module.details.value):
            torch.nn.init.normal_(role[0].weight)
            torch.nn.init.normal_(role[0].bias)
    with torch.no_grad():
        expected = torch.stack([slow_tokens(module, image, grid, details) for image in features])
        torch.testing.assert_close(module(features), expected)


@pytest.mark.parametrize(
    ("grid", "scales", "sizes"),
    [
        ((24, 24), 6, [(4, 4), (8, 8), (12, 12), (16, 16), (20, 20), (24, 24)]),  # the paper's
        ((24, 24), 3, [(8, 8), (16, 16), (24, 24)]),
        ((24, 24), 12, [(side, side) for side in range(2, 25, 2)]),
        ((27, 27), 6, [(4, 4), (9, 9), (13, 13), (18, 18), (22, 22), (27, 27)]),
        ((10, 10), 6, [(1, 1), (3, 3), (5, 5), (6, 6), (8, 8), (10, 10)]),
        ((12, 24), 3, [(4, 8), (8, 16), (12, 24)]),
        ((5, 9), 1, [(5, 9)]),
    ],
)
def test_scales_of_a_grid(grid, scales, sizes):
    assert scale_sizes(grid, scales) == sizes


def test_details_are_taken_at_five_places_from_edge_to_edge():
    assert [detail_window(side) for side in (24, 27, 12, 10, 18, 37)] == [
        *((16, 2), (19, 2), (8, 1), (6, 1), (10, 2), (25, 3)),
    ]
    for side in range(1, 100):
        kernel, stride = detail_window(side)
        starts = range(0, side - kernel + 1, stride)
        assert (starts[-1] + kernel, len(starts)) == (side, min(side, 5))


def test_the_centre_of_a_map_to_check_by_eye():
    patches = torch.arange(20).view(1, 1, 4, 5)
    #   0  1  2  3  4
    #   5  6  7  8  9
    #  10 11 12 13 14
    #  15 16 17 18 19
    assert centre_crop(patches, (2, 3)).tolist() == [[[[6, 7, 8], [11, 12, 13]]]]
    assert centre_crop(patches, (3, 2)).tolist() == [[[[1, 2], [6, 7], [11, 12]]]]
    assert centre_crop(patches, (4, 5)).data_ptr() == patches.data_ptr()


@VARIANTS
@pytest.mark.parametrize("scales", [3, 6, 12])
def test_a_batch_equals_one_by_one(variant, scales):
    module, features = built(variant, (24, 24), scales), features_of((24, 24), images=3)
    with torch.no_grad():
        together = module(features)
        assert together.shape == (3, scales, D)
        torch.testing.assert_close(together, torch.cat([module(image[None]) for image in features]))
        assert module(features[:0]).shape == (0, scales, D)


class Made(TorchDispatchMode):
    """Elements of every tensor that an operation makes; a view makes none."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements += [t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


@VARIANTS
def test_kernels_are_only_read_and_images_go_together(variant):
    module = built(variant, (12, 12), 3, channels=512)
    operations = []
    for images in (2, 3):
        with torch.no_grad(), Made() as made:
            module(features_of((12, 12), images))
        assert max(made.elements) < module.kernels[0].weight.numel()
        operations.append(len(made.elements))
    assert operations[0] == operations[1]


@VARIANTS
def test_gradients_reach_every_parameter_and_the_features(variant):
    module, features = built(variant, (6, 8), 3).double(), features_of((6, 8)).double().requires_grad_()
    weigh = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(2))
    (module(features) * weigh).sum().backward()
    unmoved = [name for name, p in module.named_parameters() if float(p.grad.abs().max()) < 1e-9]
    # What shifts all scores of a token alike changes nothing.
    assert unmoved == ([] if variant == "pooling" else ["details.key.0.bias", "details.key.1.bias"])
    assert bool((features.grad.abs().amax(-1) > 1e-9).all())


@VARIANTS
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_lower_precision_is_near_and_finite(variant, how):
    module, features = built(variant, (10, 10), 6, channels=32, width=32), features_of((10, 10), width=32)
    with torch.no_grad():
        exact = module(features)
        if how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                near = module(features)
            dtype = torch.bfloat16
        else:
            dtype = getattr(torch, how)
            near = module.to(dtype)(features.to(dtype))
    assert near.dtype == dtype
    # bfloat16 has 8 bits, and a token passes six roundings on its way.
    torch.testing.assert_close(near.float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_beyond_the_range_of_float16_leave_tokens_finite(dtype):
    module = built("cropping", (10, 10), 6, channels=32).to(dtype)
    with torch.no_grad():
        for role in (module.details.query, module.details.key):
            role[1].weight.mul_(1e3)  # scores about 1e6
        assert bool(module(features_of((10, 10)).to(dtype)).isfinite().all())


@VARIANTS
def test_state_survives_storage(variant):
    module, other, features = built(variant, (6, 8), 3), built(variant, (6, 8), 3, seed=1), features_of((6, 8))
    with torch.no_grad():
        assert not torch.equal(module(features), other(features))
        other.load_state_dict(module.state_dict())
        assert torch.equal(module(features), other(features))


@pytest.mark.parametrize(
    ("variant", "parameters", "flops"), [("pooling", 765_460_480, 1.552e9), ("cropping", 902_570_496, 8.318e9)]
)
def test_what_it_costs_on_the_published_tower(variant, parameters, flops):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        module = SpatialTokens(SpatialTokensConfig(variant=variant), (24, 24), 1024, 4096)
        module(torch.empty(1, 576, 1024))
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert counter.get_total_flops() == pytest.approx(flops, rel=1e-3)


def test_the_config_is_stored_and_says_that_it_needs_weights():
    config = SpatialTokensConfig(variant="pooling", scales=3)
    assert config.to_dict() == {"type": "spatial_tokens", "variant": "pooling", "scales": 3}
    assert MethodConfig.from_dict(config.to_dict()) == config
    assert SpatialTokensConfig().to_dict() == {"type": "spatial_tokens"}
    assert (config.kind, config.needs_weights) == ("projector", True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "crop"}, "variant must be one of 'pooling', 'cropping', got 'crop'"),
        ({"channels": 0}, "channels must be 1 or more, got 0"),
        ({"scales": 0}, "scales must be 1 or more, got 0"),
        ({"scales": 2.0}, "scales must be of type int, got 2.0"),
        ({"kernel": 16}, "SpatialTokensConfig has no field kernel; its fields are variant, channels, scales"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SpatialTokensConfig(**fields)


def test_more_scales_than_rows_are_refused():
    with pytest.raises(ValueError, match=r"scales must be in 1..4 on a 9 x 4 grid, got 6"):
        SpatialTokens(SpatialTokensConfig(), (9, 4), C, D)


@pytest.mark.parametrize("shape", [(2, 36, C), (2, 35, C + 1), (35, C), (1, 2, 35, C)])
def test_patches_of_another_grid_are_refused(shape):
    with pytest.raises(
        ValueError, match=rf"a 5 x 7 grid, \(images, 35, 6\), got \({shape[0]}, .* build spatial tokens"
    ):
        built("pooling", (5, 7), 2)(torch.zeros(shape))


def theirs(variant, side, scales):
    """A state dict under the authors' names."""
    ours = built(variant, (side, side), scales).state_dict()
    mlp = {f"mm_projector.{layer}.bias": torch.ones(D) for layer in (0, 2)}
    return {name: ours[our_name] for name, our_name in authors_names(variant, side, scales).items()} | mlp


@pytest.mark.parametrize(
    ("variant", "side", "scales"),
    [
        *(("pooling", 24, 6), ("pooling", 24, 3), ("pooling", 6, 2), ("cropping", 24, 6), ("cropping", 24, 12)),
        *(("pooling", 16, 6), ("cropping", 14, 6), ("pooling", 27, 12), ("cropping", 24, 5), ("pooling", 24, 1)),
    ],
)
def test_the_authors_checkpoint_tells_its_variant_and_sizes(variant, side, scales):
    weights = theirs(variant, side, scales)
    found = from_authors(weights)
    assert found.config == SpatialTokensConfig(variant=variant, channels=CHANNELS, scales=scales)
    assert (found.grid, found.width, found.out) == ((side, side), C, D)
    expected = built(variant, (side, side), scales).state_dict()
    assert found.spatial.keys() == expected.keys()
    assert all(torch.equal(found.spatial[name], expected[name]) for name in expected)
    assert sorted(found.patch_branch) == ["mm_projector.0.bias", "mm_projector.2.bias"]


@pytest.mark.parametrize("variant", ["pooling", "cropping"])
def test_whatever_key_is_missing_is_named(variant):
    whole = theirs(variant, 24, 6)
    for name in authors_names(variant, 24, 6):
        with pytest.raises(
            ValueError, match=rf"6 {variant} scales on a 24 x 24 grid: missing are {name}, surplus are none"
        ):
            from_authors(without(whole, name), side=24)


def without(weights, *names):
    return {name: weight for name, weight in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            without(theirs("cropping", 24, 6), "conv_20.weight", "value_projector.1.bias"),
            "not the weights of 6 cropping scales on a 24 x 24 grid: missing are conv_20.weight, "
            "value_projector.1.bias, surplus are none",
        ),
        (
            theirs("pooling", 24, 6) | {"conv_CM.weight": torch.zeros(4, 6, 16, 16), "norm.weight": torch.zeros(1)},
            "6 pooling scales on a 24 x 24 grid: missing are none, surplus are conv_CM.weight, norm.weight",
        ),
        (
            theirs("pooling", 24, 6) | {"conv_12.1.weight": torch.zeros(4, 6, 10, 10)},
            r"conv_12.1.weight must be \(4, 6, 12, 12\) beside conv_24.weight, got \(4, 6, 10, 10\)",
        ),
        (
            {f"model.{name}": weight for name, weight in theirs("pooling", 24, 3).items()},
            "expected keys such as conv_4.weight, without a prefix, got model.conv_8.1.weight, ",
        ),
        ({}, "without a prefix, got none"),
    ],
    ids=["missing", "surplus", "shape", "prefix", "empty"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        from_authors(weights)
