"""The core type."""

import pytest
import torch

from mllm_vision.tokens import VisualTokens


def tokens():
    index = torch.tensor([[4, 0, 2], [1, 5, -1]])
    return VisualTokens(torch.arange(12.0).view(2, 3, 2), index, torch.tensor([[1, 2, 1], [1, 1, 3]]), (2, 3))


def test_present_are_the_patches_with_a_token():
    assert tokens().present.int().tolist() == [[1, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 1]]


def test_take_moves_features_patches_and_counts_together():
    taken = tokens().take(torch.tensor([[2, 0], [1, 1]]))
    assert taken.patch_index.tolist() == [[2, 4], [5, 5]]
    assert taken.patch_count.tolist() == [[1, 1], [1, 1]]
    assert taken.features.tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


def test_keep_patches_puts_them_in_raster_order():
    keep = torch.zeros(2, 6, dtype=torch.bool)
    keep[0, [0, 4]] = True
    keep[1, [1, 5]] = True
    kept = tokens().keep_patches(keep)
    assert kept.patch_index.tolist() == [[0, 4], [1, 5]]
    assert kept.patch_count.tolist() == [[2, 1], [1, 1]]


def test_keep_patches_refuses_ragged_images():
    keep = torch.zeros(2, 6, dtype=torch.bool)
    keep[0, 0] = True
    with pytest.raises(ValueError, match=r"equally many tokens, got \[1, 0\]"):
        tokens().keep_patches(keep)


def test_image_is_a_batch_of_one_with_its_own_evidence():
    batch = tokens()
    batch.evidence["map"] = torch.arange(12).view(2, 6)
    one = batch.image(1)
    assert one.patch_index.tolist() == [[1, 5, -1]]
    assert one.evidence["map"].tolist() == [[6, 7, 8, 9, 10, 11]]


def test_keep_best_chooses_among_the_patches_with_a_token():
    scores = torch.tensor([[1.0, 9.0, 3.0, 9.0, 2.0, 9.0], [5.0, 1.0, 9.0, 9.0, 9.0, 2.0]])
    assert tokens().keep_best(scores, 2).patch_index.tolist() == [[2, 4], [1, 5]]
