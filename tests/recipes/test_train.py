"""Training at toy size: it resumes where it was killed and overwrites nothing unasked."""

import ast
import json
import re

import pytest
import torch
import yaml
from transformers import AutoProcessor, LlavaForConditionalGeneration, TrainerCallback, TrainingArguments

import mllm_vision as mv
import mllm_vision.recipes.publish as publish_module
import mllm_vision.recipes.train as train_module
import mllm_vision.recipes.trainer as trainer_module
from mllm_vision.adapter_folder import save_adapter
from mllm_vision.eval import evaluate
from mllm_vision.recipes.lora import LoraSpec, with_lora
from mllm_vision.recipes.recipe import load_recipe
from mllm_vision.recipes.stage_trainers import trainer_for
from mllm_vision.recipes.train import train
from mllm_vision.scenes import render, sample_scene
from tests.recipes.runs import write_recipe

_STAGE = """
  - name: {name}
    objective: {objective}
    trains: {trains}{more}
    arguments:
      max_steps: 3
      per_device_train_batch_size: 2
      learning_rate: 1.0e-3
      eval_strategy: "no"
      save_steps: 1
      disable_tqdm: true
"""
TOY = (
    """
output: nowhere
seed: 0
task: scenes:questions=4:side=70
publish_dtype: float16
side: 70
model:
  vision: {image_size: 70, patch_size: 14, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 3,
           num_attention_heads: 2}
  text: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
         tie_word_embeddings: true}
stages:
"""
    + _STAGE.format(name="tower", objective="patch_words", trains="[tower, model.multi_modal_projector]", more="")
    + _STAGE.format(
        name="language",
        objective="answers",
        trains="[projector, language]",
        more="\n    turns: {caption: 0.5, existence: 2, count: 1}",
    )
)


class Killed(Exception):
    """Stands for a kill of the process."""


class KillAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def weights(folder):
    return LlavaForConditionalGeneration.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "toy.yaml"
    path.write_text(TOY)
    return path


def train_and_kill(monkeypatch, toy, objective, step, *overrides):
    def build_and_kill(stage, *args):
        trainer = trainer_for(stage, *args)
        if stage.objective == objective:
            trainer.add_callback(KillAfter(step))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "trainer_for", build_and_kill)
        with pytest.raises(Killed):
            train(toy, overrides)


@pytest.fixture(scope="module")
def unbroken(toy, tmp_path_factory):
    return train(toy, [f"output={tmp_path_factory.mktemp('run') / 'unbroken'}"])


def test_a_run_killed_in_each_stage_ends_where_an_unbroken_one_does(toy, unbroken, tmp_path, monkeypatch):
    output = f"output={tmp_path / 'broken'}"
    for objective, step in [("patch_words", 2), ("answers", 1)]:
        train_and_kill(monkeypatch, toy, objective, step, output)
    resumed, expected = weights(train(toy, [output])), weights(unbroken)
    assert resumed.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(resumed[key], value), key


def test_the_published_model_is_half_on_disk_single_in_memory_and_tells_its_scores(unbroken):
    from safetensors.torch import load_file

    assert {value.dtype for value in load_file(unbroken / "model.safetensors").values()} == {torch.float16}
    model, info = LlavaForConditionalGeneration.from_pretrained(unbroken, output_loading_info=True)
    assert model.dtype == torch.float32
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert AutoProcessor.from_pretrained(unbroken).tokenizer.padding_side == "left"
    facts = json.loads((unbroken / "scores.json").read_text())
    assert [(stage["name"], stage["steps"]) for stage in facts["stages"]] == [("tower", 3), ("language", 3)]
    assert facts["scores"]["colour"]["n"] == 4
    card = (unbroken / "README.md").read_text()
    assert f"| colour | 4 | {facts['scores']['colour']['accuracy']:.3f} |" in card


