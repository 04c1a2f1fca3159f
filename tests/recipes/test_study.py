"""A study at toy size: every arm and seed is trained once, asked once, and compared with the first arm."""

import io
import json

import pytest
import yaml
from rich.console import Console

import mllm_vision as mv
import mllm_vision.recipes.study as module
from mllm_vision.eval.tasks.scenes import Scenes
from mllm_vision.recipes.lora import LoraSpec, with_lora
from mllm_vision.recipes.recipe import load_recipe, recipe_names
from mllm_vision.recipes.study import STUDIES, load_study, prompt_cost, report, run_study, study_names
from mllm_vision.recipes.uhd_tower import UHDTowerSpec, with_uhd_tower

SHORT = [
    f"stages.{stage}.arguments.{field}"
    for stage in ("projector", "language")
    for field in ("max_steps=1", "per_device_train_batch_size=2", "disable_tqdm=true")
]
ADDED = "methods=[{type: spatial_tokens, variant: pooling, channels: 2, scales: 2}]"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    short = [*SHORT, "task=scenes:questions=1"]
    study = {
        "recipe": "tiny_spatial_tokens",
        "output": str(folder / "runs"),
        "task": "scenes:questions=6:families=colour/count",
        "seeds": [3, 4],
        "arms": {"stock": ["methods=[]", *short], "added": [ADDED, *short], "pruned": ["methods=[]", *short]},
        "plug": {"pruned": "random:keep=1/4"},
        "against": {"pruned": "added"},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return load_study(folder / "toy.yaml")


@pytest.fixture(scope="module")
def record(plan):
    return run_study(plan)


def test_each_arm_has_its_seeds_scores_and_difference(record):
    assert json.loads(json.dumps(record)) == record
    stock, added, pruned = record["arms"].values()
    assert list(record["arms"]) == ["stock", "added", "pruned"]
    assert len(stock["seeds"]) == len(added["seeds"]) == 2
    for arm in (stock, added):
        scores = arm["scores"]["mean of families"]["accuracy"]
        assert scores["value"] == pytest.approx(sum(arm["seeds"]) / 2)
        assert all(seconds >= 0 for seconds in arm["seconds"])
    difference = added["differences"]["mean of families"]["accuracy"]["value"]
    assert difference == pytest.approx(sum(added["seeds"]) / 2 - sum(stock["seeds"]) / 2)
    assert stock["differences"]["mean of families"]["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert [arm["against"] for arm in (stock, added, pruned)] == ["stock", "stock", "added"]
    assert pruned["differences"]["mean of families"]["accuracy"]["value"] == pytest.approx(
        sum(pruned["seeds"]) / 2 - sum(added["seeds"]) / 2
    )
    kernels, project = 2 * 192 * (5 * 5 + 10 * 10), 2 * 256
    assert added["parameters"] - stock["parameters"] == kernels + project
    assert [arm["visual_tokens"] for arm in (stock, added)] == [100, 102]
    assert all(added["flops"][step] > stock["flops"][step] for step in ("encode", "prefill", "first_token"))
    assert [arm["held_out"] for arm in (stock, added)] == [[{"projector": None, "language": None}] * 2] * 2
    assert pruned["seconds"] == stock["seconds"], "arms with the same overrides share their runs"
    assert [arm["plug"] for arm in (stock, added, pruned)] == [None, None, "random:keep=1/4"]
    assert (pruned["visual_tokens"], pruned["parameters"]) == (25, stock["parameters"])
    assert pruned["scores"] != stock["scores"]
    assert record["before"]["colour"]["accuracy"]["value"] > 0.5  # the trained checkpoint that both went on from


def test_an_adapter_costs_what_its_base_does_and_its_own_layers():
    model, processor = mv.load("tiny-llava-scenes")
    base = prompt_cost(model, processor, Scenes(questions=1))
    adapted = prompt_cost(with_lora(model, LoraSpec(r=1, alpha=1)), processor, Scenes(questions=1))
    assert adapted["visual_tokens"] == base["visual_tokens"] == 100
    assert adapted["flops"]["encode"] == base["flops"]["encode"]
    assert 1 < adapted["flops"]["prefill"] / base["flops"]["prefill"] < 1.1


def test_a_compressed_tower_costs_what_the_formulas_say():
    model, processor = with_uhd_tower(UHDTowerSpec(base="tiny-llava-scenes", patch_size=14, merger_layers=[4]), 280)
    cost = prompt_cost(model, processor, Scenes(questions=1, side=280))
    c, hidden, width = 192, 768, 256

    def layer(n):
        return 2 * n * (4 * c * c + 2 * c * hidden) + 4 * n * n * c

    merger, projector = 2 * 400 * (2 * c * c + c * c), 2 * 100 * (c * width + width * width)
    tower = 2 * 400 * (3 * 14 * 14) * c + 5 * layer(400) + merger + 4 * layer(100)
    assert cost["visual_tokens"] == 100
    assert cost["flops"]["encode"] == tower + projector
    assert cost["flops"]["first_token"] == cost["flops"]["encode"] + cost["flops"]["prefill"]
    assert not hasattr(model, "vision_slots"), "the model is left as it was"


def test_what_the_last_look_at_validation_scenes_found_is_on_record(tmp_path):
    for name, curve in (("tower", [{"step": 2, "noun": 0.1}, {"step": 4, "noun": 0.5}]), ("answers", [])):
        (tmp_path / name).mkdir()
        stage = {"name": name, "curve": curve, "seconds": 7}
        (tmp_path / name / "stage.json").write_text(json.dumps(stage))
    run = load_recipe("tiny_large_scenes", [f"output={tmp_path}"])
    assert module._held_out(run) == {"tower": {"step": 4, "noun": 0.5}, "answers": None}
    assert module._seconds(run) == 14


def test_a_study_goes_on_where_it_was(plan, record, monkeypatch):
    monkeypatch.setattr(module, "train", lambda *arguments: pytest.fail("nothing is left to train"))
    said = []
    again = run_study(plan, said.append)
    assert {**again, "environment": 0} == {**record, "environment": 0}
    asked = [f"{arm}-{seed}" for arm in ("stock", "added", "stock") for seed in (3, 4)]
    assert said == [f"asking: {name}" for name in (*asked, "tiny-llava-scenes, before training")]


def test_the_table_names_every_arm(record):
    console = Console(width=120, file=io.StringIO())
    console.print(report(record))
    lines = console.file.getvalue().splitlines()
    assert [line.split("  ")[0].strip() for line in lines if "(" in line] == [
        "before training",
        "stock",
        "added",
        "pruned",
    ]


def test_what_a_step_costs_is_shown_where_it_was_measured(record):
    cost = {arm: {"ratio": {"median": 0.71}, "megabytes": 460.6} for arm in record["arms"]}
    console = Console(width=160, file=io.StringIO())
    console.print(report({**record, "cost": cost}))
    shown = console.file.getvalue()
    assert "a step" in shown
    assert shown.count("0.71") == shown.count("461") == 3


def test_studies_that_come_along_can_be_read():
    assert study_names() == sorted(path.stem for path in STUDIES.glob("*.yaml"))
    assert "spatial_tokens" in study_names()
    for name in study_names():
        assert load_study(name).recipe in recipe_names()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("arm: {}", "unknown key arm; valid keys are recipe, output, task, seeds, arms, plug, against"),
        ("plug: {prune: random:keep=1/2}", "plug names no arm with prune; the arms are stock"),
        ("against: {stock: prune}", "against names no arm with prune; the arms are stock"),
        ("plug: {stock: rendom:keep=1/2}", "unknown method 'rendom'"),
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
