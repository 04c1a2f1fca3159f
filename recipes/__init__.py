"""Training: recipes (one YAML per run worth repeating) and the entry point that runs them."""

from mllm_vision.recipes.recipe import Recipe, load_recipe, recipe_names

__all__ = ["Recipe", "load_recipe", "recipe_names"]
