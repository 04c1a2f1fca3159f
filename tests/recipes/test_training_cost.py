"""What a step of training costs, by arm."""

from mllm_vision.recipes.training_cost import training_cost

SHORT = ["stages.answers.arguments.max_steps=2", "stages.answers.arguments.per_device_train_batch_size=2"]


def test_arms_are_compared_with_the_first_in_time_and_memory():
    arms = {"lora": SHORT, "two thirds less": [*SHORT, "methods=[{type: random, keep: 0.3334}]"]}
    found = training_cost("tiny_lora", arms, repeats=2, threads=1)
    assert list(found) == list(arms)
    first, second = found.values()
    assert first["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert second["ratio"]["min"] <= second["ratio"]["median"] <= second["ratio"]["max"]
    assert min(first["seconds"], second["seconds"]) > 0
    assert 0 < second["megabytes"] < first["megabytes"], "a third of the tokens takes less memory"
