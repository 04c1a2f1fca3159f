"""What a merging tower saves, at toy size: both models do the same work around it, and rows say what is reckoned."""

import json

import pytest
import torch

from mllm_vision.eval import overhead, tower_cost
from mllm_vision.eval.flops import counting_flops
from mllm_vision.eval.measurement import Clock
from tests.eval.toy_shapes import toy_shape

OURS, THEIRS = toy_shape("llava-uhd-v3"), toy_shape("llava-uhd-v3-moonvit")
TOY = dict(ours=OURS, theirs=THEIRS, layers=1, packed_picture=(40, 40), device="cpu", threads=1)


@pytest.fixture(scope="module")
def model_and_inputs():
    return OURS.load(torch.device("cpu"), torch.float32, 0)


@pytest.fixture(scope="module")
def result():
    return tower_cost.measure(**TOY, repeats=2, packs=(1, 3))


def ratio(median, low, high, pairs):
    return {"median": median, "min": low, "max": high, "pairs": pairs}


def test_there_is_a_row_for_each_step_and_pack(result):
    assert [(row["name"], row["case"]) for row in result["rows"]] == [
        ("visual tokens", "112 x 84"),
        ("FLOPs of encoding", ""),
        ("FLOPs of prefill", "language layers: 1"),
        ("FLOPs to the first token", "language layers: 1"),
        ("FLOPs to the first token", "language layers: 2, reckoned"),
        ("time of encoding", ""),
        ("time of prefill", "language layers: 1"),
        ("time to the first token", "language layers: 1"),
        ("time to the first token", "language layers: 2, reckoned"),
        ("time of encoding an image in a pack", "3 of 40 x 40, over 1"),
    ]
    tokens, *_ = result["rows"]
    assert (tokens["stock"], tokens["ours"], tokens["ratio"]) == (48, 20, ratio(20 / 48, 20 / 48, 20 / 48, 1))
    assert [row["ratio"]["pairs"] for row in result["rows"]] == [1] * 5 + [2] * 5
    assert all(row["ours"] > 0 and row["target"] is None for row in result["rows"])


def test_result_states_where_and_how(result):
    written = json.loads(json.dumps(result))
    assert set(written["environment"]) == {"date", "versions", "hardware", "git"}
    assert written["environment"]["hardware"]["threads"] == 1
    assert written["settings"] == {
        "repeats": 2,
        "layers": 1,
        "layers_published": 2,
        "picture": [112, 84],
        "packed_picture": [40, 40],
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
        "attention": "sdpa",
        "weights": "random",
        "tower": OURS.config["vision_config"],
        "other": THEIRS.config["vision_config"],
        "language": OURS.config["text_config"],
    }


def test_the_other_model_differs_in_its_tower_only(model_and_inputs):
    model, _ = model_and_inputs
    other = tower_cost.with_tower(model, THEIRS, 0)
    assert other.model.vision_tower.config.merger_layers == other.config.vision_config.merger_layers == (3,)
    assert model.model.vision_tower.config.merger_layers == model.config.vision_config.merger_layers == (0, 2)
    assert other.model.vision_tower.config._attn_implementation == "sdpa" and not other.model.vision_tower.training
    beside = [
        {name: weight.data_ptr() for name, weight in each.named_parameters() if "vision_tower" not in name}
        for each in (model, other)
    ]
    assert beside[0] == beside[1] and len(beside[0]) > 20
    stock = THEIRS.load(torch.device("cpu"), torch.float32, 0)[0].model.vision_tower
    assert {n: w.shape for n, w in other.model.vision_tower.named_parameters()} == {
        n: w.shape for n, w in stock.named_parameters()
    }


@torch.inference_mode()
def test_steps_are_all_that_the_stock_model_does(model_and_inputs, result):
    model, inputs_of = model_and_inputs
    inputs = inputs_of(1)
    with counting_flops() as clock:
        encode, prefill = tower_cost.steps(model, inputs, clock)
    with counting_flops() as clock:
        images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
        assert tower_cost.encoding(model, inputs, clock) == encode
        start = clock.read()
        model.get_image_features(**images)
        assert clock.between(start, clock.read()) == encode
        start = clock.read()
        model(**inputs, logits_to_keep=1)
        assert clock.between(start, clock.read()) == encode + prefill
    assert min(encode, prefill) > 0
    counted = next(row for row in result["rows"] if row["name"] == "FLOPs of encoding")
    assert (counted["ours"], counted["unit"]) == (encode / 1e12, "T")


