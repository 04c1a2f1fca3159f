"""What cannot go well stops a run, before it begins where that can be known, and says what to do."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

import mllm_vision.recipes.disk as disk_module
import mllm_vision.recipes.train as train_module
from mllm_vision.recipes.disk import bytes_ahead, bytes_in, bytes_to_save
from mllm_vision.recipes.recipe import load_recipe
from mllm_vision.recipes.train import train
from mllm_vision.recipes.trainer import RecipeTrainer
from tests.recipes.runs import in_stages, logged, saved, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def nothing_loads(monkeypatch):
    def loaded(*args):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(train_module, "beginning", loaded)


class Stopped(BaseException):
    """Ends a run where a test has seen enough."""


def stop(*args, **kwargs):
    raise Stopped


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_an_output_that_cannot_be_written_is_found_before_anything_loads(recipe, tmp_path, nothing_loads, where):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot be written to: .*; choose another output"):
        train(recipe, [f"output={tmp_path / where}"])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_found_before_the_model_that_a_run_begins_with_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"has 0.0 GB free, but the model that the run begins with takes up to 0.0 GB"):
        train(recipe, [f"output={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "base").exists()


@pytest.mark.parametrize(
    ("late", "settings"),
    [("trainer_for", []), ("beginning", ["stages.all.arguments.max_steps=-1"])],
    ids=["before rows are read", "when they are known"],
)
def test_a_stage_wants_room_for_what_is_not_there_yet(recipe, tmp_path, monkeypatch, late, settings):
    """Checkpoints at the end of a stage are those that stay; while one is written, there is one more."""
    saved_at_most, output = [], tmp_path / "run"
    wide = ["model.text.hidden_size=128", "model.text.intermediate_size=512", *settings]
    said = [f"output={output}", *wide, *in_stages("save_total_limit=2", "save_steps=1")]

    def noted(model, arguments, steps):
        saved_at_most.append(bytes_to_save(model, arguments, steps))
        return saved_at_most[-1]

    monkeypatch.setattr(train_module, "bytes_to_save", noted)
    monkeypatch.setattr(train_module, "_save", stop)
    with pytest.raises(Stopped):
        train(recipe, said)
    written = bytes_in(output / "all.checkpoints")
    most = max(saved_at_most)
    assert written == pytest.approx(most * 2 / 3, rel=0.1)
    if late == "trainer_for":
        monkeypatch.setattr(train_module, "trainer_for", stop)
    monkeypatch.setattr(disk_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=most - written - 1))
    with pytest.raises(OSError, match=r"GB free, but checkpoints and models take .* or keep fewer checkpoints"):
        train(recipe, said)
    monkeypatch.setattr(disk_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=most - written))
    with pytest.raises(Stopped):
        train(recipe, said)


def test_room_for_the_last_stage_is_wanted_before_the_first_begins(recipe, tmp_path, monkeypatch):
    plan = json.loads(recipe.read_text())
    stages = [{**plan["stages"][0], "name": name} for name in ("one", "two", "three")]
    many = tmp_path / "many.yaml"
    many.write_text(json.dumps({**plan, "stages": stages}))
    wanted = []

    def noted(folder, needed, what):
        wanted.append((folder.name, needed))
        if "checkpoints" in folder.name:
            raise Stopped

    monkeypatch.setattr(train_module, "require_room", noted)
    with pytest.raises(Stopped):
        train(many, [f"output={tmp_path / 'all'}"])
    (_, base), (folder, needed) = wanted
    assert folder == "one.checkpoints" and base == pytest.approx(bytes_in(tmp_path / "all" / "base"), rel=0.1)
    # Results of two stages, and a checkpoint of the third, with two moments of what learns, while the next is written.
    assert needed == pytest.approx(base * (1 + 1 + 2 * 3), rel=0.06)


def test_room_ahead_is_what_each_stage_wants_when_it_comes(recipe, tmp_path):
    plan = load_recipe(recipe, [f"output={tmp_path}", *in_stages("bf16=true")])
    arguments = [train_module.training_arguments(plan, stage) for stage in plan.stages]
    source = train_module.beginning(plan, tmp_path)
    found = []
    for stage, told in zip(plan.stages, arguments, strict=True):
        model, trained, _ = train_module.prepared(plan, stage, source, told)
        found.append(bytes_to_save(trained, told, 4))
    model, _, _ = train_module.prepared(plan, plan.stages[0], source, arguments[0])
    pairs = list(zip(plan.stages, arguments, strict=True))
    assert bytes_ahead(model, pairs[:1]) == found[0]
    lora = bytes_ahead(model, pairs[1:])
    assert 0 < lora < found[1], "of LoRA, its low-rank weights are not counted"
    assert bytes_ahead(model, pairs) == max(found[0], disk_module.bytes_of(model) + lora)
    assert bytes_ahead(model, [pairs[0]] * 2) == disk_module.bytes_of(model) + found[0]


@pytest.mark.parametrize(
    ("limit", "every", "strategy", "checkpoints"),
    [
        (1, 10, "steps", 2),
        (None, 10, "steps", 11),
        (3, 10, "steps", 4),
        (5, 60, "steps", 3),
        (None, 0.5, "steps", 3),
        (None, 0, "steps", 2),
    ],
)
def test_room_is_for_the_checkpoints_that_stay_and_the_next(tmp_path, limit, every, strategy, checkpoints):
    model = torch.nn.Linear(9, 1)  # 10 weights: 40 bytes, and 80 of moments
    arguments = train_module.TrainingArguments(
        str(tmp_path), save_total_limit=limit, save_steps=every, save_strategy=strategy, use_cpu=True
    )
    assert bytes_to_save(model, arguments, 100) == checkpoints * 120
    arguments.deepspeed_plugin = object()  # whose own checkpoint has the weights as well, and twice in single precision
    assert bytes_to_save(model, arguments, 100) == checkpoints * (120 + 40 + 40)


def test_a_loss_that_is_no_number_names_its_rows_and_the_mended_run_goes_on(recipe, tmp_path, monkeypatch):
    short = ["stages.lora.arguments.max_steps=1", *in_stages("save_steps=1")]
    train(recipe, [f"output={tmp_path / 'sound'}", *short])
    original = Trainer.compute_loss

    def broken(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        return loss / 0 if self.state.global_step == 2 else loss

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RecipeTrainer, "compute_loss", broken)
        with pytest.raises(FloatingPointError, match=r"loss of step 3 is inf; its rows are train-\d+(, train-\d+){3}$"):
            train(recipe, [f"output={output}", *short])
    train(recipe, [f"output={output}", *short])
    assert logged(output) == logged(tmp_path / "sound")
    expected = saved(tmp_path / "sound" / "model")
    assert all(torch.equal(value, expected[name]) for name, value in saved(output / "model").items())


def test_a_gradient_that_is_no_number_stops_before_a_weight_takes_it_in(recipe, tmp_path, monkeypatch):
    original = Trainer.compute_loss

    def steep(self, model, *args, **kwargs):
        first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        return original(self, model, *args, **kwargs) + (first.sum() * 0).sqrt()  # 0, rising without end

    monkeypatch.setattr(RecipeTrainer, "compute_loss", steep)
    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    with pytest.raises(FloatingPointError, match=r"step 1 is finite, but the norm of its gradient is .*; lower"):
        train(recipe, [f"output={tmp_path / 'run'}"])


def test_a_reporter_that_is_not_installed_is_found_before_anything_loads(recipe, tmp_path, nothing_loads, monkeypatch):
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(RuntimeError, match="pip install wandb"):
        train(recipe, [f"output={tmp_path / 'run'}", "stages.lora.arguments.report_to=wandb"])
    assert not (tmp_path / "run").exists()


def test_every_stage_reports_under_its_name_and_tensorboard_files_stay(recipe, tmp_path, monkeypatch):
    runs, folders = [], []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            runs.append((args.run_name, state.global_step, "loss" in logs))

    class SummaryWriter:
        def __init__(self, log_dir):
            folders.append(log_dir)

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    class WandbCallback(integration_utils.WandbCallback):
        def __init__(self):
            pass

        def __getattribute__(self, name):
            return (lambda *args, **kwargs: None) if name.startswith("on_") else super().__getattribute__(name)

    kinds = {"trackio": Reporter, "wandb": WandbCallback}
    monkeypatch.setattr(
        integration_utils, "INTEGRATION_TO_CALLBACK", {**integration_utils.INTEGRATION_TO_CALLBACK, **kinds}
    )
    monkeypatch.setattr(train_module, "WandbCallback", WandbCallback)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: runs.append("finished")))
    for package in ("torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(SummaryWriter=SummaryWriter))
    output = tmp_path / "night"
    train(recipe, [f"output={output}", *in_stages("report_to=[tensorboard, wandb, trackio]", "max_steps=1")])
    stage = [("night-{}", 1, True), ("night-{}", 1, False)]
    told = [[(name.format(s), *rest) for name, *rest in stage] + ["finished"] for s in ("all", "lora")]
    assert runs == told[0] + told[1]
    assert folders == [str(output / "tensorboard" / stage) for stage in ("all", "lora")]


def test_rows_of_text_alone_do_not_stop_a_projector_from_learning(recipe, tmp_path):
    plan = json.loads(recipe.read_text())
    alone = tmp_path / "projector.yaml"
    alone.write_text(json.dumps({**plan, "stages": [{**plan["stages"][0], "trains": ["projector"]}]}))
    output = tmp_path / "run"
    train(alone, [f"output={output}", "stages.all.arguments.max_steps=5", "stages.all.arguments.logging_steps=1"])
    norms = [row["grad_norm"] for row in logged(output)["all.log.jsonl"]]
    assert 0.0 in norms, "a batch of text alone has nothing to teach a projector"
    assert max(norms) > 0
