"""A section beyond its border."""

import numpy as np


def reflect(start: int, stop: int, length: int) -> np.ndarray:
    """Indices start..stop of an axis of `length` pixels, mirrored about its border pixels as often as needed.

    >>> reflect(-3, 6, 4)
    array([3, 2, 1, 0, 1, 2, 3, 2, 1])
    >>> reflect(-2, 3, 1)
    array([0, 0, 0, 0, 0])
    """
    if length == 1:
        return np.zeros(stop - start, dtype=np.intp)
    period = 2 * (length - 1)
    phase = np.arange(start, stop) % period
    return np.minimum(phase, period - phase)
