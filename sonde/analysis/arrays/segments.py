"""Blocks of a map: contiguous layers that are more alike than layers at their distance are.

Neighbouring layers of any network are alike, the more the nearer they are. So what counts is not
the similarity of two layers but its excess over the mean of all pairs at the same distance. A block
[a, b) with the excess E summed over its m pairs lowers the sum of squares by E²/m if it gets a
level of its own; blocks that do not overlap and lower it most are found by dynamic programming,
exactly, for every number of them (Bellman, 1961; the same recursion as optimal one-dimensional
clustering). No threshold on similarity is involved.

Only pairs (i, j) with i < j are read: a map under permutations is not symmetric.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sonde.exceptions import InvalidInputError

from .kernels import Array

Positions = npt.NDArray[np.intp]

# A gain below this share of all squares is rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Segmentation:
    """The best blocks of a given number.

    Attributes:
        gain: By how much they lower the sum of squares.
        blocks: Their first layer and the one after their last, in order.
    """

    gain: float
    blocks: list[tuple[int, int]]


def gains(similarity: Array, min_size: int = 3) -> Array:
    """Compute what each possible block would lower the sum of squares by.

    Args:
        similarity: Maps of layers with themselves, [layers, layers] or [maps, layers, layers].
        min_size: The least number of layers of a block, at least 2.

    Returns:
        Gain of the block [a, b), [layers + 1, layers + 1], one for each map; 0 where the block is
        too small, or less alike than its distances are.

    Raises:
        InvalidInputError: If `min_size` is below 2, or maps are not square or not finite.

    Example:
        >>> similarity = np.array([[1, 0.9, 0.1], [0.9, 1, 0.1], [0.1, 0.1, 1]])
        >>> gains(similarity, min_size=2).round(2)[0]
        array([0.  , 0.  , 0.16, 0.  ])
    """
    if min_size < 2:
        raise InvalidInputError(f"`min_size` (={min_size}) must be at least 2 layers")
    _check(similarity)
    num_layers = similarity.shape[-1]
    excess = np.zeros((*similarity.shape[:-2], num_layers + 1, num_layers + 1))
    num_pairs = np.zeros((num_layers + 1, num_layers + 1))
    squares = np.zeros(similarity.shape[:-2])
    for distance, sums, diagonal in _diagonals(similarity):
        inside, number = _sum(sums, *_inside(num_layers, distance))
        excess += inside - number * diagonal.mean(axis=-1)[..., None, None]
        num_pairs += number
        squares += (diagonal**2).sum(axis=-1)
    gain: Array = np.where(excess > 0, excess, 0) ** 2 / np.maximum(num_pairs, 1)
    size = np.arange(num_layers + 1)
    gain[..., size[None, :] - size[:, None] < min_size] = 0
    gain[gain <= _ROUNDING * squares[..., None, None]] = 0
    return gain


def contrasts(similarity: Array) -> Array:
    """Compute how much more alike each possible block is inside than across its ends.

    Pairs inside are compared with pairs of which one layer is inside, at the same distance, so that
    a map whose similarity depends on the distance alone has no contrast anywhere.

    Args:
        similarity: A map of layers with themselves, [layers, layers].

    Returns:
        Contrast of the block [a, b), [layers + 1, layers + 1], in the units of the similarity; NaN
        where there is nothing to compare.

    Raises:
        InvalidInputError: If the map is not square or not finite.
    """
    _check(similarity)
    num_layers = similarity.shape[-1]
    total = np.zeros((num_layers + 1, num_layers + 1))
    weight = np.zeros_like(total)
    first = np.arange(num_layers + 1)[:, None]
    end = np.arange(num_layers + 1)[None, :]
    for distance, sums, _ in _diagonals(similarity):
        inside, num_inside = _sum(sums, *_inside(num_layers, distance))
        # Pairs whose first, or whose second layer is inside; those inside are in both.
        one, num_one = _sum(sums, first + 0 * end, end + 0 * first)
        other, num_other = _sum(sums, first - distance + 0 * end, end - distance + 0 * first)
        across, num_across = one + other - 2 * inside, num_one + num_other - 2 * num_inside
        both = (num_inside > 0) & (num_across > 0)
        difference = inside / np.maximum(num_inside, 1) - across / np.maximum(num_across, 1)
        total += np.where(both, num_inside * difference, 0)
        weight += np.where(both, num_inside, 0)
    with np.errstate(invalid="ignore"):
        contrast: Array = total / np.where(weight > 0, weight, np.nan)
    return contrast


def segmentations(gain: Array, max_blocks: int) -> list[Segmentation]:
    """Find the best 1, 2, … blocks that do not overlap.

    Args:
        gain: Gain of each block [a, b), [layers + 1, layers + 1]; see `gains`.
        max_blocks: How many blocks at most.

    Returns:
        One segmentation per number of blocks, fewer where more blocks gain nothing.

    Example:
        >>> similarity = np.array([[1, 0.9, 0.1], [0.9, 1, 0.1], [0.1, 0.1, 1]])
        >>> segmentations(gains(similarity, min_size=2), 5)[0].blocks
        [(0, 2)]
    """
    num_layers = len(gain) - 1
    best = np.zeros(num_layers + 1)
    starts: list[Positions] = []
    found: list[Segmentation] = []
    for number in range(1, max_blocks + 1):
        # Up to layer `end`: the last block is [start, end), or the layer before `end` is in none.
        totals = best[:, None] + np.where(gain > 0, gain, -np.inf)
        start = totals.argmax(axis=0)
        ended = totals[start, np.arange(num_layers + 1)]
        current = np.maximum.accumulate(ended)
        chosen = np.where(ended >= current, start, -1)
        starts.append(chosen)
        if not np.isfinite(current[-1]) or current[-1] <= best[-1]:
            break
        found.append(Segmentation(float(current[-1]), _trace(starts, number, num_layers)))
        best = current
    return found


def _trace(starts: list[Positions], number: int, end: int) -> list[tuple[int, int]]:
    """Follow the starts of blocks back from the last layer."""
    blocks: list[tuple[int, int]] = []
    for at in reversed(starts[:number]):
        while at[end] < 0:
            end -= 1
        blocks.append((int(at[end]), end))
        end = int(at[end])
    return blocks[::-1]


def choose(
    found: list[Segmentation], null_gains: Array, level: float = 0.05
) -> tuple[Segmentation, float]:
    """Choose the number of blocks: each has to gain more than chance's best block does.

    Args:
        found: The best blocks for every number; see `segmentations`.
        null_gains: The largest gain of one block in each map of the null, [maps].
        level: The probability that a map without blocks gets one.

    Returns:
        The segmentation, without a block where none gains enough, and the gain it takes.
    """
    needed = float(np.quantile(null_gains, 1 - level, method="higher"))
    chosen = Segmentation(0.0, [])
    for segmentation in found:
        if segmentation.gain - chosen.gain <= needed:
            break
        chosen = segmentation
    return chosen, needed


def _check(similarity: Array) -> None:
    """Refuse what is no map.

    Raises:
        InvalidInputError: If it is none.
    """
    if similarity.ndim < 2 or similarity.shape[-1] != similarity.shape[-2]:
        raise InvalidInputError(
            f"`similarity` has shape {list(similarity.shape)}; expected [layers, layers]"
        )
    if not np.isfinite(similarity).all():
        raise InvalidInputError("`similarity` holds NaN; leave out the layers that have no value")


def _diagonals(similarity: Array) -> Iterator[tuple[int, Array, Array]]:
    """Yield each distance, the running sums of its pairs [..., pairs + 1], and the pairs."""
    for distance in range(1, similarity.shape[-1]):
        diagonal = np.diagonal(similarity, distance, -2, -1)
        sums = np.zeros((*diagonal.shape[:-1], diagonal.shape[-1] + 1))
        np.cumsum(diagonal, axis=-1, out=sums[..., 1:])
        yield distance, sums, diagonal


def _inside(num_layers: int, distance: int) -> tuple[Positions, Positions]:
    """Return, for each block [a, b), from where to where pairs at a distance begin inside it."""
    first = np.arange(num_layers + 1)[:, None]
    end = np.arange(num_layers + 1)[None, :]
    return first + 0 * end, end - distance + 0 * first


def _sum(sums: Array, low: Positions, high: Positions) -> tuple[Array, Array]:
    """Return the sum and the number of the pairs from `low` to before `high`."""
    most = sums.shape[-1] - 1
    low = np.clip(low, 0, most)
    high = np.maximum(low, np.clip(high, 0, most))
    total: Array = sums[..., high] - sums[..., low]
    return total, (high - low).astype(np.float64)
