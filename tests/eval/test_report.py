"""What an evaluation found, as a table, as JSON, and beside another."""

import json
import re

import pytest

import mllm_vision as mv
from mllm_vision.eval import Evaluation, compare, evaluate
from mllm_vision.reducers import HiPruneConfig

TASK = "scenes:questions=8:families=existence/colour"


@pytest.fixture(scope="module")
def runs():
    """With all tokens, and with a ninth of them."""
    model, processor = mv.load("tiny-llava-scenes")
    everything = evaluate(model, processor, TASK, batch_size=16)
    with mv.using(model, HiPruneConfig(keep=11)):
        return everything, evaluate(model, processor, TASK, batch_size=16)


def test_a_table_says_what_was_measured_and_how(runs):
    text = str(runs[1])
    for words in ("scenes", "existence_adversarial", "f1", "yes_ratio", "colour", "mean of families", "95% interval"):
        assert words in text
    for words in ("tiny-llava-scenes, hiprune:keep=11, float32, greedy; bootstrap seed 0", "torch", "transformers"):
        assert words in text
    score = runs[1].tasks["scenes"].scores["colour"]["accuracy"]
    row = next(line for line in text.splitlines() if "colour" in line)
    assert re.findall(r"[\d.]+", row) == ["8", *(f"{x:.3f}" for x in (score.value, score.low, score.high))]
    assert max(map(len, text.splitlines())) <= 160


def test_json_states_all_that_a_number_depends_on(runs, tmp_path):
    runs[1].save(tmp_path / "results.json")
    stored = json.loads((tmp_path / "results.json").read_text())
    assert set(stored["environment"]) == {"date", "versions", "hardware", "git"}
    run = stored["run"]
    assert run["methods"] == [{"type": "hiprune", "keep": 11}]
    assert run["decoding"]["temperature"] == 0
    assert {"model", "dtype", "generation_config", "batch_size", "processes", "limit", "seed"} <= set(run)
    task = stored["tasks"]["scenes"]
    assert task["questions"] == 24
    assert task["prompt"].startswith("USER: <image>\n")
    assert task["options"]["families"] == "existence/colour"
    assert task["data"]["source"] == "scenes"
    assert (task["max_new_tokens"], task["faults"]) == (6, {})
    assert stored["intervals"] == {"level": 0.95, "resamples": 2000, "seed": 0}


def test_what_was_saved_can_be_loaded(runs, tmp_path):
    runs[0].save(tmp_path / "results.json")
    again = Evaluation.load(tmp_path / "results.json")
    assert again.to_dict() == runs[0].to_dict()
    assert str(again) == str(runs[0])
    assert again.tasks["scenes"].headline == runs[0].tasks["scenes"].headline


@pytest.mark.parametrize("content", [None, "", "[]", '{"tasks": {}}', '{"tasks": {"scenes": {}}, "run": {}}', "\x00"])
def test_what_is_no_evaluation_is_an_error(tmp_path, content):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        ValueError, match=r"results.json is (no file; give|not the results.json that an evaluation writes)"
    ):
        Evaluation.load(path)


def test_two_runs_are_compared_pair_by_pair(runs):
    found = compare(*runs, ("all", "ninth"))
    for group, row in found.tasks["scenes"].items():
        for name, difference in row.items():
            before, after = (run.tasks["scenes"].scores[group][name].value for run in runs)
            assert difference.value == pytest.approx(after - before)
            assert difference.low <= difference.value <= difference.high
    assert found.units["scenes"] == len(runs[0].tasks["scenes"].tallies.units)
    assert found.remarks == []
    text = str(found)
    assert "A: all" in text
    assert "B: ninth" in text


def test_only_what_both_were_asked_is_compared_and_differences_are_named(runs):
    model, processor = mv.load("tiny-llava-scenes")
    fewer = evaluate(model, processor, "scenes:questions=4:families=existence/colour", batch_size=16)
    found = compare(runs[0], fewer)
    assert found.units["scenes"] == len(fewer.tasks["scenes"].tallies.units)
    assert found.remarks[0] == "scenes: questions differs: 8 and 4"
    assert found.remarks[1].startswith("scenes: only what both answered, 16 of 32 and 16 counts")
    assert found.tasks["scenes"]["existence_random"]["accuracy"].value == 0


def test_nothing_in_common_is_an_error(runs):
    other = Evaluation(runs[0].run, {"pope": runs[0].tasks["scenes"]}, runs[0].environment)
    with pytest.raises(ValueError, match="no task in common: scenes and pope"):
        compare(runs[0], other)
