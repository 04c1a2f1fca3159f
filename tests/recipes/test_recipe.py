"""Recipes are read strictly: what is misspelt is named, with what would have been right."""

import math
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mllm_vision.cli import app
from mllm_vision.recipes.data import DataSource
from mllm_vision.recipes.lora import LoraSpec
from mllm_vision.recipes.recipe import RECIPES, load_recipe, recipe_names, recipe_title
from mllm_vision.recipes.stages import AnswersStage, ConversationsStage
from mllm_vision.recipes.uhd_tower import UHDTowerSpec

BATCH = re.compile(r"^# Batch +(\d+) = (\d+) rows x (\d+) accumulated x (\d+) GPU", re.MULTILINE)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_library_loads_and_explains_itself(name):
    manual = (RECIPES / f"{name}.yaml").read_text().split("\noutput:")[0]
    title = recipe_title(name)
    assert title.endswith(".") and ". " not in title, "the title must be one sentence"
    heads = re.findall(r"^# ([A-Z]\w+)  *\S", manual.partition("\n#\n")[2], re.MULTILINE)
    stages = load_recipe(name).stages
    reads = any(isinstance(stage, ConversationsStage) for stage in stages)
    for head in ("Command", "Continue", "Hardware", "Cost", *["Data"] * reads):
        assert head in heads, f"the header must have a line {head}"
    assert {"Makes", "Reproduces"} & set(heads), "the header must say what it Makes or Reproduces"
    assert f"mllm-vision train {name}" in manual
    assert re.search(
        rf"accelerate launch --config_file \w+\.yaml --num_processes \d \\\n#  +-m mllm_vision train {name}\b", manual
    )
    if "Batch" in heads:
        batch, *factors = map(int, BATCH.search(manual).groups())
        arguments = stages[-1].arguments
        assert factors[:2] == [arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]]
        assert batch == math.prod(factors)


def test_overrides_reach_a_stage_by_its_name():
    recipe = load_recipe("tiny_llava_scenes", ["seed=3", "stages.tower.arguments.max_steps=7", "output=elsewhere"])
    assert (recipe.seed, recipe.output) == (3, "elsewhere")
    assert recipe.stages[0].arguments["max_steps"] == 7
    assert load_recipe("tiny_llava_scenes", ["stages.tower.arguments.learning_rate=1e-4"]).stages[0].arguments[
        "learning_rate"
    ] == pytest.approx(1e-4)
    assert recipe.stages[1].arguments == load_recipe("tiny_llava_scenes").stages[1].arguments