@torch.inference_mode()
def test_work_grows_with_the_number_of_images(model_and_inputs):
    model, inputs_of = model_and_inputs
    flops = []
    for count in (1, 2, 4):
        with counting_flops() as clock:
            flops.append(tower_cost.encoding(model, inputs_of(count), clock))
    assert flops == [flops[0], 2 * flops[0], 4 * flops[0]]


def test_the_whole_is_reckoned_from_as_many_layers_as_there_are():
    turns = [((8.0, 2.0), (4.0, 1.0)), ((10.0, 2.0), (2.0, 1.0)), ((12.0, 4.0), (9.0, 1.0))]  # theirs, ours
    rows = tower_cost.step_rows("time", "s", turns, 2, 6)
    assert [(row["name"], row["case"], row["stock"], row["ours"], row["ratio"]) for row in rows] == [
        ("time of encoding", "", 10.0, 4.0, ratio(0.5, 0.2, 0.75, 3)),
        ("time of prefill", "language layers: 2", 2.0, 1.0, ratio(0.5, 0.25, 0.5, 3)),
        ("time to the first token", "language layers: 2", 12.0, 5.0, ratio(0.5, 0.25, 0.625, 3)),
        ("time to the first token", "language layers: 6, reckoned", 16.0, 7.0, ratio(0.5, 0.3125, 0.5, 3)),
    ]
    assert {row["unit"] for row in rows} == {"s"}
    cases = [row["case"] for row in tower_cost.step_rows("time", "s", turns, 6, 6)]
    assert cases == ["", "language layers: 6", "language layers: 6"]


def test_models_take_turns_and_counting_warms_them_up(monkeypatch):
    calls = []
    monkeypatch.setattr(tower_cost, "steps", lambda model, inputs, clock: (calls.append(inputs), (1.0, 1.0))[1])
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    tower_cost.time_rows([(model, "theirs"), (model, "ours")], 1, 1, repeats=3)
    assert calls == ["theirs", "ours"] * 3


def test_an_image_in_a_pack_is_compared_with_one_alone(monkeypatch, model_and_inputs):
    seconds, calls = {1: 2.0, 2: 6.0, 4: 6.0}, []

    def encoding(model, inputs, clock):
        assert isinstance(clock, Clock)
        sizes = inputs["image_sizes"].tolist()
        calls.append(len(sizes))
        assert sizes == [[40, 40]] * len(sizes)
        return seconds[len(sizes)]

    monkeypatch.setattr(tower_cost, "encoding", encoding)
    rows = tower_cost.pack_rows(model_and_inputs[0], OURS, (1, 2, 4), (40, 40), 2, 0)
    assert [(row["case"], row["stock"], row["ours"], row["ratio"]) for row in rows] == [
        ("2 of 40 x 40, over 1", 2.0, 3.0, ratio(1.5, 1.5, 1.5, 2)),
        ("4 of 40 x 40, over 1", 2.0, 1.5, ratio(0.75, 0.75, 0.75, 2)),
    ]
    assert calls == [1, 2, 4] * 3  # the first turn warms up


def test_rows_are_shown_with_dtype_and_device(result, tmp_path, capsys):
    overhead.run(lambda repeats: result, 2, tmp_path / "cost.json", False)
    assert "float32, cpu" in capsys.readouterr().out
    assert json.loads((tmp_path / "cost.json").read_text()) == json.loads(json.dumps(result))


def test_more_layers_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"layers must be in 1\.\.2, .* got 3"):
        tower_cost.measure(**TOY | {"layers": 3})
    with pytest.raises(ValueError, match="there is no 'cuda:99' here"):
        tower_cost.measure(**TOY | {"device": "cuda:99"})
