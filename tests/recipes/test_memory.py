"""What saves memory changes what is learnt no more than it says: gradient checkpointing, 4 bit, 8-bit optimisers."""

import json

import pytest
import torch

from mllm_vision.recipes.train import train
from tests.recipes.runs import in_stages, logged, saved, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "plain"
    train(recipe, [f"output={output}"])
    return output


def assert_same_losses(output, expected, **tolerance):
    for stage, rows in logged(expected).items():
        got = [row["loss"] for row in logged(output)[stage]]
        torch.testing.assert_close(got, [row["loss"] for row in rows], **tolerance)


def test_activations_that_are_computed_again_give_the_same_gradients(recipe, plain, tmp_path):
    """In full training; and in LoRA, where nothing that enters the first layer of a frozen model has a gradient."""
    output = tmp_path / "run"
    train(recipe, [f"output={output}", *in_stages("gradient_checkpointing=true")])
    assert logged(output) == logged(plain)
    expected = saved(plain / "model")
    assert all(torch.equal(value, expected[name]) for name, value in saved(output / "model").items())


@pytest.mark.slow
def test_activations_that_are_computed_again_do_so_under_a_method(recipe, tmp_path):
    said = ["methods=[{type: hiprune, keep: 9, object_layer: 1}]"]
    train(recipe, [f"output={tmp_path / 'plain'}", *said])
    train(recipe, [f"output={tmp_path / 'run'}", *said, *in_stages("gradient_checkpointing=true")])
    assert logged(tmp_path / "run") == logged(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["bf16=true"], ["optim=paged_adamw_8bit"]])
def test_coarser_numbers_learn_nearly_the_same(recipe, plain, tmp_path, settings):
    train(recipe, [f"output={tmp_path / 'run'}", *in_stages(*settings)])
    assert logged(tmp_path / "run") != logged(plain)
    assert_same_losses(tmp_path / "run", plain, atol=0.1, rtol=0.02)


@pytest.mark.slow
def test_a_quantised_model_learns_with_activations_computed_again(recipe, plain, tmp_path):
    plan = json.loads(recipe.read_text())
    quantised = {**plan, "model": str(plain / "base"), "stages": plan["stages"][1:]}
    recipes = {}
    for kind in (None, "nf4", "int8"):
        recipes[kind] = tmp_path / f"{kind}.yaml"
        recipes[kind].write_text(json.dumps({**quantised, "quantize": kind}))
        train(recipes[kind], [f"output={tmp_path / str(kind)}"])
        if kind is not None:
            assert logged(tmp_path / kind) != logged(tmp_path / "None")
            assert_same_losses(tmp_path / kind, tmp_path / "None", atol=0.1, rtol=0.02)
    again = [f"output={tmp_path / 'again'}", "stages.lora.arguments.gradient_checkpointing=true"]
    train(recipes["nf4"], again)
    assert logged(tmp_path / "again") == logged(tmp_path / "nf4")
