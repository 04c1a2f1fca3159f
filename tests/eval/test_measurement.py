"""The steps of an answer: what lies between which readings of the clock, and that nothing is left on the model."""

import pytest
import torch

import mllm_vision as mv
from mllm_vision.eval.measurement import Clock, Steps, available_memory, in_turn, measure_steps
from tests.eval.toy_shapes import toy_shape


class Turns(Clock):
    """Tells how often it was asked."""

    def __init__(self):
        self.readings = 0

    def read(self):
        self.readings += 1
        return self.readings


@pytest.fixture
def loaded():
    model, inputs_for = toy_shape("llava-1.5-7b").load(torch.device("cpu"), torch.float32, seed=0)
    with mv.using(model), torch.inference_mode():
        yield model, inputs_for(1)


def test_steps_lie_between_the_readings_they_are_named_after(loaded):
    # Readings: 1, 2 around encoding; 3 as the answer starts; then one as each pass starts and one as its token comes.
    clock = Turns()
    assert measure_steps(*loaded, 3, clock) == Steps(encode=1, prefill=5 - 4, first_token=5 - 3, decode=(9 - 5) / 2)
    assert clock.readings == 9


def test_nothing_is_left_on_the_model(loaded):
    model, inputs = loaded
    decoder = model.get_decoder()
    measure_steps(model, inputs, 2, Clock())
    assert not decoder._forward_pre_hooks
    with pytest.raises(ValueError, match="image tokens do not match"):
        measure_steps(model, {**inputs, "input_ids": inputs["input_ids"][:, 10:]}, 2, Clock())
    assert not decoder._forward_pre_hooks


def test_runs_take_turns_and_only_the_first_turns_warm_up():
    calls: list[str] = []

    def run(name):
        calls.append(name)
        return name + str(len(calls))

    turns = in_turn([lambda: run("a"), lambda: run("b"), lambda: run("c")], 2, warmups=1)
    assert "".join(calls) == "abcabcabc"
    assert turns == [("a4", "b5", "c6"), ("a7", "b8", "c9")]


def test_available_memory_is_in_bytes():
    available = available_memory(torch.device("cpu"))
    assert available is None or 1e8 < available < 1e14
