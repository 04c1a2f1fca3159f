"""The sweep: every usable reducer at every budget, seeds averaged, what is lost told pair by pair."""

import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import mllm_vision as mv
from mllm_vision.decoding import DamroConfig, VCDConfig
from mllm_vision.eval import sweep as sweeping
from mllm_vision.eval.scores import Tallies
from mllm_vision.eval.tasks.scenes import Scenes
from mllm_vision.recipes.lora import LoraSpec, with_lora
from mllm_vision.reducers import HiPruneConfig, RandomConfig
from tests.hosts import HOSTS

HOST = {host.name: host for host in HOSTS}
TASK = Scenes(questions=5, families="colour/count")


@pytest.fixture(scope="module")
def swept(loaded, tmp_path_factory):
    """A small sweep: its folder and its record."""
    out = tmp_path_factory.mktemp("sweep")
    points = sweeping.plan(loaded[0], ["random", "hiprune:alpha=0.2"], [1 / 3, 9], seeds=2)
    return out, sweeping.sweep(*loaded, TASK, points, out, repeats=2, batch_size=8)


def test_a_plan_has_all_usable_methods_and_seeds_where_chance_enters(loaded):
    points = sweeping.plan(loaded[0], [], [0.5, 0.25], seeds=3)
    assert points[0] == sweeping.Point("all tokens", None, [[]])
    assert [(p.method, p.keep) for p in points[1:]] == [
        (name, keep) for name in ("cls_topk", "downsample", "hiprune", "pool", "random") for keep in (0.5, 0.25)
    ]
    assert points[-1].runs == [[RandomConfig(keep=0.25, seed=seed)] for seed in range(3)]
    assert points[5].runs == [[HiPruneConfig(keep=0.5)]]
    assert not hasattr(loaded[0], "vision_slots")


def test_a_plan_has_every_point_again_with_a_strategy_whose_noise_has_the_same_seeds(loaded):
    points = sweeping.plan(loaded[0], ["hiprune", "random"], [0.5], seeds=2, strategies=["damro:alpha=0.5", "vcd"])
    half, noise = HiPruneConfig(keep=0.5), [VCDConfig(seed=seed) for seed in range(2)]
    drawn = [RandomConfig(keep=0.5, seed=seed) for seed in range(2)]
    assert [(p.decoding, p.method, p.runs) for p in points[3:]] == [
        ("damro:alpha=0.5", "all tokens", [[DamroConfig(alpha=0.5)]]),
        ("damro:alpha=0.5", "hiprune", [[half, DamroConfig(alpha=0.5)]]),
        ("damro:alpha=0.5", "random", [[one, DamroConfig(alpha=0.5)] for one in drawn]),
        ("vcd", "all tokens", [[one] for one in noise]),
        ("vcd", "hiprune", [[half, one] for one in noise]),
        ("vcd", "random", [[one, noise[i]] for i, one in enumerate(drawn)]),
    ]
    with pytest.raises(ValueError, match="hiprune is a method of kind reducer, not decoding"):
        sweeping.plan(loaded[0], ["hiprune"], [0.5], seeds=1, strategies=["hiprune:keep=9"])


def test_what_a_strategy_changes_is_told_at_every_budget(loaded, tmp_path):
    points = sweeping.plan(loaded[0], ["pool"], [9], seeds=1, strategies=["damro:alpha=0", "text_only:alpha=3"])
    record = sweeping.sweep(*loaded, TASK, points, tmp_path, repeats=1, batch_size=8)
    group, name = TASK.headline
    values = [point["scores"][group][name]["value"] for point in record["points"]]
    assert values[2:4] == values[:2]  # without contrast, the same answers
    assert values[4:] != values[:2]
    for point, value, plain in zip(record["points"][2:], values[2:], 2 * values[:2], strict=True):
        assert point["to_plain"][group][name]["value"] == pytest.approx(value - plain)
        assert point["differences"][group][name]["value"] == pytest.approx(value - values[0])
    assert "to_plain" not in record["points"][1]
    console = Console(width=160, record=True)
    console.print(sweeping.report(record))
    lines = console.export_text().splitlines()
    assert sum("text_only:alpha=3" in line for line in lines) == 2
    assert sum("plain" in line for line in lines) == 3  # two points, and the heading
    sweeping.draw(record, tmp_path / "sweep.png")