def test_a_recipe_goes_on_from_its_base_whatever_becomes_of_the_tower():
    assert load_recipe("tiny_llava_scenes").base is None
    assert load_recipe("tiny_spatial_tokens").base == "tiny-llava-scenes"
    large = load_recipe("tiny_large_scenes", ["model.patch_size=28", "model.merger_layers=[]"])
    assert large.base == "tiny-llava-scenes"
    assert large.model == UHDTowerSpec(base="tiny-llava-scenes", patch_size=28, merger_layers=[])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=3", "unknown key sed; valid keys are output, seed, model, stages, methods, dtype, quantize"),
        (
            "stages.towr.arguments.max_steps=7",
            "no stage 'towr'; there are tower, captions, mixed, questions, relations",
        ),
        ("stages.tower.max_step=7", "unknown key max_step; valid keys are objective, name, trains, lora"),
        ("stages.tower.arguments.max_step=7", "unknown key max_step; valid keys are .*max_steps"),
        ("stages.tower.arguments.output_dir=x", "unknown key output_dir"),
        ("model.visoin.hidden_size=7", "model: unknown key visoin; valid keys are vision, text"),
        ("stages=3", "stages must be a list"),
        (
            "stages.tower.objective=words",
            "objective must be one of patch_words, object_words, answers, conversations, got 'words'",
        ),
        ("stages.tower.arguments.max_steps=-1", "stages.tower.arguments needs max_steps of at least 1"),
        ("seed", "must look like key=value"),
        (
            "stages.tower.name=..",
            r"stages...: name is that of a folder, .* none of model, base, tensorboard, features, asked, got '..'",
        ),
        ("stages.tower.name=a/b", "name is that of a folder, .* got 'a/b'"),
        ("stages.tower.name=model", "name is that of a folder, .* got 'model'"),
        ("stages.tower.arguments.remove_unused_columns=true", "unknown key remove_unused_columns"),
        ("stages.tower.arguments.per_device_train_batch_size=0", "batch_size must be at least 1, got 0"),
        ("stages.tower.arguments.learning_rate=-1e-3", "the rate learning_rate must be 0 or more, got -0.001"),
        ("stages.captions.learning_rates.language=-1.0", "the rate language must be 0 or more, got -1.0"),
        ("stages.tower.arguments.max_steps=0", "max_steps must be at least 1, or -1 to count epochs, got 0"),
        ("stages.tower.first_scene=many", "tiny_llava_scenes.yaml: stages.tower: first_scene must be of type int"),
        ("seed=[", r"seed: '\[' is no YAML"),
        ("seed.more=1", "seed.more: seed has no key 'more'; override it whole"),
        (
            "model={base: a, patch: 14}",
            "model: unknown key patch; valid keys are base, patch_size, merger_layers, merger",
        ),
        ("model={base: a, patch_size: 14}", "model lacks merger_layers"),
        ("model=3", "model must be of type str or a mapping with vision, text or a mapping with base, .*, got 3"),
        ("methods=[{type: spatial_token}]", "unknown method 'spatial_token'"),
    ],
)
def test_a_wrong_override_is_an_error_that_lists_the_right_ones(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("tiny_llava_scenes", [override])


CHAT = """
output: nowhere
seed: 0
model: tiny-llava-scenes
stages:
  - name: chat
    objective: conversations
    trains: [projector]
    data: [{format: conversations, path: rows.json}]
    lora: {r: 8, alpha: 16}
    arguments: {learning_rate: 2e-4}
"""


@pytest.fixture
def chat(tmp_path):
    path = tmp_path / "chat.yaml"
    path.write_text(CHAT)
    return path


def test_a_recipe_of_conversations_is_read_whole(chat):
    recipe = load_recipe(chat, ["stages.chat.lora.options={use_dora: true}", "quantize=nf4", "dtype=bfloat16"])
    (stage,) = recipe.stages
    assert isinstance(stage, ConversationsStage)
    assert stage.data == [DataSource(format="conversations", path="rows.json")]
    assert stage.lora == LoraSpec(r=8, alpha=16, options={"use_dora": True})
    assert stage.arguments == {"learning_rate": 2e-4}
    assert (recipe.quantize, recipe.dtype, recipe.base) == ("nf4", "bfloat16", "tiny-llava-scenes")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.chat.trains=[]", "stages.chat.lora=null"], "stages.chat trains nothing"),
        (["stages.chat.data=[]"], "stages.chat.data must name a source"),
        (["stages.chat.data=[{format: json, path: x}]"], "format must be one of .*, got 'json'"),
        (["stages.chat.data=[{format: messages}]"], "data lacks path"),
        (["stages.chat.data=[{format: messages, path: x, streaming: true}]"], "needs max_steps of at least 1"),
        (
            ["stages.chat.data=[{format: messages, path: x, streaming: true}, {format: messages, path: y}]"],
            "either all sources are streamed or none",
        ),
        (
            [
                "stages.chat.data=[{format: messages, path: x, streaming: true}]",
                "stages.chat.arguments.max_steps=5",
                "stages.chat.group_by_modality=true",
            ],
            "group_by_modality needs all rows at hand",
        ),
        (["stages.chat.max_length=0"], "stages.chat.max_length must be at least 1, got 0"),
        (["stages.chat.learning_rates.tower=1e-5"], "stages.chat.learning_rates: tower does not learn in this stage"),
        (["stages.chat.layer_decay.tower=0.9"], "stages.chat.layer_decay: tower does not learn in this stage"),
        (
            ["stages.chat.lora=null", "quantize=nf4"],
            "stages.chat: a quantised model learns by LoRA; give",
        ),
        (["stages.chat.data.1.path=x"], "no item '1'; there are 0"),
        (["stages.chat.turns={}"], "stages.chat: unknown key turns; valid keys are objective, name"),
        (["stages.chat.lora.rank=3"], "lora: unknown key rank; valid keys are target, r, alpha"),
        (["stages.chat.lora={r: 8}"], "lora lacks alpha"),
        (["stages.chat.name=features"], "must be of letters, digits, - and _ and none of model, base, tensorboard"),
        (
            [
                "methods=[{type: hiprune, keep: 0.5}]",
                "stages=[{name: chat, objective: object_words, photos: x, trains: [projector]}]",
            ],
            "words of patches are learnt by the stock host",
        ),
        (
            ["stages.chat.trains=[projector]", "stages.chat.lora.target=all"],
            "the projector is both in trains and a target",
        ),
        (["stages.chat.pack=true", "attention=flash_attention_2"], "masks that flash attention does not take"),
        (["stages.chat.layer_decay.language=1.5"], r"layer_decay of the language must be in \(0, 1\], got 1.5"),
        (
            [
                "stages.chat.cache_tower=true",
                "stages.chat.arguments.eval_strategy=epoch",
                "stages.chat.validation=[{format: messages, path: x, streaming: true}]",
            ],
            "cache_tower needs all rows at hand, but its validation is streamed",
        ),
        (["publish_rank=9"], r"publish_rank must be in 1\.\.8, got 9"),
        (["publish_rank=4", "stages.chat.lora=null", "stages.chat.trains=[projector]"], "the last stage has no lora"),
        (["publish_rank=4", "stages.chat.lora.options={use_dora: true}"], "plain LoRA alone.* has use_dora=True"),
        (["stages.chat.lora.target=eyes"], "target must be one of 'all', 'language'"),
        (["stages.chat.bad_rows=drop"], "bad_rows must be one of 'fail', 'skip', got 'drop'"),
        (["stages.chat.max_length=long"], "max_length must be .*int.*, got 'long'"),
        (["stages.chat.cache_tower=true", "stages.chat.trains=[tower]"], "cache_tower needs a frozen tower"),
        (["stages.chat.cache_tower=true", "stages.chat.lora.target=all"], "cache_tower needs a frozen tower"),
        (["stages.chat.arguments.eval_strategy=steps"], "need one another, got eval_strategy alone"),
        (["stages.chat.validation=[{format: messages, path: x}]"], "need one another, got validation alone"),
        (["stages.chat.pack=true", "stages.chat.group_by_modality=true"], "pack leaves no padding"),
        (["stages.chat.pack=true", "methods=[{type: random, keep: 9}]"], "cannot be packed"),
        (["stages.chat.learning_rates={eyes: 1.0}"], "unknown part eyes; there are language, tower, projector"),
        (["stages.chat.arguments.learning_rate=fast"], "arguments.learning_rate must be of type float, got 'fast'"),
        (["stages.chat.arguments.bf16=1"], "arguments.bf16 must be of type bool, got 1"),
        (
            ["quantize=nf4", "stages.chat.trains=[language]", "stages.chat.lora.target=projector"],
            "quantised weights cannot be trained, got language",
        ),
        (["quantize=int4"], "quantize must be one of 'nf4', 'int8'"),
        (["dtype=half"], "dtype must be one of"),
        (["task=scenes,scene_captions"], "task must be one benchmark"),
        (["task=scene"], "scene"),
        (["model={tower: a}"], "model lacks language"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(chat, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(chat, overrides)


def test_an_override_changes_one_of_what_anchors_share(chat):
    raw = chat.read_text().replace("arguments: {", "arguments: &shared {")
    more = (
        raw[raw.index("  - name: chat") :]
        .replace("name: chat", "name: first")
        .replace("    lora: {r: 8, alpha: 16}\n", "")
    )
    chat.write_text(raw.replace("  - name: chat", more.replace("&shared", "&first") + "  - name: chat"))
    chat.write_text(chat.read_text().replace("arguments: &shared {learning_rate: 2e-4}", "arguments: *first"))
    first, second = load_recipe(chat, ["stages.first.arguments.max_steps=3"]).stages
    assert first.arguments == {"learning_rate": 2e-4, "max_steps": 3}
    assert second.arguments == {"learning_rate": 2e-4}


def test_an_override_reaches_what_the_recipe_leaves_out(chat):
    overrides = ["stages.chat.learning_rates.language=1e-4", "stages.chat.data.0.path=mine.json", "output=~/runs"]
    recipe = load_recipe(chat, [*overrides, "stages.chat.learning_rates.projector=2e-5"])
    (stage,) = recipe.stages
    assert stage.learning_rates == {"language": 1e-4, "projector": 2e-5}
    assert stage.data == [DataSource(format="conversations", path="mine.json")]
    assert recipe.output == str(Path.home() / "runs")


def test_a_rate_may_be_that_of_methods_or_of_whatever_a_named_submodule_is_in(chat):
    pooling = "methods=[{type: spatial_tokens, variant: pooling}]"
    rate = "stages.chat.learning_rates.projector=1e-4"
    load_recipe(chat, ["stages.chat.trains=[]", pooling, rate])
    load_recipe(chat, ["stages.chat.trains=[model.multi_modal_projector]", rate])
    with pytest.raises(ValueError, match="projector does not learn in this stage"):
        load_recipe(chat, ["stages.chat.trains=[]", rate])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"output: [", "mine.yaml is no YAML: .*; mend the file"),
        ("output: \u00e9".encode("latin1"), "mine.yaml is no YAML: .*utf-8.*; mend the file"),
        (b"seed: 1\nseed: 2", "mine.yaml is no YAML: seed stands twice.*line 1"),
        (b"stages: [{lora: {r: 1, r: 2}}]", "mine.yaml is no YAML: r stands twice"),
        (b"[1]", "mine.yaml must be a mapping of keys to values, got list"),
        (b"", "mine.yaml must be a mapping of keys to values, got NoneType"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, says):
    (tmp_path / "mine.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=re.compile(says, re.DOTALL)):
        load_recipe(tmp_path / "mine.yaml", ["seed=1"])


def test_lora_comes_last(chat):
    raw = yaml.safe_load(chat.read_text())
    raw["stages"].append({**raw["stages"][0], "name": "more", "lora": None})
    chat.write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match="LoRA is for the last stage"):
        load_recipe(chat)
    raw["stages"][1]["name"] = "chat"
    chat.write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match="two are called chat"):
        load_recipe(chat)


def test_recipes_are_listed_with_what_they_are_for_and_taken_along(tmp_path):
    listed = CliRunner().invoke(app, ["recipes"]).output
    for name in recipe_names():
        assert name in listed
        assert len(recipe_title(name)) > 20
    copied = CliRunner().invoke(app, ["recipe", "copy", "tiny_llava_scenes", str(tmp_path / "mine")])
    path = tmp_path / "mine" / "tiny_llava_scenes.yaml"
    assert copied.output.strip() == str(path)
    assert load_recipe(path) == load_recipe("tiny_llava_scenes")
    launch = CliRunner().invoke(app, ["recipe", "copy", "fsdp2", str(tmp_path / "mine")])
    assert launch.output.strip() == str(tmp_path / "mine" / "fsdp2.yaml")
    again = CliRunner().invoke(app, ["recipe", "copy", "tiny_llava_scenes", str(tmp_path / "mine")])
    assert (again.exit_code, "exists; move it away first" in again.output) == (1, True)
    to_a_file = CliRunner().invoke(app, ["recipe", "copy", "tiny_lora", str(path)])
    assert (to_a_file.exit_code, "is a file; give a folder to copy to" in to_a_file.output) == (1, True)


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(FileNotFoundError, match=r"no recipe 'tiny'; there are .*tiny_llava_scenes"):
        load_recipe("tiny")


def test_a_recipe_that_lacks_a_key_says_which(tmp_path):
    raw = yaml.safe_load((RECIPES / "tiny_llava_scenes.yaml").read_text())
    del raw["stages"][0]["name"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match="lacks name"):
        load_recipe(tmp_path / "mine.yaml")


def test_an_unknown_family_of_turns_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown family colours; there are existence, count, colour"):
        AnswersStage(name="answers", trains=["projector"], turns={"colours": 1}, arguments={"max_steps": 1})
