"""A study at toy size: every arm and seed is trained once, asked once, and compared with the first arm."""

import io
import json

import pytest
import yaml
from rich.console import Console

import mllm_vision.recipes.study as module
from mllm_vision.recipes.recipe import recipe_names
from mllm_vision.recipes.study import STUDIES, load_study, report, run_study, study_names

SHORT = [
    f"stages.{stage}.arguments.{field}"
    for stage in ("projector", "language")
    for field in ("max_steps=1", "per_device_train_batch_size=2", "disable_tqdm=true")
]
ADDED = "methods=[{type: spatial_tokens, variant: pooling, channels: 2, scales: 2}]"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    short = [*SHORT, "scored_per_family=1"]
    study = {
        "recipe": "tiny_spatial_tokens",
        "output": str(folder / "runs"),
        "task": "scenes:questions=6:families=colour/count",
        "seeds": [3, 4],
        "arms": {"stock": ["methods=[]", *short], "added": [ADDED, *short]},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return load_study(folder / "toy.yaml")


@pytest.fixture(scope="module")
def record(plan):
    return run_study(plan)


def test_each_arm_has_its_seeds_scores_and_difference(record):
    assert json.loads(json.dumps(record)) == record
    stock, added = record["arms"].values()
    assert list(record["arms"]) == ["stock", "added"]
    assert len(stock["seeds"]) == len(added["seeds"]) == 2
    for arm in (stock, added):
        scores = arm["scores"]["mean of families"]["accuracy"]
        assert scores["value"] == pytest.approx(sum(arm["seeds"]) / 2)
        assert all(seconds >= 0 for seconds in arm["seconds"])
    difference = added["differences"]["mean of families"]["accuracy"]["value"]
    assert difference == pytest.approx(sum(added["seeds"]) / 2 - sum(stock["seeds"]) / 2)
    assert stock["differences"]["mean of families"]["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    kernels, project = 2 * 192 * (5 * 5 + 10 * 10), 2 * 256
    assert added["parameters"] - stock["parameters"] == kernels + project
    assert record["before"]["colour"]["accuracy"]["value"] > 0.5  # the trained checkpoint that both went on from


def test_a_study_goes_on_where_it_was(plan, record, monkeypatch):
    monkeypatch.setattr(module, "train", lambda *arguments: pytest.fail("nothing is left to train"))
    said = []
    again = run_study(plan, said.append)
    assert {**again, "environment": 0} == {**record, "environment": 0}
    asked = [f"{arm}-{seed}" for arm in ("stock", "added") for seed in (3, 4)]
    assert said == [f"asking: {name}" for name in (*asked, "tiny-llava-scenes, before training")]


def test_the_table_names_every_arm(record):
    console = Console(width=120, file=io.StringIO())
    console.print(report(record))
    lines = console.file.getvalue().splitlines()
    assert [line.split("  ")[0].strip() for line in lines if "(" in line] == ["before training", "stock", "added"]


def test_studies_that_come_along_can_be_read():
    assert study_names() == sorted(path.stem for path in STUDIES.glob("*.yaml"))
    assert "spatial_tokens" in study_names()
    for name in study_names():
        assert load_study(name).recipe in recipe_names()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("arm: {}", "Study has no field arm; its fields are recipe, output, task, seeds, arms"),
        ("seeds: [0, one]", r"seeds must be a list, each of type int, got \[0, 'one'\]"),
        ("seeds: []", "a study needs seeds and arms"),
        ("task: scene", "scenes"),
        ("arms: {a: [step=3]}", "unknown key"),
        ("arms: {a: ['methods=[{type: spatial}]']}", "unknown method 'spatial'"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_before_it_begins(tmp_path, change, message):
    study = yaml.safe_load((STUDIES / "spatial_tokens.yaml").read_text()) | yaml.safe_load(change)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    with pytest.raises(ValueError, match=message):
        load_study(tmp_path / "a.yaml")


def test_a_study_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(FileNotFoundError, match=r"no study 'spatial'; there are .*spatial_tokens"):
        load_study("spatial")
