"""The one division of all scores: of sums, or of arrays of resampled sums."""

from __future__ import annotations

from typing import Any

import numpy as np


def ratio(numerator: Any, denominator: Any) -> Any:
    """Elementwise quotient, 0 where the denominator is 0; a float of two numbers, else an array."""
    a, b = np.asarray(numerator, float), np.asarray(denominator, float)
    quotient = np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b != 0)
    return quotient if quotient.ndim else float(quotient)
