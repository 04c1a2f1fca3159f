"""Several processes learn what one learns from the same rows, by copies of the model (DDP) or shares of it.

Shares are those of FSDP and of DeepSpeed, whose tests run where it is installed.
"""

import json
from importlib.resources import files

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from transformers.integrations import deepspeed

import mllm_vision as mv
from mllm_vision.recipes.train import train
from mllm_vision.recipes.trainer import layer_classes
from mllm_vision.recipes.zero import whole_weights
from tests.hosts import HOSTS
from tests.recipes.processes import run
from tests.recipes.runs import (
    break_the_gradient,
    break_the_loss,
    in_stages,
    keep_from_cache_and_pictures,
    kill_after_three_steps,
    kill_apart_after_three_steps,
    kill_shards_after_three_steps,
    logged,
    saved,
    shard_on_processors,
    take_all_weights_apart,
    write_recipe,
)

CONFIGS = files("mllm_vision.recipes") / "accelerate"
HALF = in_stages("per_device_train_batch_size=2")
NO_DROPOUT = ["stages.lora.lora.dropout=0.0", "model.text.attention_dropout=0.0", "stages.all.group_by_modality=false"]
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "alone"
    train(recipe, [f"output={output}", "task=scenes:questions=2:side=70", *NO_DROPOUT, *in_stages("logging_steps=1")])
    return output


def launched_with(config):
    """What `accelerate launch` tells processes by a configuration for DeepSpeed, on processors."""
    told = ["--config_file", str(CONFIGS / config), "--num_processes", "2", "--main_process_port", "0", "script.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(told))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(args)
    told = {name: value for name, value in environment.items() if name.startswith("ACCELERATE_")}
    return {**told, "DS_ACCELERATOR": "cpu"}


def assert_learns_the_same(output, expected):
    """To the order in which floats are added, which Adam, dividing by the size of a gradient, makes more of."""
    for stage, rows in logged(expected).items():
        got = logged(output)[stage]
        assert [row["step"] for row in got] == [row["step"] for row in rows], "the log is written once"
        for key in ("loss", "grad_norm", "eval_loss"):
            found, wanted = ([row[key] for row in each if key in row] for each in (got, rows))
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    weights = saved(output / "model")
    for name, value in saved(expected / "model").items():
        torch.testing.assert_close(weights[name], value, atol=1e-3, rtol=1e-3)


def test_two_processes_learn_what_one_learns_and_write_it_once(recipe, alone, tmp_path):
    output = tmp_path / "two"
    said = ["task=scenes:questions=2:side=70", *NO_DROPOUT, *in_stages("logging_steps=1"), *HALF]
    ended = run(recipe, [f"output={output}", *said], processes=2)
    assert [process.error for process in ended] == ["", ""]
    assert_learns_the_same(output, alone)
    scores = [json.loads((folder / "model" / "scores.json").read_text())["scores"] for folder in (output, alone)]
    assert scores[0] == scores[1]
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in alone.iterdir())


def test_one_of_two_processes_fills_the_cache_of_features(recipe, tmp_path):
    plan = json.loads(recipe.read_text())
    source = plan["stages"][0]["data"][0]
    held_out = [{**source, "limit": 4, "weight": 1.0}]
    stage = {**plan["stages"][0], "trains": ["projector"], "cache_tower": True, "validation": held_out}
    cached = tmp_path / "cached.yaml"
    cached.write_text(json.dumps({**plan, "stages": [stage]}))
    evaluates = ("eval_strategy=steps", "eval_steps=2", "per_device_eval_batch_size=4")
    said = [*NO_DROPOUT[1:], *(f"stages.all.arguments.{setting}" for setting in ("logging_steps=1", *evaluates))]
    train(cached, [f"output={tmp_path / 'one'}", *said])
    halves = [f"stages.all.arguments.per_device_{rows}_batch_size=2" for rows in ("train", "eval")]
    two = [f"output={tmp_path / 'two'}", *said, *halves]
    ended = run(cached, two, processes=2, prepare=keep_from_cache_and_pictures)
    assert [process.error for process in ended] == ["", ""]
    assert_learns_the_same(tmp_path / "two", tmp_path / "one")
    kept = []
    for output in (tmp_path / "one", tmp_path / "two"):
        files = (path for path in (output / "features").rglob("*") if path.is_file())
        kept.append({str(path.relative_to(output)): path.read_bytes() for path in files})
    assert kept[0] == kept[1] and any(kept[0].values())


