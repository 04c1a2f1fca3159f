"""The division of all scores."""

import numpy as np

from mllm_vision.eval.metrics.ratio import ratio


def test_a_float_of_numbers_and_zero_over_zero():
    assert ratio(1, 4) == 0.25 and type(ratio(1, 4)) is float
    assert (ratio(3, 0), ratio(0, 0)) == (0.0, 0.0)


def test_elementwise_on_arrays_and_without_a_warning():
    with np.errstate(all="raise"):
        assert ratio(np.array([1, 2, 3]), np.array([2, 0, 4])).tolist() == [0.5, 0, 0.75]
        assert ratio(np.array([[1.0], [2.0]]), np.array([2.0, 0.0])).tolist() == [[0.5, 0], [1, 0]]
        assert ratio(6, np.array([2, 0])).tolist() == [3, 0]
