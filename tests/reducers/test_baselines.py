"""Random, pooling, CLS attention and down-sampling."""

import pytest
import torch

from mllm_vision.operations import TowerFacts, coarse_grid
from mllm_vision.reducers import CLSTopKConfig, DownsampleConfig, PoolConfig, RandomConfig
from mllm_vision.tokens import AttentionFromCLS, VisualTokens

TOWER = TowerFacts(depth=8, has_cls=True, object_layer=2, deep_layer=-2, width=6, out=5, image_tokens=24)


def tokens(images=2, grid=(4, 6), tiles=1, patches=None):
    size = tiles * grid[0] * grid[1]
    index = torch.arange(size) if patches is None else torch.tensor(patches)
    index = index.expand(images, -1)
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(images, index.shape[1], 3, generator=generator)
    evidence = {AttentionFromCLS(6): torch.rand(images, size, generator=generator)}
    return VisualTokens(features, index, torch.ones_like(index), grid, tiles, evidence)


def slow_pool(features, patches, grid, tiles, coarse):
    """One image, (cells, C) with loops over the patches that have a token."""
    (height, width), (h, w) = grid, coarse
    cells = {}
    for feature, patch in zip(features, patches, strict=True):
        tile, inside = divmod(patch, height * width)
        row, column = divmod(inside, width)
        cells.setdefault((tile, row * h // height, column * w // width), []).append(feature)
    return torch.stack([torch.stack(cells[cell]).mean(0) for cell in sorted(cells)])


@pytest.mark.parametrize(
    ("grid", "tiles", "keep", "coarse"), [((4, 6), 1, 6, (2, 3)), ((5, 5), 2, 8, (2, 2)), ((24, 24), 1, 192, (12, 16))]
)
def test_pool_averages_each_cell(grid, tiles, keep, coarse):
    before = tokens(grid=grid, tiles=tiles)
    after = PoolConfig(keep=keep).build(TOWER)(before)
    for image in range(2):
        expected = slow_pool(before.features[image], before.patch_index[image].tolist(), grid, tiles, coarse)
        torch.testing.assert_close(after.features[image], expected)
    assert after.patch_count.sum(1).tolist() == [before.features.shape[1]] * 2


def test_pool_leaves_missing_patches_out_and_stands_on_its_most_central_patch():
    before = tokens(images=1, grid=(3, 6), patches=[0, 1, 2, 6, 8, 12, 13, 14, 16])  # 7 is missing
    after = PoolConfig(keep=2).build(TOWER)(before)
    torch.testing.assert_close(after.features[0, 0], before.features[0, :8].mean(0))
    assert after.patch_count.tolist() == [[8, 1]]
    assert after.patch_index[0, 0].item() in {1, 6, 8, 13}
    assert after.patch_index[0, 1].item() == 16


def test_pool_weighs_tokens_by_their_patches():
    before = tokens(images=1, grid=(1, 2))
    before.patch_count = torch.tensor([[3, 1]])
    after = PoolConfig(keep=1).build(TOWER)(before)
    torch.testing.assert_close(after.features[0, 0], 0.75 * before.features[0, 0] + 0.25 * before.features[0, 1])
    assert after.patch_count.tolist() == [[4]]


def test_pool_after_a_method_that_chooses_patches_is_refused():
    chosen = tokens().take(torch.tensor([[0, 1, 2], [3, 4, 5]]))
    with pytest.raises(ValueError, match="put it before a method that chooses patches"):
        PoolConfig(keep=2).build(TOWER)(chosen)


def test_cls_topk_keeps_the_most_attended_in_raster_order():
    before = tokens()
    after = CLSTopKConfig(keep=5).build(TOWER)(before)
    for image in range(2):
        scores = before.evidence[AttentionFromCLS(6)][image].tolist()
        best = sorted(range(24), key=lambda p: -scores[p])[:5]
        assert after.patch_index[image].tolist() == sorted(best)


def test_cls_topk_needs_a_cls_token():
    with pytest.raises(ValueError, match="cls_topk needs a tower with a CLS token"):
        CLSTopKConfig(keep=5).check(TowerFacts(depth=8, has_cls=False, object_layer=2, deep_layer=-2, width=6, out=5))


def test_random_depends_on_the_seed_and_on_nothing_else():
    def kept(seed, images=2):
        torch.manual_seed(images)  # the caller's own random state has no say
        return RandomConfig(keep=7, seed=seed).build(TOWER)(tokens(images)).patch_index

    assert torch.equal(kept(0)[:1], kept(0, images=1))
    assert kept(0).tolist() != kept(1).tolist()
    assert all(len(set(row)) == 7 for row in kept(0).tolist())


def test_random_chooses_every_patch_equally_often():
    counts = torch.zeros(24)
    for seed in range(600):
        counts[RandomConfig(keep=6, seed=seed).build(TOWER)(tokens(1)).patch_index[0]] += 1
    # 600 draws with p = 1/4: mean 150, standard deviation 10.6; five of them on either side.
    assert counts.min() > 97
    assert counts.max() < 203


@pytest.mark.parametrize(
    ("grid", "most", "expected"),
    [
        ((24, 24), 576, (24, 24)),
        ((24, 24), 192, (12, 16)),
        ((24, 24), 64, (8, 8)),
        ((10, 10), 33, (5, 6)),
        ((10, 10), 1, (1, 1)),
        ((3, 60), 20, (1, 20)),
        ((60, 3), 20, (20, 1)),
    ],
)
def test_coarse_grid_spends_the_budget_and_keeps_the_aspect(grid, most, expected):
    assert coarse_grid(grid, most) == expected


def test_downsample_asks_for_the_coarse_grid():
    assert DownsampleConfig(keep=64).build(TOWER)((24, 24), 1) == (8, 8)
    assert DownsampleConfig(keep=0.25).build(TOWER)((24, 24), 5) == (12, 12)
