"""HiPrune: the algorithm written slowly, and a case a person can check."""

import pytest
import torch

from mllm_vision.operations import TowerFacts
from mllm_vision.reducers import HIPRUNE_ROLES, HiPruneConfig, hierarchical_roles
from mllm_vision.tokens import AttentionReceived, VisualTokens

DROPPED, REGISTER, BUFFER, ANCHOR = range(4)
TOWER = TowerFacts(depth=24, has_cls=True, object_layer=8, deep_layer=-2, width=6, out=5, image_tokens=576)


def slow_roles(objects, scene, present, grid, keep, anchors, wrap):
    """One image: anchors, then their neighbours, then registers, with lists and loops."""
    height, width = grid
    size = height * width
    roles = [DROPPED] * len(objects)
    free = [p for p in range(len(objects)) if present[p]]
    keep = min(keep, len(free))
    chosen = sorted(free, key=lambda p: -objects[p])[: min(anchors, keep)]
    for p in chosen:
        roles[p] = ANCHOR
    buffers = set()
    for p in chosen:
        tile, inside = divmod(p, size)
        row, column = divmod(inside, width)
        if wrap:
            near = [min(max(inside + step, 0), size - 1) for step in (-1, 1, -width, width)]
        else:
            cross = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            near = [r * width + c for r, c in cross if 0 <= r < height and 0 <= c < width]
        buffers |= {tile * size + n for n in near} & set(free) - set(chosen)
    for p in sorted(buffers, key=lambda p: -objects[p])[: keep - len(chosen)]:
        roles[p] = BUFFER
    rest = sorted((p for p in free if roles[p] == DROPPED), key=lambda p: -scene[p])
    for p in rest[: keep - sum(role != DROPPED for role in roles)]:
        roles[p] = REGISTER
    return roles


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(
    ("grid", "tiles", "keep", "anchors"),
    [((24, 24), 1, 192, 4), ((5, 7), 3, 20, 3), ((2, 9), 1, 4, 1), ((4, 4), 2, 32, 6), ((3, 3), 1, 2, 2)],
)
def test_equals_the_algorithm_written_slowly(grid, tiles, keep, anchors, wrap):
    generator = torch.Generator().manual_seed(keep)
    patches = tiles * grid[0] * grid[1]
    objects, scene = torch.rand(2, 3, patches, generator=generator)
    present = torch.ones(3, patches, dtype=torch.bool)
    present[:, torch.randperm(patches, generator=generator)[: patches // 5]] = False
    roles = hierarchical_roles(objects, scene, present, grid, keep=keep, anchors=anchors, wrap=wrap)
    for image in range(3):
        expected = slow_roles(*(t[image].tolist() for t in (objects, scene, present)), grid, keep, anchors, wrap)
        assert roles[image].tolist() == expected


def tokens_with(objects, scene, grid, tiles=1):
    patches = objects.shape[-1]
    index = torch.arange(patches).expand(len(objects), -1)
    features = torch.arange(patches, dtype=torch.float32)[None, :, None].repeat(len(objects), 1, 2)
    evidence = {AttentionReceived(8): objects, AttentionReceived(22): scene}
    return VisualTokens(features, index, torch.ones_like(index), grid, tiles, evidence)


def test_a_case_to_check_by_eye():
    # One bright patch in the right column of a 4 x 5 grid; the scene prefers the lower left corner.
    objects = torch.zeros(1, 20)
    objects[0, 9] = 1.0
    scene = torch.zeros(1, 20)
    scene[0, [15, 16]] = torch.tensor([0.9, 0.8])
    operation = HiPruneConfig(keep=6, alpha=0.9).build(TOWER)
    kept = operation(tokens_with(objects, scene, (4, 5)))
    #  .  .  .  .  B
    #  .  .  .  B  A
    #  .  .  .  .  B
    #  R  R  .  .  .
    assert kept.patch_index.tolist() == [[4, 8, 9, 14, 15, 16]]
    assert kept.features[0, :, 0].tolist() == [4, 8, 9, 14, 15, 16]
    roles = kept.evidence[HIPRUNE_ROLES][0]
    assert [HIPRUNE_ROLES.names[r] for r in roles[kept.patch_index[0]]] == [
        *("buffer", "buffer", "anchor", "buffer"),
        *("register", "register"),
    ]


def test_a_flat_neighbour_wraps_into_the_next_row():
    objects = torch.zeros(1, 20)
    objects[0, 9] = 1.0
    kept = {
        kind: HiPruneConfig(keep=5, alpha=1.0, neighbours=kind).build(TOWER)(
            tokens_with(objects, torch.zeros(1, 20), (4, 5))
        )
        for kind in ("grid", "flat")
    }
    assert 10 in kept["flat"].patch_index
    assert kept["grid"].patch_index[0, :4].tolist() != kept["flat"].patch_index[0, :4].tolist()


@pytest.mark.parametrize(("budget", "first_tile"), [("image", 0), ("tile", 4)])
def test_budget_belongs_to_the_image_or_to_each_tile(budget, first_tile):
    scores = torch.arange(32.0)[None]  # all attention is on the second of two tiles
    operation = HiPruneConfig(keep=8, budget=budget).build(TOWER)
    kept = operation(tokens_with(scores, scores, (4, 4), tiles=2))
    assert kept.patch_index.shape == (1, 8)
    assert int((kept.patch_index < 16).sum()) == first_tile


def test_works_after_another_reducer():
    objects, scene = torch.rand(2, 2, 20, generator=torch.Generator().manual_seed(0))
    first = tokens_with(objects, scene, (4, 5)).take(torch.tensor([[0, 3, 5, 9, 14, 19]] * 2))
    kept = HiPruneConfig(keep=4, alpha=1.0).build(TOWER)(first)
    assert kept.patch_index.shape == (2, 4)
    assert set(kept.patch_index.flatten().tolist()) <= {0, 3, 5, 9, 14, 19}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0}, "keep must be a number of tokens"),
        ({"keep": 1.5}, "keep must be a number of tokens"),
        ({"keep": True}, "keep must be of type int or of type float, got True"),
        ({"keep": 4, "alpha": "much"}, "alpha must be of type float, got 'much'"),
        ({"keep": 4, "object_layer": 1.5}, "object_layer must be of type int or None, got 1.5"),
        ({"keep": 4, "alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
        ({"keep": 4, "neighbours": "round"}, "neighbours must be one of 'grid', 'flat', got 'round'"),
        ({"keep": 4, "budget": "batch"}, "budget must be one of 'image', 'tile', got 'batch'"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HiPruneConfig(**fields)


def test_a_layer_the_tower_lacks_is_refused():
    with pytest.raises(ValueError, match=r"the tower has 24 layers, so a layer is in -24..23, got 24"):
        HiPruneConfig(keep=4, object_layer=24).build(TOWER)
