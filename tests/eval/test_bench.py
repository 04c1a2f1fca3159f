"""The bench at toy size: turns, ratios, what a row says, the table and the plot of it."""

import io
import json
from contextlib import nullcontext

import pytest
import torch
from matplotlib import rc_context
from PIL import Image
from rich.console import Console

from mllm_vision.eval import bench as module
from mllm_vision.eval import measurement, shapes
from mllm_vision.eval.bench import STEPS, Checkpoint, bench
from mllm_vision.eval.bench_report import draw, milliseconds, report
from mllm_vision.eval.measurement import Steps
from mllm_vision.projectors import SpatialTokensConfig
from mllm_vision.reducers import HiPruneConfig, PoolConfig
from tests.eval.toy_shapes import toy_shape

SHAPE = toy_shape("llava-1.5-7b")
HIPRUNE, POOL = HiPruneConfig(keep=4), PoolConfig(keep=9)
CANDIDATES = {"all tokens": [], "hiprune:keep=4": [HIPRUNE], "pool:keep=9": [POOL]}


@pytest.fixture(scope="module", autouse=True)
def memory_that_is_quickly_measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "in_fresh_process", lambda function, *arguments: function(*arguments))
        patch.setattr(module, "peak_memory", lambda run: (run() and 1000.0, 1250.0))
        patch.setattr(module, "disable_progress_bar", lambda: None)
        yield


@pytest.fixture(scope="module")
def result():
    return bench(SHAPE, CANDIDATES, batches=(1, 2), repeats=3, new_tokens=3, device="cpu", threads=1)


def test_there_is_a_row_for_each_batch_and_candidate(result):
    assert [(row["batch"], row["name"], row["visual_tokens"], row["prompt_tokens"]) for row in result["rows"]] == [
        (1, "all tokens", 16, 56),
        (1, "hiprune:keep=4", 4, 44),
        (1, "pool:keep=9", 9, 49),
        (2, "all tokens", 16, 56),
        (2, "hiprune:keep=4", 4, 44),
        (2, "pool:keep=9", 9, 49),
    ]
    assert [row["methods"] for row in result["rows"][:3]] == [[], [HIPRUNE.to_dict()], [POOL.to_dict()]]


def test_numbers_of_a_row_agree(result):
    for row in result["rows"]:
        baseline = result["rows"][0 if row["batch"] == 1 else 3]
        for step in STEPS:
            assert 0 < row["seconds"][step]["min"] <= row["seconds"][step]["median"] <= row["seconds"][step]["max"]
        assert row["tokens_per_second"] == row["batch"] / row["seconds"]["decode"]["median"]
        assert row["memory"] == {"loaded": 1000.0, "peak": 1250.0}
        assert row["flops"]["first_token"] == row["flops"]["encode"] + row["flops"]["prefill"]
        if row is baseline:
            assert row["ratios"] is None and row["over_flops"] is None
            continue
        for step, ratio in row["ratios"].items():
            assert ratio["min"] <= ratio["median"] <= ratio["max"] and ratio["pairs"] == 3
            assert ratio["flops"] == row["flops"][step] / baseline["flops"][step]
            assert row["over_flops"][step] == ratio["median"] / ratio["flops"]
    assert [row["ratios"]["prefill"]["flops"] < 1 for row in result["rows"] if row["ratios"]] == [True] * 4


def test_result_states_where_and_how_and_survives_json(result):
    written = json.loads(json.dumps(result))
    assert written == result
    assert written["settings"] == {
        "model": "llava-1.5-7b",
        "weights": "random",
        "layers": 2,
        "layers_published": 2,
        "picture": [56, 56],
        "baseline": "all tokens",
        "repeats": 3,
        "warmups": 1,
        "new_tokens": 3,
        "device": "cpu",
        "dtype": "float32",
        "attention": "sdpa",
        "seed": 0,
        "threads": 1,
        "batches": [1, 2],
    }
    assert set(written["environment"]) == {"date", "versions", "hardware", "git"}
    assert written["environment"]["hardware"]["threads"] == 1


class Scripted:
    """Stands in for `measure_steps`: a machine that gets slower from turn to turn, methods that halve every time."""

    def __init__(self, monkeypatch):
        self.calls: list[str] = []
        monkeypatch.setattr(module, "measure_steps", self)
        monkeypatch.setattr(module, "counting_flops", lambda: nullcontext("flops"))

    def __call__(self, model, inputs, new_tokens, clock):
        name = "+".join(method.type for method in model.vision_slots.methods) or "stock"
        if clock == "flops":
            return Steps(100, 100, 200, 10) if name == "stock" else Steps(100, 25, 125, 10)
        self.calls.append(name)
        turn = (len(self.calls) + 1) // 2
        return Steps(*[turn * (1.0 if name == "stock" else 0.5)] * 4)


