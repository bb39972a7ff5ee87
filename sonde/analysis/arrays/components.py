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


def principal(gram: Real, num_components: int) -> tuple[Array, Array]:
    """Find the leading principal components of a layer over the examples.

    Args:
        gram: Gram matrix [examples, examples]; it is centred here.
        num_components: How many, at most the number of examples.

    Returns:
        All eigenvalues of HKH, largest first, [examples], and the leading eigenvectors, [examples,
        components], each with its largest entry positive.

    Example:
        >>> values, vectors = principal(np.diag([3.0, 1.0]), 1)
        >>> values.round(3), vectors.round(3).T
        (array([2., 0.]), array([[ 0.707, -0.707]]))
    """
    values, vectors = np.linalg.eigh(center(gram, unbiased=False))
    values = np.maximum(values[::-1], 0)  # Below 0 is rounding.
    leading = vectors[:, ::-1][:, :num_components]
    largest = np.abs(leading).argmax(axis=0)
    # Of two entries of one size rounding would choose; the first is taken.
    ties = np.abs(leading) >= np.abs(leading[largest, np.arange(leading.shape[1])]) * (1 - 1e-9)
    first = ties.argmax(axis=0)
    leading = leading * np.sign(leading[first, np.arange(leading.shape[1])])
    return values, leading


def participation_ratio(values: Array) -> float:
    """Return how many components share the variance: (Σλ)² / Σλ².

    Args:
        values: Eigenvalues, [components].

    Returns:
        From 1, all variance in one, to the number of components, all alike; NaN without variance.

    Example:
        >>> participation_ratio(np.array([1.0, 1.0, 0.0]))
        2.0
    """
    squares = float((values**2).sum())
    return float(values.sum()) ** 2 / squares if squares else float("nan")
