"""A run that is killed, at any time, ends where an unbroken one does."""

import json
import shutil

import pytest
import torch

import mllm_vision.recipes.publish as publish_module
import mllm_vision.recipes.train as train_module
from mllm_vision.recipes.train import train
from tests.recipes.processes import run
from tests.recipes.runs import (
    SPATIAL,
    in_stages,
    kill_after_three_steps,
    kill_while_saving,
    logged,
    saved,
    write_recipe,
)


class Killed(BaseException):
    """Stands for a kill of the process."""


def killed(*args, **kwargs):
    raise Killed


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"), methods=[SPATIAL])


@pytest.fixture(scope="module")
def unbroken(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "unbroken"
    train(recipe, [f"output={output}"])
    return output


def assert_same_run(output, expected):
    assert logged(output) == logged(expected)
    for stage in ("all", "lora", "model"):
        weights, others = saved(output / stage), saved(expected / stage)
        assert weights.keys() == others.keys()
        for name, value in others.items():
            assert torch.equal(weights[name], value), (stage, name)


def test_the_loss_is_logged_at_every_checkpoint_besides(unbroken):
    steps = [row["step"] for row in logged(unbroken)["all.log.jsonl"]]
    assert steps == [2, 3, 4]


def test_a_kill_while_a_checkpoint_is_written_loses_what_came_after_the_one_before(
    recipe, unbroken, tmp_path, monkeypatch
):
    output = tmp_path / "run"
    assert [ended.code for ended in run(recipe, [f"output={output}"], prepare=kill_while_saving)] == [-9]
    half = output / "all.checkpoints" / "checkpoint-4"
    assert (half / "model.safetensors").is_file()
    assert (half.with_name("checkpoint-2") / "trainer_state.json").is_file(), "the one before must not go first"
    (half / "trainer_state.json").write_text('{"best_metric": nu')  # as a kill a moment later would have left
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_save", killed)  # at the end of the first stage
        with pytest.raises(Killed):
            train(recipe, [f"output={output}"])
    train(recipe, [f"output={output}"])
    assert_same_run(output, unbroken)


def test_a_kill_between_stages_and_one_while_the_result_is_written(recipe, unbroken, tmp_path, monkeypatch):
    output = tmp_path / "run"
    output.mkdir()
    for name in ("recipe.yaml", "base", "all", "all.log.jsonl"):
        (shutil.copytree if (unbroken / name).is_dir() else shutil.copy)(unbroken / name, output / name)
    (output / "recipe.yaml").write_text((unbroken / "recipe.yaml").read_text().replace(str(unbroken), str(output)))
    with monkeypatch.context() as patch:
        patch.setattr(publish_module, "model_card", killed)
        with pytest.raises(Killed):
            train(recipe, [f"output={output}"])
    assert not (output / "model").exists()
    (output / ".model-cut-off").mkdir()  # what a kill leaves, where no exception tidies up
    train(recipe, [f"output={output}"])
    assert_same_run(output, unbroken)
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in unbroken.iterdir())


def test_a_recipe_may_change_until_something_has_been_learnt(recipe, tmp_path, monkeypatch):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "require_room", killed)
        with pytest.raises(Killed):
            train(recipe, [f"output={output}"])
    changed = [f"output={output}", "seed=1", *in_stages("max_steps=1")]
    assert json.loads((train(recipe, changed) / "scores.json").read_text())["seed"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kill", [kill_while_saving, kill_after_three_steps])
@pytest.mark.parametrize(
    "changed",
    [
        [],
        ["methods=[]", *in_stages("dataloader_num_workers=2")],
        ["methods=[]", *in_stages("gradient_accumulation_steps=2", "per_device_train_batch_size=2")],
        ["methods=[]", "model.text.tie_word_embeddings=true", "dtype=bfloat16", "stages.lora.group_by_modality=true"],
        ["methods=[]", "stages.lora.lora.options={use_dora: true}", *in_stages("num_train_epochs=2", "max_steps=-1")],
        ["methods=[]", *in_stages("bf16=true", "gradient_checkpointing=true")],
    ],
    ids=["slots", "workers", "accumulation", "bfloat16", "epochs", "checkpointing"],
)
def test_kills_at_other_steps_and_with_other_settings(recipe, tmp_path, kill, changed):
    train(recipe, [f"output={tmp_path / 'unbroken'}", *changed])
    resumed = [f"output={tmp_path / 'killed'}", *changed]
    assert [ended.code for ended in run(recipe, resumed, prepare=kill)] == [-9]
    assert [ended.code for ended in run(recipe, resumed)] == [0]
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")
