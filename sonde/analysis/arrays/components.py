"""Principal components of a layer over the examples, from its Gram matrix alone."""

from __future__ import annotations

import numpy as np

from .kernels import Array, Real, center, precision_of


def without_components(gram: Real, num_components: int) -> Array:
    """Remove the leading principal components from a Gram matrix.

    Args:
        gram: Symmetric matrix [examples, examples].
        num_components: How many components of the centred matrix HKH.

    Returns:
        HKH less its leading eigenvectors, [examples, examples]; exact zeros where only rounding is
        left.

    Example:
        >>> without_components(np.diag([3.0, 1.0]), 1)
        array([[0., 0.],
               [0., 0.]])
    """
    centered = center(gram, unbiased=False)
    values, vectors = np.linalg.eigh(centered)
    removed = vectors[:, len(values) - num_components :]
    left: Array = centered - (removed * values[len(values) - num_components :]) @ removed.T
    if np.linalg.norm(left) <= 10 * len(gram) * precision_of(gram) * np.linalg.norm(centered):
        left[:] = 0
    return (left + left.T) / 2