def test_gradients_of_two_half_batches_are_those_of_one(recipe, alone, tmp_path):
    halves = in_stages("logging_steps=1", "gradient_accumulation_steps=2", "per_device_train_batch_size=2")
    train(recipe, [f"output={tmp_path / 'run'}", *NO_DROPOUT, *halves])
    assert_learns_the_same(tmp_path / "run", alone)


def test_all_processes_stop_before_they_learn_from_a_loss_that_is_no_number(recipe, tmp_path):
    output = tmp_path / "run"
    ended = run(recipe, [f"output={output}", *HALF, *in_stages("save_steps=1")], processes=2, prepare=break_the_loss)
    assert [process.code for process in ended] == [1, 1], "neither hangs"
    assert ended[0].error == ended[1].error
    assert ended[0].error.startswith("FloatingPointError: the loss of step 3 is nan; its rows are train-")
    latest = output / "all.checkpoints" / "checkpoint-2"
    assert [path.name for path in latest.parent.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(value.isfinite().all() for value in saved(latest).values())


@pytest.mark.parametrize("spec", HOSTS, ids=[host.name for host in HOSTS])
def test_the_layers_that_fsdp_gathers_are_there_in_every_host(spec):
    model = spec.model()
    classes = {type(module).__name__ for module in model.modules()}
    found = layer_classes(model)
    assert set(found) <= classes
    assert len(found) == 2, "those of the tower and those of the language model"


def test_the_launch_configurations_are_ones_that_accelerate_reads():
    configs = {path.name: ClusterConfig.from_yaml_file(str(path)) for path in sorted(CONFIGS.iterdir())}
    assert {name: str(config.distributed_type.value) for name, config in configs.items()} == {
        "ddp.yaml": "MULTI_GPU",
        "deepspeed_zero2.yaml": "DEEPSPEED",
        "deepspeed_zero3.yaml": "DEEPSPEED",
        "fsdp2.yaml": "FSDP",
    }
    options = {action.dest for action in launch_command_parser()._actions}
    for config in configs.values():
        assert config.num_processes == -1, "the command says how many"
        assert set(config.fsdp_config) | set(config.deepspeed_config) <= options
    assert configs["fsdp2.yaml"].fsdp_config["fsdp_version"] == 2
    for stage in (2, 3):
        assert configs[f"deepspeed_zero{stage}.yaml"].deepspeed_config["zero_stage"] == stage


def test_models_are_read_whole_where_zero_3_is_on():
    class Config:
        def is_zero3(self):
            return True

    config = Config()  # transformers holds no reference to it
    deepspeed.set_hf_deepspeed_config(config)
    try:
        with whole_weights():
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


@pytest.mark.slow
def test_two_processes_share_a_stream(recipe, tmp_path):
    plan = json.loads(recipe.read_text())
    del plan["stages"][1]
    plan["stages"][0]["data"] = [{**source, "streaming": True, "weight": 1.0} for source in plan["stages"][0]["data"]]
    streamed = tmp_path / "streamed.yaml"
    streamed.write_text(json.dumps(plan))
    said = [*NO_DROPOUT[1:], "stages.all.arguments.max_steps=3", "stages.all.arguments.logging_steps=1"]
    train(streamed, [f"output={tmp_path / 'one'}", *said])
    two = [f"output={tmp_path / 'two'}", *said, "stages.all.arguments.per_device_train_batch_size=2"]
    assert [ended.error for ended in run(streamed, two, processes=2)] == ["", ""]
    assert_learns_the_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_resume_together(recipe, tmp_path):
    train_two = {"processes": 2, "seconds": 120}
    assert {ended.code for ended in run(recipe, [f"output={tmp_path / 'unbroken'}", *HALF], **train_two)} == {0}
    resumed = [f"output={tmp_path / 'killed'}", *HALF]
    assert -9 in {ended.code for ended in run(recipe, resumed, prepare=kill_after_three_steps, **train_two)}
    assert {ended.code for ended in run(recipe, resumed, **train_two)} == {0}
    assert logged(tmp_path / "killed") == logged(tmp_path / "unbroken")
    expected = saved(tmp_path / "unbroken" / "model")
    assert all(torch.equal(value, expected[name]) for name, value in saved(tmp_path / "killed" / "model").items())


@pytest.mark.slow
def test_shares_of_a_model_learn_the_same_are_resumed_and_are_saved_whole(recipe, alone, tmp_path):
    output = tmp_path / "run"
    said = [f"output={output}", *NO_DROPOUT, *in_stages("logging_steps=1", "use_cpu=false"), *HALF]
    kill, shard = ({"prepare": p, "processes": 2} for p in (kill_shards_after_three_steps, shard_on_processors))
    assert -9 in {ended.code for ended in run(recipe, said, environment=SHARDED, **kill)}
    assert (output / "all.checkpoints" / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir(), "FSDP was on"
    assert [ended.error for ended in run(recipe, said, environment=SHARDED, **shard)] == ["", ""]
    assert_learns_the_same(output, alone)
    for folder in ("all", "model"):  # a whole model, and an adapter
        mv.load(output / folder)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_learns_the_same_is_resumed_and_saves_a_whole_model(recipe, alone, tmp_path, stage):
    pytest.importorskip("deepspeed")
    output = tmp_path / "run"
    said = [f"output={output}", "task=scenes:questions=2:side=70", *NO_DROPOUT, *in_stages("logging_steps=1"), *HALF]
    launched = {"processes": 2, "environment": launched_with(f"deepspeed_zero{stage}.yaml")}
    assert -9 in {ended.code for ended in run(recipe, said, prepare=kill_apart_after_three_steps, **launched)}
    kept = output / "all.checkpoints" / "checkpoint-2" / "global_step2"
    assert (kept / "zero_pp_rank_1_mp_rank_00_model_states.pt").is_file() == (stage == 3), "weights were shared out"
    assert (kept / "zero_pp_rank_1_mp_rank_00_optim_states.pt").is_file(), "the optimiser was"
    ended = run(recipe, said, prepare=take_all_weights_apart, **launched)
    assert [process.error for process in ended] == ["", ""]
    assert_learns_the_same(output, alone)
    for folder in ("all", "model"):  # a whole model, and an adapter
        mv.load(output / folder)
    found, expected = (json.loads((folder / "model" / "scores.json").read_text()) for folder in (output, alone))
    assert found["scores"] == expected["scores"]
    for key in ("trained", "parameters"):
        assert [stage[key] for stage in found["stages"]] == [stage[key] for stage in expected["stages"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (break_the_loss, "the loss of step 3 is nan; its rows are train-"),
        (break_the_gradient, "the loss of step 3 is finite, but the norm of its gradient is "),
    ],
)
def test_deepspeed_stops_before_what_is_no_number_is_saved(recipe, tmp_path, prepare, said):
    pytest.importorskip("deepspeed")
    told = [f"output={tmp_path / 'run'}", *HALF, *in_stages("save_steps=1")]
    ended = run(recipe, told, processes=2, prepare=prepare, environment=launched_with("deepspeed_zero2.yaml"))
    assert [process.code for process in ended] == [1, 1], "neither hangs"
    assert all(process.error.startswith(f"FloatingPointError: {said}") for process in ended)
    assert [path.name for path in (tmp_path / "run" / "all.checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