def test_baseline_and_candidate_take_turns_and_ratios_are_of_neighbours(monkeypatch):
    scripted = Scripted(monkeypatch)
    monkeypatch.setattr(module._Run, "resident", lambda self, batch: {})
    rows = bench(SHAPE, CANDIDATES, repeats=3, device="cpu")["rows"]
    assert scripted.calls == ["stock", "hiprune"] * 4 + ["stock", "pool"] * 4
    half = {"median": 0.5, "min": 0.5, "max": 0.5, "pairs": 3}
    for row in rows[1:]:
        assert row["ratios"] == {
            "encode": {**half, "flops": 1.0},
            "prefill": {**half, "flops": 0.25},
            "first_token": {**half, "flops": 0.625},
            "decode": {**half, "flops": 1.0},
        }
        assert row["over_flops"] == {"encode": 0.5, "prefill": 2.0, "first_token": 0.8, "decode": 0.5}
        assert row["memory"] is None
    # The first turn of each pair warms up; the baseline is summed up over the turns with both candidates.
    assert rows[0]["seconds"]["encode"] == {"median": 5.0, "min": 2.0, "max": 8.0}
    assert [row["seconds"]["encode"] for row in rows[1:]] == [
        {"median": 1.5, "min": 1.0, "max": 2.0},
        {"median": 3.5, "min": 3.0, "max": 4.0},
    ]


def test_a_method_can_be_the_baseline(monkeypatch):
    scripted = Scripted(monkeypatch)
    rows = bench(SHAPE, {"pool": [POOL], "all": []}, repeats=1, device="cpu")["rows"]
    measured = scripted.calls[-4:]  # before, it is memory
    assert measured == ["pool", "stock"] * 2
    assert rows[0]["ratios"] is None
    assert rows[1]["ratios"]["encode"]["median"] == 2.0


def test_a_baseline_alone_is_measured_without_ratios():
    rows = bench(SHAPE, {"all tokens": []}, repeats=2, new_tokens=2, device="cpu")["rows"]
    assert len(rows) == 1 and rows[0]["ratios"] is None
    assert rows[0]["seconds"]["prefill"]["median"] > 0


def test_added_tokens_count_with_what_they_cost():
    added = SpatialTokensConfig(variant="pooling", channels=4, scales=2)
    candidates = {"all": [], "added": [added], "added and pruned": [added, HIPRUNE]}
    found = bench(SHAPE, candidates, repeats=1, new_tokens=2, device="cpu")
    rows = found["rows"]
    assert [(row["visual_tokens"], row["prompt_tokens"]) for row in rows] == [(16, 56), (18, 58), (6, 46)]
    vision, text = SHAPE.config["vision_config"], SHAPE.config["text_config"]
    own = 4 * vision["hidden_size"] * (2 * 2 + 4 * 4) + 4 * text["hidden_size"]
    assert [row["added_parameters"] for row in rows] == [0, own, own]
    assert rows[1]["flops"]["encode"] - rows[0]["flops"]["encode"] == 2 * (own + 4 * text["hidden_size"])  # two tokens
    assert f"18 visual tokens, {own / 1e9:.3f} G parameters more, " in shown(found)


def test_a_trained_model_answers_through_its_own_processor():
    source = Checkpoint("tiny-llava-scenes", picture=(140, 140))
    found = bench(source, {"all tokens": [], "pool": [PoolConfig(keep=25)]}, repeats=1, new_tokens=2, device="cpu")
    assert [row["visual_tokens"] for row in found["rows"]] == [100, 25]
    wanted = {"model": "tiny-llava-scenes", "weights": "trained", "layers": 6, "layers_published": None}
    assert wanted.items() <= found["settings"].items()
    model, make_inputs = source.load(torch.device("cpu"), torch.float32, 0)
    inputs = make_inputs(3)
    assert inputs["pixel_values"].shape == (3, 3, 140, 140)
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [100] * 3


def test_table_shows_what_the_json_holds(result):
    lines = [line.strip() for line in shown(result).splitlines()]
    assert lines[0] == "llava-1.5-7b, random weights, float32, threads: 1, batch 1"
    for row in result["rows"]:
        start = lines.index(
            f"{row['name']}: {row['visual_tokens']} visual tokens, {row['tokens_per_second']:.1f} tokens/s, "
            "1.25 GB at most (0.25 above the model)"
        )
        for line, step, name in zip(lines[start + 2 :], STEPS, ("encode", "prefill", "TTFT", "token"), strict=False):
            bounds = ("median", "min", "max")
            median, low, high = (milliseconds(row["seconds"][step][bound]) for bound in bounds)
            expected = [name, median, low, "to", high]
            if row["ratios"]:
                ratio = row["ratios"][step]
                median, low, high = (f"{ratio[bound]:.3f}" for bound in bounds)
                expected += [median, low, "to", high, f"{ratio['flops']:.3f}", f"{row['over_flops'][step]:.2f}"]
            assert line.split() == expected


