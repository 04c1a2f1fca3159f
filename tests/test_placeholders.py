"""Fitting prompts to images, against the same thing done with lists."""

import pytest
import torch

from mllm_vision.placeholders import fit_columns

IMAGE, PAD = 9, 0


def slow_fit(rows, masks, sizes, slots, pads_right):
    """Prompts as lists of ids, with each image's placeholders replaced by as many as its tokens stand on."""
    images = iter(zip(sizes, slots, strict=True))
    fitted = []
    for row, mask in zip(rows, masks, strict=True):
        out, seen, current = [], 0, None
        for column, token in enumerate(row):
            if not mask[column]:
                continue
            if token != IMAGE:
                out.append(column)
                continue
            if current is None or seen == current[0]:
                current, seen = next(images), 0
            out += [column] * current[1].tolist().count(seen)
            seen += 1
        fitted.append(out)
    width = max(map(len, fitted))
    return [out + [-1] * (width - len(out)) if pads_right else [-1] * (width - len(out)) + out for out in fitted]


CASES = {
    "one image": ([[1, 9, 9, 9, 9, 2]], [[1] * 6], [4], [[1, 3]]),
    "two images side by side": ([[1, 9, 9, 9, 9, 9, 2]], [[1] * 7], [2, 3], [[0], [1, 2]]),
    "left padding": ([[0, 0, 1, 9, 9, 2], [1, 9, 9, 9, 9, 2]], [[0, 0, 1, 1, 1, 1], [1] * 6], [2, 4], [[1], [0, 1, 2]]),
    "right padding": ([[1, 9, 9, 2, 0], [1, 9, 9, 9, 2]], [[1, 1, 1, 1, 0], [1] * 5], [2, 3], [[0], [2]]),
    "a row of text": ([[0, 0, 0, 0, 3, 4], [1, 9, 9, 9, 9, 2]], [[0] * 4 + [1] * 2, [1] * 6], [4], [[0]]),
    "more tokens than placeholders": ([[1, 9, 9, 2]], [[1] * 4], [2], [[0, 0, 0, 1]]),
    "all kept": ([[1, 9, 9, 2]], [[1] * 4], [2], [[0, 1]]),
    "padding among the columns stays": ([[1, 0, 9, 9, 2]], [[1, 0, 1, 1, 1]], [2], [[0]]),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_same_with_lists(case):
    rows, masks, sizes, slots = CASES[case]
    slots = [torch.tensor(on) for on in slots]
    fit = fit_columns(torch.tensor(rows), torch.tensor(masks), IMAGE, sizes, slots)
    if case == "padding among the columns stays":
        assert fit.columns.tolist() == [[0, 1, 2, 4]]
    else:
        assert fit.columns.tolist() == slow_fit(rows, masks, sizes, slots, case == "right padding")


def test_everything_that_runs_along_the_prompt_moves_together():
    ids = torch.tensor([[5, 9, 9, 9, 6], [7, 9, 9, 9, 8]])
    fit = fit_columns(ids, None, IMAGE, [3, 3], [torch.tensor([0, 2]), torch.tensor([1])])
    assert fit.apply(ids, PAD).tolist() == [[5, 9, 9, 6], [0, 7, 9, 8]]
    assert fit.apply(ids * 10, -100).tolist() == [[50, 90, 90, 60], [-100, 70, 90, 80]]
    axes = torch.arange(30).view(3, 2, 5)
    assert fit.apply(axes, 0)[2].tolist() == [[20, 21, 23, 24], [0, 25, 27, 29]]
    assert fit.apply(torch.arange(5)[None], 0).tolist() == [[0, 1, 3, 4], [0, 0, 2, 4]]


@pytest.mark.parametrize("sizes", [[3], [3, 3]])
def test_marks_and_images_must_agree(sizes):
    ids = torch.tensor([[5, 9, 9, 9, 9, 6]])
    with pytest.raises(ValueError, match=rf"hold 4 image placeholders .* the {len(sizes)} images need {sum(sizes)}"):
        fit_columns(ids, None, IMAGE, sizes, [torch.tensor([0])] * len(sizes))
