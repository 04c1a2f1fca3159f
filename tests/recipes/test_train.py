"""Training at toy size: it resumes where it was killed and overwrites nothing unasked."""

import json

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, TrainerCallback

import mllm_vision.recipes.train as train_module
from mllm_vision.recipes.train import train

TOY = [
    "model.side=70",
    "model.vision={image_size: 70, patch_size: 14, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 3, "
    "num_attention_heads: 2}",
    "model.text={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, "
    "tie_word_embeddings: true}",
    "scored_per_family=4",
    *(
        f"stages.{stage}.arguments.{key}={value}"
        for stage in ("tower", "language")
        for key, value in {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "save_steps": 1,
            "eval_strategy": "no",
            "disable_tqdm": "true",
            "warmup_steps": 0,
        }.items()
    ),
]


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


def train_and_kill(monkeypatch, objective, step, overrides):
    build = train_module._OBJECTIVES[objective]

    def build_and_kill(*args):
        trainer = build(*args)
        trainer.add_callback(KillAfter(step))
        return trainer

    with monkeypatch.context() as patch:
        patch.setitem(train_module._OBJECTIVES, objective, build_and_kill)
        with pytest.raises(Killed):
            train("tiny_llava_scenes", overrides)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train("tiny_llava_scenes", [*TOY, f"output={tmp_path_factory.mktemp('run') / 'unbroken'}"])


def test_a_run_killed_in_each_stage_ends_where_an_unbroken_one_does(unbroken, tmp_path, monkeypatch):
    overrides = [*TOY, f"output={tmp_path / 'broken'}"]
    for objective, step in [("patch_words", 2), ("answers", 1)]:
        train_and_kill(monkeypatch, objective, step, overrides)
    resumed, expected = weights(train("tiny_llava_scenes", overrides)), weights(unbroken)
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


def test_only_what_a_stage_names_is_trained(unbroken):
    tower, final = weights(unbroken.parent / "tower"), weights(unbroken)
    frozen = [key for key in tower if "vision_tower" in key]
    assert frozen
    assert all(torch.equal(tower[key].half().float(), final[key]) for key in frozen)
    assert not torch.equal(
        tower["model.multi_modal_projector.linear_1.weight"].half().float(),
        final["model.multi_modal_projector.linear_1.weight"],
    )


def test_a_finished_run_is_not_overwritten_unasked(unbroken):
    before = (unbroken / "model.safetensors").stat().st_mtime_ns
    overrides = [*TOY, f"output={unbroken.parent}"]
    with pytest.raises(FileExistsError, match="finished run; pass overwrite=true"):
        train("tiny_llava_scenes", overrides)
    assert (unbroken / "model.safetensors").stat().st_mtime_ns == before


def test_an_unfinished_run_is_not_continued_with_another_recipe(tmp_path, monkeypatch):
    overrides = [*TOY, f"output={tmp_path / 'run'}"]
    train_and_kill(monkeypatch, "patch_words", 1, overrides)
    with pytest.raises(FileExistsError, match="unfinished run of another recipe"):
        train("tiny_llava_scenes", [*overrides, "seed=1"])


@pytest.mark.parametrize("extra", [[], ["overwrite=true"]])
def test_a_folder_that_holds_no_run_is_left_alone(tmp_path, extra):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no training run"):
        train("tiny_llava_scenes", [*TOY, f"output={tmp_path}", *extra])
    assert (tmp_path / "precious.txt").read_text() == "mine"