def test_an_adapter_is_swept_as_the_model_that_it_makes(swept, tmp_path):
    model, processor = mv.load("tiny-llava-scenes")
    adapted = with_lora(model, LoraSpec(r=1, alpha=1))  # which has learnt nothing yet
    points = sweeping.plan(adapted, ["hiprune:alpha=0.2"], [9], seeds=1)
    record = sweeping.sweep(adapted, processor, TASK, points, tmp_path, repeats=1, batch_size=8)
    expected = swept[1]["points"]
    for found, same in zip(record["points"], (expected[0], expected[-1]), strict=True):
        assert (found["tokens"], found["scores"]) == (same["tokens"], same["scores"])


def test_a_plan_leaves_out_what_the_model_cannot_use():
    names = {point.method for point in sweeping.plan(HOST["llava-siglip"].model(), [], [0.5], seeds=1)}
    assert "hiprune" in names
    assert "cls_topk" not in names
    with pytest.raises(ValueError, match="cls_topk needs a tower with a CLS token"):
        sweeping.plan(HOST["llava-siglip"].model(), ["cls_topk"], [0.5], seeds=1)
    with pytest.raises(ValueError, match=r"a sweep sets the keep of each method itself.*'hiprune:keep=3'"):
        sweeping.plan(HOST["llava-clip"].model(), ["hiprune:keep=3"], [0.5], seeds=1)


def test_points_have_their_tokens_scores_and_differences(swept):
    out, record = swept
    assert json.loads((out / "sweep.json").read_text()) == json.loads(json.dumps(record))
    everything, *points = record["points"]
    assert [(p["method"], p["keep"], p["tokens"], len(p["seeds"])) for p in points] == [
        ("random", 1 / 3, 33, 2),
        ("random", 9, 9, 2),
        ("hiprune:alpha=0.2", 1 / 3, 33, 1),
        ("hiprune:alpha=0.2", 9, 9, 1),
    ]
    assert everything["tokens"] == 100
    assert everything["first_token_ms"]["ratio"] == 1
    group, name = TASK.headline
    for point in record["points"]:
        score, lost = (point[kind][group][name] for kind in ("scores", "differences"))
        assert score["value"] == pytest.approx(np.mean(point["seeds"]))
        assert lost["value"] == pytest.approx(score["value"] - everything["scores"][group][name]["value"])
        assert lost["low"] <= lost["value"] <= lost["high"]


def test_a_sweep_that_was_cut_off_asks_only_what_is_left(loaded, swept, monkeypatch):
    from mllm_vision.eval import asking

    out, record = swept
    (out / "answers" / "random-keep=9-seed=1" / "scenes.jsonl").unlink()
    asked = []
    monkeypatch.setattr(
        asking,
        "answer",
        lambda *args, _answer=asking.answer, **kw: asked.extend(args[3]) or _answer(*args, **kw),
    )
    points = sweeping.plan(loaded[0], ["random", "hiprune:alpha=0.2"], [1 / 3, 9], seeds=2)
    again = sweeping.sweep(*loaded, TASK, points, out, repeats=1, batch_size=8)
    assert len(asked) == 10
    assert [point["scores"] for point in again["points"]] == [point["scores"] for point in record["points"]]


def test_table_and_picture_show_every_point(swept, tmp_path):
    _, record = swept
    console = Console(width=100, record=True)
    console.print(sweeping.report(record))
    text = console.export_text()
    for words in ("all tokens", "random", "hiprune:alpha=0.2", "1/3", "mean of families, accuracy"):
        assert words in text
    sweeping.draw(record, tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width == 1650
        assert len(picture.convert("RGB").getcolors(2**20)) > 50


def test_a_mean_of_runs_is_unit_by_unit_in_whatever_order():
    one = Tallies(["a", "b"], {"all": {"right": np.array([1.0, 0.0])}})
    two = Tallies(["b", "a"], {"all": {"right": np.array([1.0, 1.0])}})
    mean = Tallies.mean([one, two])
    assert mean.units == ["a", "b"]
    assert mean.groups["all"]["right"].tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match="runs over different units have no mean"):
        Tallies.mean([one, Tallies(["c"], {"all": {"right": np.array([1.0])}})])