def test_milliseconds_have_three_digits():
    assert [milliseconds(ms / 1e3) for ms in (0.01234, 1, 12.04, 99.94, 99.96, 11318.4)] == [
        "0.0123",
        "1.00",
        "12.0",
        "99.9",
        "100",
        "11318",
    ]


def test_table_fits_a_terminal_of_80_columns(result):
    ratio = {"median": 1.234, "min": 1.234, "max": 12.345, "pairs": 3, "flops": 0.123}
    seconds = {"median": 11.3, "min": 11.2, "max": 12.5}
    slow = [{**row, "seconds": dict.fromkeys(STEPS, seconds)} for row in result["rows"]]
    slow = [{**row, "ratios": row["ratios"] and dict.fromkeys(STEPS, ratio)} for row in slow]
    text = shown({**result, "rows": slow}, width=80)
    assert text.count("11200 to 12500") == 24 and text.count("1.234 to 12.345") == 16
    assert "…" not in text


def test_table_says_what_was_cut_and_what_was_not_measured(result):
    settings = result["settings"] | {"layers_published": 32, "batches": [1]}
    row = result["rows"][0] | {"memory": None}
    text = shown({**result, "settings": settings, "rows": [row]})
    assert "llava-1.5-7b, 2 of 32 language layers, random weights" in text
    assert "memory not measured" in text


def shown(result, width=160):
    console = Console(width=width, file=io.StringIO())
    report(result, console)
    return console.file.getvalue()


def test_plot_is_a_picture_with_the_names_of_the_rows(result, tmp_path):
    draw(result, tmp_path / "bench.png")
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").resize((200, 100)).getcolors(20_000)) > 50
    with rc_context({"svg.fonttype": "none"}):
        draw(result, tmp_path / "bench.svg")
    text = (tmp_path / "bench.svg").read_text()
    for row in result["rows"]:
        assert text.count(f">{row['name']}<") == 2  # a panel for each batch
    assert "batch 1: time to the first token" in text and "batch 2: time to the first token" in text


def test_too_little_memory_is_refused(monkeypatch):
    monkeypatch.setattr(shapes, "available_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"cpu has 0\.0 GB left; not even --layers 1 fits"):
        bench(SHAPE, CANDIDATES, device="cpu")


@pytest.mark.parametrize(
    "wrong", [dict(candidates={}), dict(batches=()), dict(batches=(1, 0)), dict(repeats=0), dict(new_tokens=1)]
)
def test_nothing_to_measure_is_an_error(wrong):
    with pytest.raises(ValueError, match="repeats of 1 or more and new_tokens of 2 or more, got"):
        bench(SHAPE, **{"candidates": CANDIDATES, "device": "cpu"} | wrong)


@pytest.mark.parametrize("device", ["cuda:99", "mps"])
def test_a_device_that_is_not_there_is_an_error(device):
    with pytest.raises(ValueError, match=f"there is no '{device}' here"):
        bench(SHAPE, CANDIDATES, device=device)


@pytest.mark.slow
def test_memory_of_a_fresh_process_grows_with_the_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "in_fresh_process", measurement.in_fresh_process)
        (row,) = bench(SHAPE, {"all tokens": []}, repeats=1, new_tokens=2, device="cpu")["rows"]
    assert 100 < row["memory"]["loaded"] <= row["memory"]["peak"] < 2000


@pytest.mark.gpu
def test_rows_of_a_gpu_have_the_same_keys(result):
    found = bench(SHAPE, CANDIDATES, repeats=2, new_tokens=3, device="cuda")
    assert found["settings"].keys() == result["settings"].keys()
    assert found["settings"]["dtype"] == "bfloat16"
    for row, on_cpu in zip(found["rows"], result["rows"][:3], strict=True):
        assert row.keys() == on_cpu.keys()
        assert all(row[name].keys() == on_cpu[name].keys() for name in ("seconds", "memory", "flops"))
        assert row["flops"] == pytest.approx(on_cpu["flops"], rel=0.01)  # a kernel may pad a head's width
        assert 0 < row["memory"]["loaded"] < row["memory"]["peak"]
        assert 0 < row["seconds"]["encode"]["min"] < row["seconds"]["first_token"]["max"]
