"""Recipes are read strictly: what is misspelt is named, with what would have been right."""

import pytest
import yaml

from mllm_vision.recipes.recipe import RECIPES, load_recipe, recipe_names
from mllm_vision.recipes.uhd_tower import UHDTowerSpec


def test_every_recipe_of_the_library_loads_and_explains_itself():
    assert "tiny_llava_scenes" in recipe_names()
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.stages
        manual = (RECIPES / f"{name}.yaml").read_text().split("\noutput:")[0]
        assert f"mllm-vision train {name}" in manual
        assert "Hardware" in manual


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
        ("sed=3", "unknown key sed; valid keys are output, seed, model, stages, side, text_scale"),
        (
            "stages.towr.arguments.max_steps=7",
            "no stage 'towr'; there are tower, captions, mixed, questions, relations",
        ),
        ("stages.tower.max_step=7", "unknown key max_step; valid keys are name, objective, trains"),
        ("stages.tower.arguments.max_step=7", "unknown key max_step; valid keys are .*max_steps"),
        ("stages.tower.arguments.output_dir=x", "unknown key output_dir"),
        ("model.visoin.hidden_size=7", "unknown key 'visoin'; there are vision, text"),
        ("stages=3", "stages must be a list"),
        ("stages.tower.objective=words", "objective must be one of patch_words, answers, got 'words'"),
        ("stages.tower.arguments.max_steps=0", "stages.tower.arguments needs max_steps of at least 1"),
        ("seed", "must look like key=value"),
        (
            "model={base: a, patch: 14}",
            "model: unknown key patch; valid keys are base, patch_size, merger_layers, merger",
        ),
        ("model={base: a, patch_size: 14}", "model lacks merger_layers"),
        ("model=3", "model must be a mapping of keys to values, got int"),
        ("methods=[{type: spatial_token}]", "unknown method 'spatial_token'"),
    ],
)
def test_a_wrong_override_is_an_error_that_lists_the_right_ones(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("tiny_llava_scenes", [override])


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(FileNotFoundError, match=r"no recipe 'tiny'; there are .*tiny_llava_scenes"):
        load_recipe("tiny")


def test_a_recipe_that_lacks_a_key_says_which(tmp_path):
    raw = yaml.safe_load((RECIPES / "tiny_llava_scenes.yaml").read_text())
    del raw["stages"][0]["trains"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match="stages lacks trains"):
        load_recipe(tmp_path / "mine.yaml")
