"""What contrastive decoding costs, at toy size: what is compared does the same work, and rows say against what."""

import json

import pytest
import torch

import mllm_vision as mv
from mllm_vision.decoding import DamroConfig
from mllm_vision.eval import contrast_cost, overhead, shapes
from tests.eval.toy_shapes import LANGUAGE, TOWER


@pytest.fixture(scope="module")
def stock():
    return overhead.build_model(TOWER, LANGUAGE, 0)


@torch.inference_mode()
def test_two_passes_choose_what_one_pass_chooses(stock):
    ours = mv.apply(shapes.sharing_weights(stock), DamroConfig(layer=-1, topk=3))
    ids = shapes.prompt(stock.config, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 56, 56)}
    out = contrast_cost.answer(ours, inputs, 6)
    assert out.shape[1] == ids.shape[1] + 6
    assert contrast_cost.two_passes(ours, inputs, 6) == out[0, ids.shape[1] :].tolist()


def test_a_token_takes_the_difference_of_two_answers(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(contrast_cost.time, "perf_counter", lambda: now[0])

    def run(tokens):
        now[0] += 5 + 0.25 * (tokens - 1)  # a prompt, then a quarter of a second a token

    assert contrast_cost.seconds_a_token(run, 9) == 0.25


def test_rows_are_beside_what_they_are_compared_with(tmp_path):
    toy = {"tower": TOWER | {"patch_size": 14}, "language": LANGUAGE, "new_tokens": 4, "threads": 1}
    overhead.run(lambda repeats: contrast_cost.measure(repeats=repeats, **toy), 2, tmp_path / "cost.json", False)
    rows = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert [(row["case"], row["target"], row["ratio"]["pairs"]) for row in rows] == [
        ("over stock, two rows", 1.05, 2),
        ("over two passes a step", 0.9, 2),
        ("over stock, one row", None, 2),
    ]
    assert all(row["ours"] == rows[0]["ours"] > 0 for row in rows)
    with pytest.raises(FileExistsError, match="add --overwrite"):
        overhead.run(contrast_cost.measure, 1, tmp_path / "cost.json", False)
