"""The measurement at toy size: that it compares what it says it compares, and that a result states everything."""

import io
import json

import pytest
import torch
from rich.console import Console

import mllm_vision as mv
from mllm_vision.eval import measurement, overhead, shapes
from mllm_vision.eval.environment import environment, git_state
from mllm_vision.reducers import HiPruneConfig

TOWER = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=84, patch_size=14
)
LANGUAGE = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=64,
)
TOY = dict(repeats=3, keeps=(12, 4), batches=(1, 2), tower=TOWER, language=LANGUAGE, threads=1)


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overhead, "in_fresh_process", lambda function, *arguments: function(*arguments))
        patch.setattr(overhead, "peak_memory", lambda run: (run() and 100.0, 110.0))
        return overhead.measure(**TOY)


def test_every_claim_has_its_rows(result):
    time, peak, above = "encoding time", "encoding peak memory", "encoding peak memory above the loaded model"
    assert [(row["name"], row["case"], row["target"]) for row in result["rows"]] == [
        (peak, "batch 1, keep 12", 1.10),
        (above, "batch 1, keep 12", None),
        (peak, "batch 2, keep 12", 1.10),
        (above, "batch 2, keep 12", None),
        (time, "batch 1, keep 12", 1.05),
        (time, "batch 2, keep 12", 1.05),
        ("prefill time", "12 tokens", 1.15),
        ("prefill time over all tokens", "12 over all 36", None),
        ("prefill time", "4 tokens", 1.15),
        ("prefill time over all tokens", "4 over all 36", None),
    ]


def test_rows_are_numbers_that_agree(result):
    for row in result["rows"]:
        ratio = row["ratio"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert ratio["pairs"] == (3 if row["unit"] == "s" else 1)
        if ratio["pairs"] == 1:
            assert ratio["median"] == row["ours"] / row["stock"]
    assert {row["unit"] for row in result["rows"]} == {"s", "MB"}


def test_result_states_where_and_how(result):
    written = json.loads(json.dumps(result))
    assert written["settings"] == {
        "repeats": 3,
        "seed": 0,
        "dtype": "float32",
        "weights": "random",
        "method": "hiprune",
        "tower": TOWER,
        "language": LANGUAGE,
    }
    where = written["environment"]
    assert set(where) == {"date", "versions", "hardware", "git"}
    assert set(where["versions"]) == {"python", "torch", "transformers", "mllm_vision"}
    assert set(where["hardware"]) == {"system", "cpu", "cores", "threads", "gpus"}
    assert where["hardware"]["threads"] == 1


def test_report_marks_what_misses_its_target(result):
    row = result["rows"][0]
    late = {**row, "ratio": {**row["ratio"], "median": 1.5}}
    shown = []
    for rows in ([row], [late]):
        console = Console(record=True, width=160, file=io.StringIO(), force_terminal=True)
        overhead.report({**result, "rows": rows}, console)
        shown.append(console.export_text(styles=True))
    assert "1.000" in shown[0] and "\x1b[31m1.500" not in shown[0]
    assert "\x1b[31m1.500" in shown[1]


@torch.inference_mode()
def test_both_sides_of_a_prefill_pair_give_the_same_logits():
    stock = overhead.build_model(TOWER, LANGUAGE, seed=0)
    pruned = mv.apply(shapes.sharing_weights(stock), HiPruneConfig(keep=12))
    pixels = overhead.random_images(TOWER, 1)
    kept = overhead.encode(pruned, pixels)[0].features
    assert kept.shape == (12, 32)
    expected = overhead.first_logits(stock, shapes.prompt(stock.config, 12), encoded=kept)
    assert expected.shape == (1, 1, 64)
    assert torch.equal(overhead.first_logits(pruned, shapes.prompt(stock.config, 36), pixel_values=pixels), expected)


def test_copy_shares_its_weights_and_nothing_else():
    stock = overhead.build_model(TOWER, LANGUAGE, seed=0)
    copy = mv.apply(shapes.sharing_weights(stock), HiPruneConfig(keep=12))
    assert not hasattr(stock, "vision_slots")
    assert type(stock) is not type(copy)
    assert stock.config.vision_config._attn_implementation == "sdpa"
    pointers = [{p.data_ptr() for p in model.parameters()} for model in (stock, copy)]
    assert pointers[0] == pointers[1]


def test_pairs_alternate_and_warm_ups_do_not_count():
    calls = []
    pairs = measurement.paired(lambda: calls.append("a"), lambda: calls.append("b"), 3, warmups=2)
    assert calls == ["a", "b"] * 5
    assert len(pairs) == 3


@pytest.mark.slow
def test_peak_memory_of_a_fresh_process_sees_what_is_allocated_and_freed():
    before, peak = measurement.in_fresh_process(_peak_of_100_mb)
    assert 99 < peak - before < 120


def _peak_of_100_mb():
    return measurement.peak_memory(lambda: torch.ones(25_000_000).sum())


def test_git_state_of_a_file_outside_a_checkout(tmp_path):
    (tmp_path / "file").touch()
    assert git_state(tmp_path / "file") is None
    assert environment()["git"] is None or len(environment()["git"]["commit"]) == 40


def test_command_does_not_overwrite_unasked(tmp_path):
    taken = tmp_path / "result.json"
    taken.write_text("mine")
    with pytest.raises(Exception, match="--overwrite"):
        overhead.run(overhead.measure, 1, taken, False)
    assert taken.read_text() == "mine"