def test_a_run_goes_on_with_the_tower_as_a_vit_uhd(toy, unbroken, tmp_path, monkeypatch):
    tasks = []

    def asked(model, processor, task, **kwargs):
        tasks.append(task)
        return evaluate(model, processor, task, **kwargs)

    for module in (trainer_module, publish_module):
        monkeypatch.setattr(module, "evaluate", asked)
    changed = [
        f"model={{base: {unbroken}, patch_size: 7, merger_layers: [0]}}",
        "task=scenes:questions=4:side=112:text_scale=0.75",
        *("side=112", "text_scale=0.75", f"output={tmp_path / 'uhd'}"),
        *(
            f"stages.{name}.arguments.{field}"
            for name in ("tower", "language")
            for field in ("eval_steps=3", "max_steps=3")
        ),
        "stages.language.arguments.eval_strategy=steps",
    ]
    model, processor = mv.load(train(toy, changed))
    assert [(task.split, task.side, task.text_scale) for task in tasks] == [
        ("validation", 112, 0.75),
        ("test", 112, 0.75),
    ]
    assert model.config.vision_config.merger_layers == (0,)
    seen = processor(images=render(sample_scene("test", 0, side=112)), text="<image>", return_tensors="pt")
    assert (seen["input_ids"] == processor.image_token_id).sum() == (112 // 14) ** 2
    first, last = weights(tmp_path / "uhd" / "tower"), model.state_dict()
    merger = "model.vision_tower.layers.0.merger.score.weight"
    assert first[merger].any(), "the merger has not learned"
    assert torch.equal(first[merger].half().float(), last[merger])


@pytest.mark.parametrize("number", [0, 1])
def test_every_stage_draws_the_scenes_of_its_recipe(toy, tmp_path, number):
    plan = load_recipe(toy, ["side=112", "text_scale=0.75", "stages.tower.logit_scale=7"])
    stage = plan.stages[number]
    model, processor = train_module._load(plan, train_module.beginning(plan, tmp_path / "out"))
    arguments = TrainingArguments(str(tmp_path), report_to="none", max_steps=9)
    trainer = trainer_for(stage, plan, model, processor, arguments)
    for drawn, split in ((trainer.train_dataset, "train"), (trainer.eval_dataset, "validation")):
        assert (drawn.split, drawn.side, drawn.text_scale) == (split, 112, 0.75)
    if stage.objective == "patch_words":
        assert trainer.model.logit_scale == 7
        assert trainer.train_dataset.patch == 112 // 5  # the processor makes 5 x 5 tokens of any picture


def test_only_what_a_stage_names_is_trained(unbroken):
    tower, final = weights(unbroken.parent / "tower"), weights(unbroken)
    frozen = [key for key in tower if "vision_tower" in key]
    assert frozen
    assert all(torch.equal(tower[key].half().float(), final[key]) for key in frozen)
    assert not torch.equal(
        tower["model.multi_modal_projector.linear_1.weight"].half().float(),
        final["model.multi_modal_projector.linear_1.weight"],
    )


def test_a_finished_run_is_not_overwritten_unasked(toy, unbroken):
    before = (unbroken / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="finished run; pass overwrite=true"):
        train(toy, [f"output={unbroken.parent}"])
    assert (unbroken / "model.safetensors").stat().st_mtime_ns == before


def test_an_unfinished_run_is_not_continued_with_another_recipe(toy, tmp_path, monkeypatch):
    output = f"output={tmp_path / 'run'}"
    train_and_kill(monkeypatch, toy, "patch_words", 1, output)
    with pytest.raises(FileExistsError, match="unfinished run of another recipe"):
        train(toy, [output, "seed=1"])


def test_the_console_tells_the_stages(toy, tmp_path, capsys):
    train(toy, [f"output={tmp_path / 'run'}"])
    told = re.findall(r"Stage (\w+): (\d+) steps, (\d+\.\d) million parameters learn\n", capsys.readouterr().err)
    assert [(name, steps) for name, steps, _ in told] == [("tower", "3"), ("language", "3")]


def test_an_unfinished_run_goes_on_with_another_card_and_another_task(toy, tmp_path, monkeypatch):
    output = f"output={tmp_path / 'run'}"
    train_and_kill(monkeypatch, toy, "patch_words", 1, output)
    folder = train(toy, [output, "about=Something else.", "task=scenes:questions=5:side=70"])
    assert "Something else." in (folder / "README.md").read_text()
    assert json.loads((folder / "scores.json").read_text())["task"] == "scenes:questions=5:side=70"


def test_a_record_of_an_earlier_version_lacks_what_is_new_since(toy, tmp_path, monkeypatch):
    output = f"output={tmp_path / 'run'}"
    train_and_kill(monkeypatch, toy, "answers", 1, output)
    record = tmp_path / "run" / "recipe.yaml"
    written = yaml.safe_load(record.read_text())
    del written["publish_rank"], written["stages"][1]["branches"]
    record.write_text(yaml.safe_dump(written))
    before = (tmp_path / "run" / "tower" / "model.safetensors").stat().st_mtime_ns
    train(toy, [output])
    assert (tmp_path / "run" / "tower" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.language.trains=[projektor]", "projektor is no submodule of the model"),
        ("stages.language.lora={target: tower, r: 2, alpha: 4, options: {layers_to_transform: 9}}", "no linear layer"),
    ],
)
def test_what_the_model_has_not_is_missed_before_the_first_stage(toy, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(toy, [f"output={tmp_path / 'run'}", "stages.language.trains=[]", override])
    assert not (tmp_path / "run" / "tower").exists()


def test_a_run_does_not_go_on_from_an_adapter(toy, tmp_path):
    model, _ = mv.load("tiny-llava-scenes")
    save_adapter(with_lora(model, LoraSpec(r=1, alpha=1)), tmp_path / "adapter", "tiny-llava-scenes")
    with pytest.raises(ValueError, match="adapter is an adapter; `mllm-vision merge` makes one"):
        train("tiny_lora", [f"output={tmp_path / 'run'}", f"model={tmp_path / 'adapter'}"])


def test_questions_that_are_not_there_are_missed_before_training(toy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"task photos: there is no .*photos, where data says"):
        train(toy, [f"output={tmp_path / 'run'}", "task=photos", f"data={tmp_path}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("extra", [[], ["overwrite=true"]])
def test_a_folder_that_holds_no_run_is_left_alone(toy, tmp_path, extra):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no training run"):
        train(toy, [f"output={tmp_path}", *extra])
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("extra", [[], ["overwrite=true"]])
def test_a_folder_with_a_recipe_of_ones_own_is_left_alone(toy, tmp_path, extra):
    mine = tmp_path / "recipe.yaml"
    mine.write_text(toy.read_text())
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no training run"):
        train(mine, [f"output={tmp_path}", *extra])
    assert mine.read_text() == toy.read_text()
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_stream_without_a_good_row_is_no_finished_run(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "broken"}')
    stage = {
        "name": "chat",
        "objective": "conversations",
        "data": [{"format": "messages", "path": str(rows), "streaming": True}],
        "bad_rows": "skip",
        "trains": ["projector"],
        "arguments": {"max_steps": 2, "disable_tqdm": True},
    }
    recipe = {"output": str(tmp_path / "run"), "seed": 0, "model": "tiny-llava-scenes", "stages": [stage]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=r"stages.chat: there is no good row in the data"):
        train(tmp_path / "mine.yaml")
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("lacks", ["path", "images"])
@pytest.mark.parametrize("kind", ["data", "validation"])
def test_data_of_the_last_stage_are_looked_for_before_the_first_is_trained(tmp_path, kind, lacks):
    mine = write_recipe(tmp_path, output=str(tmp_path / "run"))
    plan = yaml.safe_load(mine.read_text())
    last = plan["stages"][-1] = {**plan["stages"][-1], "data": [dict(source) for source in plan["stages"][-1]["data"]]}
    last[kind] = [{**last["data"][0], lacks: str(tmp_path / "gone.json")}]
    last["arguments"] = {**last["arguments"], "eval_strategy": "no" if kind == "data" else "steps"}
    mine.write_text(yaml.safe_dump(plan))
    with pytest.raises(FileNotFoundError, match=r"gone.json.* is no (file|folder); check the path"):
        train(mine)
    assert not (tmp_path / "run").exists()


def test_stages_of_one_run_differ_in_precision(tmp_path):
    short = [f"stages.{stage}.arguments.max_steps=1" for stage in ("all", "lora")]
    said = [f"output={tmp_path / 'run'}", "stages.lora.arguments.bf16=true", *short]
    assert train(write_recipe(tmp_path), said).is_dir()


def test_the_card_of_an_adapter_imports_what_it_uses():
    code = ast.parse(publish_module._USE_ADAPTER.removeprefix("```python").strip().removesuffix("```"))
    assert {name.asname or name.name for node in code.body for name in getattr(node, "names", [])} == {"mv"}
