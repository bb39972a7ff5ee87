"""Mutual nearest neighbours: do two layers find the same examples near?

From Huh et al. (2024), "The Platonic Representation Hypothesis", section 2: the mean share of the k
nearest neighbours of an example that both layers have in common. Unlike CKA it looks at the nearest
examples only, so far ones do not matter. By chance it is k/(n - 1).

Neighbours are kept as sparse rows, one per layer, over all pairs of examples; then all pairs of
layers are one product, and a permutation of the examples moves entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse

from sonde.exceptions import InvalidInputError

from .kernels import Array, Real, squared_distances
from .null import Orders


def nearest(gram: Real, k: int) -> Orders:
    """Find the nearest neighbours of each example.

    Args:
        gram: Linear Gram matrix [examples, examples]; centring does not change distances.
        k: How many neighbours, from 1 to examples - 1.

    Returns:
        The positions of the k nearest others, nearest first, [examples, k]; of equally near ones
        those that come first.

    Raises:
        InvalidInputError: If `k` is out of its range.

    Example:
        >>> nearest(np.outer([0.0, 1.0, 3.0], [0.0, 1.0, 3.0]), 1).tolist()
        [[1], [0], [1]]
    """
    if not 1 <= k < len(gram):
        raise InvalidInputError(f"`k` (={k}) must be from 1 to {len(gram) - 1}: the other examples")
    distances = squared_distances(gram)
    np.fill_diagonal(distances, np.inf)
    order: Orders = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order


def mutual_share(
    neighbours: Sequence[Orders | None], others: Sequence[Orders | None] | None = None
) -> Array:
    """Compute the share of nearest neighbours that layers have in common.

    Args:
        neighbours: Neighbours of each layer, [examples, k]; None for a layer that has none.
        others: The same of the other layers; `neighbours` itself if None.

    Returns:
        Mean share over the examples, [layers, other_layers], in [0, 1]; NaN for None.

    Example:
        >>> mutual_share([np.array([[1], [0], [1]]), np.array([[2], [0], [1]])]).round(2)
        array([[1.  , 0.67],
               [0.67, 1.  ]])
    """
    rows = _rows(neighbours)
    columns = rows if others is None else _rows(others)
    return _shares(rows, columns, neighbours, neighbours if others is None else others)


def null_shares(
    neighbours: Sequence[Orders | None],
    others: Sequence[Orders | None] | None,
    orders: Orders,
) -> Array:
    """Compute the share in common with the examples of one side permuted.

    Args:
        neighbours: Neighbours of each layer, [examples, k]; None for a layer that has none.
        others: The same of the other layers; `neighbours` itself if None.
        orders: Permutations, [permutations, examples].

    Returns:
        [permutations, layers, other_layers].
    """
    columns = neighbours if others is None else others
    rows = _rows(neighbours)
    maps = []
    for order in orders:
        # Example i of the permuted side is order[i]; its neighbours are where those of it went.
        back = np.argsort(order)
        moved = [None if of is None else back[of[order]] for of in columns]
        maps.append(_shares(rows, _rows(moved), neighbours, columns))
    return np.stack(maps)


def _shares(
    rows: sparse.csr_array,
    columns: sparse.csr_array,
    neighbours: Sequence[Orders | None],
    others: Sequence[Orders | None],
) -> Array:
    number = max(sum(of is not None and of.size for of in [one]) for one in neighbours)
    shares: Array = (rows @ columns.T).toarray() / max(number, 1)
    shares[[of is None for of in neighbours]] = np.nan
    shares[:, [of is None for of in others]] = np.nan
    return shares


def _rows(neighbours: Sequence[Orders | None]) -> sparse.csr_array:
    """Write neighbours as sparse rows over pairs of examples, [layers, examples²]."""
    num_examples = max((len(of) for of in neighbours if of is not None), default=0)
    places: list[npt.NDArray[np.intp]] = []
    counts = [0]
    for of in neighbours:
        at = np.empty(0, dtype=np.intp)
        if of is not None:
            at = np.sort((np.arange(num_examples)[:, None] * num_examples + of).ravel())
        places.append(at)
        counts.append(counts[-1] + len(at))
    indices = np.concatenate(places)
    shape = (len(neighbours), max(num_examples**2, 1))
    return sparse.csr_array((np.ones(len(indices)), indices, np.array(counts)), shape=shape)
