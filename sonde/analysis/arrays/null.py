"""The null of a comparison: what scores are worth nothing, because examples were exchanged.

A score of two layers is inflated by their width, and a largest score by how many were looked at
(Gröger et al., 2026, arXiv 2602.14486). The null permutes the examples of one side: then the pairs
of examples of both sides have nothing to do with each other, and everything else is as it was. The
same permutation is applied to all layers of that side, so that what layers have in common stays.

Centring commutes with a permutation, so Gram matrices are centred once. They are symmetric, so each
is kept as its triangle, pairs of examples first: [pairs, layers]. A permutation of the examples is
one of these rows; each triangle is permuted once, and all pairs of layers are one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sonde.exceptions import InvalidInputError

from .kernels import Array

Orders = npt.NDArray[np.intp]

# Rows that are permuted at once, so that they are multiplied while they are in the cache.
_ROWS = 8192

# Scores closer than this are equal: a permutation that changes nothing must not count as smaller.
_ROUNDING = 1e-10


def permutations(sizes: Sequence[int], num_permutations: int, seed: int = 0) -> Orders:
    """Draw permutations of the examples, inside each block where there are several.

    Args:
        sizes: The number of examples of each block.
        num_permutations: How many, at least 1.
        seed: Seed of the drawing.

    Returns:
        One a row, [permutations, examples].

    Raises:
        InvalidInputError: If `num_permutations` is not at least 1.

    Example:
        >>> permutations([2, 1], 3).shape
        (3, 3)
    """
    if num_permutations < 1:
        raise InvalidInputError(f"`null` (={num_permutations}) must be at least 1 permutation")
    generator = np.random.default_rng(seed)
    starts = np.cumsum([0, *sizes[:-1]])
    drawn = [
        np.concatenate(
            [start + generator.permutation(size) for start, size in zip(starts, sizes, strict=True)]
        )
        for _ in range(num_permutations)
    ]
    return np.stack(drawn)


def triangles(stack: Array, sizes: Sequence[int]) -> Array:
    """Keep centred Gram matrices as their triangles, scaled to length 1.

    Args:
        stack: One flattened centred Gram matrix a row, or its blocks one behind the other,
            [layers, sum of examples²]; see `kernels.center` and `kernels.center_blocks`.
        sizes: The number of examples of each block.

    Returns:
        The pairs (i, j), i ≤ j, row by row and block by block, [pairs, layers]; inner products of
        two columns are CKA. Columns of layers without variance, or with NaN, are NaN.

    Example:
        >>> triangles(np.array([[0.0, 2.0, 2.0, 0.0]]), [2]).round(3)
        array([[0.],
               [1.],
               [0.]])
    """
    parts = []
    for block, size in zip(np.split(stack, _ends(sizes), axis=1), sizes, strict=True):
        rows, columns = np.triu_indices(size)
        part = np.ascontiguousarray(block[:, rows * size + columns].T)
        part[rows != columns] *= np.sqrt(2)  # Each of these pairs is in the matrix twice.
        parts.append(part)
    values: Array = np.concatenate(parts)
    norms = np.sqrt(np.einsum("ij,ij->j", values, values))
    norms[norms == 0] = np.nan
    values /= norms
    return values


def null_maps(values: Array, others: Array, sizes: Sequence[int], orders: Orders) -> Array:
    """Compare all layers of two sides, the examples of one side permuted.

    Cost: of each permutation one pass over the smaller side and one matrix product, of half the
    examples² each. Memory: beside both sides some 8 * 8192 * layers bytes.

    Args:
        values: Triangles of one side, [pairs, layers].
        others: Triangles of the other side, [pairs, other_layers].
        sizes: The number of examples of each block.
        orders: Permutations, [permutations, examples].

    Returns:
        CKA [permutations, layers, other_layers]; NaN for layers that are.
    """
    if others.shape[1] > values.shape[1]:  # Permuting either side is the same null.
        return null_maps(others, values, sizes, orders).transpose(0, 2, 1)
    maps = np.zeros((len(orders), values.shape[1], others.shape[1]))
    buffer = np.empty((_ROWS, others.shape[1]))
    pairs = _pairs(sizes)
    for at, order in enumerate(orders):
        rows = _permuted_rows(pairs, order)
        for start in range(0, len(rows), _ROWS):
            chunk = rows[start : start + _ROWS]
            permuted = np.take(others, chunk, axis=0, out=buffer[: len(chunk)], mode="clip")
            maps[at] += values[start : start + _ROWS].T @ permuted
    return maps


def p_values(scores: Array, null: Array) -> Array:
    """Return how often chance does as well: (1 + #{null ≥ score}) / (permutations + 1).

    Args:
        scores: Scores, […].
        null: The same under permutations, [permutations, …].

    Returns:
        In (0, 1], […]; NaN where there is no score.

    Example:
        >>> p_values(np.array([0.5, 0.0]), np.array([[0.1, 0.1], [0.2, -0.1], [0.3, 0.1]]))
        array([0.25, 0.75])
    """
    with np.errstate(invalid="ignore"):
        at_least = (null >= scores - _ROUNDING).sum(axis=0)
    p: Array = np.where(np.isnan(scores), np.nan, (1 + at_least) / (len(null) + 1))
    return p


def null_quantile(null: Array, level: float = 0.05) -> Array:
    """Return what chance exceeds with probability `level`, the larger of two neighbours.

    Args:
        null: Scores under permutations, [permutations, …].
        level: The probability, in (0, 1).

    Returns:
        The quantile, […]; NaN where there are no scores.

    Raises:
        InvalidInputError: If `level` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise InvalidInputError(f"`level` (={level}) must be between 0 and 1")
    quantile: Array = np.quantile(null, 1 - level, axis=0, method="higher")
    return quantile


def calibrated(scores: Array, quantile: Array) -> Array:
    """Rescale scores so that 0 is the null's quantile, and 1 stays 1.

    (score - quantile) / (1 - quantile), equation of Gröger et al. (2026); above 0 means beyond what
    chance gives. It is not cut off at 0.

    Args:
        scores: Scores of at most 1, […].
        quantile: The null's quantile, that broadcasts against them.

    Returns:
        Calibrated scores, […].

    Example:
        >>> calibrated(np.array([0.6, 1.0, 0.1]), np.array(0.2))
        array([ 0.5  ,  1.   , -0.125])
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Array = (scores - quantile) / (1 - quantile)
    return result


def maxima(null: Array, counted: npt.NDArray[np.bool_]) -> Array:
    """Return the largest score of each permuted map.

    Args:
        null: Maps under permutations, [permutations, layers, other_layers].
        counted: Which pairs count, [layers, other_layers]; of a map of layers with themselves each
            pair once, and no layer with itself.

    Returns:
        [permutations]; NaN where no pair that counts has a score.
    """
    counted = counted & np.isfinite(null).all(axis=0)
    if not counted.any():
        return np.full(len(null), np.nan)
    largest: Array = null[:, counted].max(axis=1)
    return largest


def halves(sizes: Sequence[int], num_halves: int, seed: int = 0, smallest: int = 4) -> list[Orders]:
    """Draw halves of the examples without replacement, inside each block where there are several.

    The spread of a score over halves is that of the score itself over samples of all examples: a
    half has twice the variance, and being drawn from the whole takes half of it away (the delete-
    half jackknife; Shao and Wu, 1989). Unlike in a bootstrap no example is there twice, which would
    count as two that are alike.

    Args:
        sizes: The number of examples of each block.
        num_halves: How many.
        seed: Seed of the drawing.
        smallest: The least number of examples that can be centred; smaller blocks are left out.

    Returns:
        Positions inside the flattened blocks that each half keeps, block by block, as rows of
        positions, [examples of the half] each.

    Raises:
        InvalidInputError: If no block has twice `smallest` examples, or none is asked for.
    """
    if num_halves < 1:
        raise InvalidInputError(f"`intervals` (={num_halves}) must be at least 1 half")
    if max(sizes) < 2 * smallest:
        raise InvalidInputError(
            f"`intervals` takes halves of the examples, at least {smallest} each; there are "
            f"{max(sizes)}"
        )
    generator = np.random.default_rng(seed)
    starts = np.cumsum([0, *sizes[:-1]])
    drawn = []
    for _ in range(num_halves):
        parts = [
            start + np.sort(generator.permutation(size)[: size // 2])
            for start, size in zip(starts, sizes, strict=True)
            if size >= 2 * smallest
        ]
        drawn.append(np.concatenate(parts))
    return drawn


def half_maps(
    stack: Array,
    others: Array | None,
    sizes: Sequence[int],
    drawn: Sequence[Orders],
    *,
    unbiased: bool = True,
) -> Array:
    """Compute CKA of all layers on halves of the examples.

    A centred Gram matrix differs from the one it was made of by what centring takes away, so halves
    are cut out of centred ones and centred again.

    Args:
        stack: Centred Gram matrices, or their blocks, [layers, sum of examples²].
        others: The same for the other layers; `stack` itself if None.
        sizes: The number of examples of each block.
        drawn: Halves; see `halves`.
        unbiased: U-centring for HSIC₁ instead of HKH for HSIC₀.

    Returns:
        CKA [halves, layers, other_layers].
    """
    maps = []
    for kept in drawn:
        half = _cut(stack, sizes, kept, unbiased)
        other_half = half if others is None else _cut(others, sizes, kept, unbiased)
        maps.append(half @ other_half.T)
    return np.stack(maps)


def _cut(stack: Array, sizes: Sequence[int], kept: Orders, unbiased: bool) -> Array:
    """Cut centred matrices, center them again and scale them to length 1, [layers, …]."""
    parts = []
    start = 0
    for block, size in zip(np.split(stack, _ends(sizes), axis=1), sizes, strict=True):
        chosen = kept[(kept >= start) & (kept < start + size)] - start
        start += size
        if len(chosen):
            grams = block.reshape(-1, size, size)[:, chosen[:, None], chosen[None, :]]
            parts.append(_centered(grams, unbiased).reshape(len(stack), -1))
    half: Array = np.concatenate(parts, axis=1)
    norms = np.linalg.norm(half, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        half /= norms
    return half


def _centered(grams: Array, unbiased: bool) -> Array:
    """Center matrices [layers, examples, examples], whose diagonal is 0 where U-centred."""
    n = grams.shape[1]
    if unbiased:
        means = grams.sum(axis=2) / (n - 2)
        means -= means.sum(axis=1, keepdims=True) / (2 * (n - 1))
    else:
        means = grams.mean(axis=2)
        means -= means.mean(axis=1, keepdims=True) / 2
    grams -= means[:, :, None]
    grams -= means[:, None, :]
    if unbiased:
        grams[:, np.arange(n), np.arange(n)] = 0
    return grams


def _ends(sizes: Sequence[int]) -> Orders:
    """Return where flattened blocks end, without the last."""
    return np.cumsum(np.square(sizes))[:-1]


_Pairs = tuple[Orders, Orders, Orders]


def _pairs(sizes: Sequence[int]) -> _Pairs:
    """Return the examples i ≤ j of each row of triangles, and where the rows of an example begin.

    The row of (i, j) is `begins[i] + j`.
    """
    first, second, begins = [], [], []
    start, num_rows = 0, 0
    for size in sizes:
        rows, columns = np.triu_indices(size)
        first.append(start + rows)
        second.append(start + columns)
        at = np.arange(size)
        begins.append(num_rows + at * size - at * (at + 1) // 2 - start)
        start += size
        num_rows += len(rows)
    return np.concatenate(first), np.concatenate(second), np.concatenate(begins)


def _permuted_rows(pairs: _Pairs, order: Orders) -> Orders:
    """Return the row of (order[i], order[j]) for each row (i, j) of triangles."""
    first, second, begins = pairs
    one, other = order[first], order[second]
    rows = begins[np.minimum(one, other)]
    rows += np.maximum(one, other)
    return rows
