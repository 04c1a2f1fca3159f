"""Fixtures of the evaluation's tests."""

import pytest

import mllm_vision as mv


@pytest.fixture(scope="module")
def loaded():
    """The trained tiny model and its processor."""
    return mv.load("tiny-llava-scenes")
