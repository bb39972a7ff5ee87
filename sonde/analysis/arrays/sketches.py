"""CKA of features of which only sketches are known, with a standard error.

A sketch adds every feature, times a random sign, to one of d buckets. Its Gram matrix is right on
average, but HSIC multiplies two Gram matrices, and two sketches err alike where they have the same
projection: HSIC of a layer with itself comes out too large, and so CKA with others too small.

Over n examples let S and T [n, d] be two sketches, their columns centred, P = SᵀT, C = S∘T,
α = n/(n-2), β = 1/((n-1)(n-2)), or α = β = 0 for HSIC₀. With U the centring of `kernels.center`,
H = vec(U(SSᵀ))·vec(U(TTᵀ)) is the sum over pairs of buckets (a, b) of
A_ab = P_ab² - α Σᵢ S_ia²T_ib² + β|s_a|²|t_b|². What two features share in one bucket is as large,
on average, as what a feature in bucket a shares with one in bucket b, and that is seen in

    W_ab = P_aa P_bb + P_ab P_ba - 2α (CᵀC)_ab + 2β (SᵀS∘TᵀT)_ab    for a ≠ b.

So H - ΣW/(d-1) has the mean of the exact value over projections, whether both layers have the same
projection or not (then W has mean 0), and however many features there are. Sketches of different
sizes are independent: H alone is right. So it is for a sketch and exact features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .kernels import Array


@dataclass(frozen=True)
class Sketched:
    """One layer: its centred Gram matrices, and its sketch where only that is known.

    Attributes:
        grams: Centred Gram matrices [examples, examples], one per block of examples.
        rows: The sketch of each block [examples, buckets], columns centred; None if features are
            known exactly.
    """

    grams: Sequence[Array]
    rows: Sequence[Array] | None

    @property
    def num_buckets(self) -> int:
        """Size of the sketch; 0 without one."""
        return 0 if self.rows is None else self.rows[0].shape[1]


@dataclass(frozen=True)
class _Hsic:
    """HSIC of two layers, up to scale, and what it is without one bucket of either side, or both.

    Attributes:
        value: With all buckets.
        without: Without each bucket of the first side [buckets], or of both where they are paired.
        other_without: Without each bucket of the other side.
        paired: Whether both sides lose a bucket together.
    """

    value: float
    without: Array
    other_without: Array
    paired: bool


def sketched_cka(
    layers: Sequence[Sketched | None],
    others: Sequence[Sketched | None] | None = None,
    *,
    unbiased: bool = True,
) -> tuple[Array, Array]:
    """Compare layers by CKA, from HSIC corrected for the sketch.

    Every HSIC has the mean of the exact one over projections; CKA is their ratio and keeps a bias
    of order 1/d, upwards by a few percent at d = 64.

    The error is that of the projection, by a jackknife over buckets. It is too large, 1.3
    to 3 times in simulations: two features meet in pairs, and the jackknife counts a pair twice;
    and without a bucket its features are missing, which is no error of a projection. The
    jackknife's correction of the bias makes CKA worse there, and is not applied.

    Args:
        layers: The layers; None has no CKA.
        others: The other layers over the same examples; `layers` itself if None.
        unbiased: Whether the Gram matrices are U-centred.

    Returns:
        CKA and its standard error, [layers, other_layers] both. NaN for None, and where HSIC of a
        layer with itself is not above 0, as where a sketch is too small. The error is 0 where
        neither side is a sketch.
    """
    selves = [None if layer is None else _hsic(layer, layer, unbiased) for layer in layers]
    same = others is None
    columns = layers if others is None else others
    other_selves = (
        selves
        if same
        else [None if layer is None else _hsic(layer, layer, unbiased) for layer in columns]
    )
    values = np.full((len(layers), len(columns)), np.nan)
    errors = values.copy()
    for i, (layer, own) in enumerate(zip(layers, selves, strict=True)):
        for j, (other, other_own) in enumerate(zip(columns, other_selves, strict=True)):
            if layer is None or other is None or own is None or other_own is None:
                continue
            if same and j < i:
                values[i, j], errors[i, j] = values[j, i], errors[j, i]
            else:
                both = own if same and i == j else _hsic(layer, other, unbiased)
                values[i, j], errors[i, j] = _ratio(both, own, other_own)
    return values, errors


def is_large_enough(layer: Sketched, unbiased: bool) -> bool:
    """Tell whether HSIC of a layer with itself, corrected for the sketch, is above 0."""
    return _hsic(layer, layer, unbiased).value > 0


def self_products(layers: Sequence[Sketched | None], *, unbiased: bool = True) -> Array:
    """Return HSIC of each layer with itself, up to scale and corrected for the sketch, [layers].

    Args:
        layers: The layers; None has none, which is NaN.
        unbiased: Whether the Gram matrices are U-centred.
    """
    return np.array(
        [np.nan if layer is None else _hsic(layer, layer, unbiased).value for layer in layers]
    )


def _ratio(both: _Hsic, own: _Hsic, other: _Hsic) -> tuple[float, float]:
    """Divide into CKA, and take the jackknife of it."""
    if not (own.value > 0 and other.value > 0):
        return float("nan"), float("nan")
    value = both.value / np.sqrt(own.value) / np.sqrt(other.value)
    with np.errstate(invalid="ignore", divide="ignore"):
        if both.paired:
            without = both.without / np.sqrt(own.without) / np.sqrt(other.without)
            return value, float(np.sqrt(_variance(without)))
        first = both.without / np.sqrt(own.without) / np.sqrt(other.value)
        second = both.other_without / np.sqrt(own.value) / np.sqrt(other.without)
    return value, float(np.sqrt(_variance(first) + _variance(second)))


def _variance(without: Array) -> float:
    """Return the jackknife's variance from the values without one bucket."""
    if len(without) == 0:
        return 0.0
    return float((len(without) - 1) * without.var())


def _hsic(layer: Sketched, other: Sketched, unbiased: bool) -> _Hsic:
    """Compute HSIC up to scale, corrected where both sides are sketches of the same size."""
    product = sum(float(np.vdot(a, b)) for a, b in zip(layer.grams, other.grams, strict=True))
    parts = _parts(layer, other), _parts(other, layer)
    if layer.num_buckets == 0 or layer.num_buckets != other.num_buckets:
        return _Hsic(product, product - parts[0], product - parts[1], paired=False)
    assert layer.rows is not None  # Both have buckets.
    assert other.rows is not None
    size = layer.num_buckets
    diagonal, excess = np.zeros(size), np.zeros(size)
    for rows, other_rows in zip(layer.rows, other.rows, strict=True):
        of_block = _diagonal_and_excess(rows, other_rows, unbiased)
        diagonal += of_block[0]
        excess += of_block[1]
    value = product - excess.sum() / max(size - 1, 1)
    without = product - parts[0] - parts[1] + diagonal
    without = without - (excess.sum() - 2 * excess) / max(size - 2, 1)
    return _Hsic(value, without, without, paired=True)


def _parts(layer: Sketched, other: Sketched) -> Array:
    """Return what each bucket of a sketch adds to the product of Gram matrices, [buckets]."""
    if layer.rows is None:
        return np.empty(0)
    pairs = zip(layer.rows, other.grams, strict=True)
    total: Array = np.sum([(rows * (gram @ rows)).sum(0) for rows, gram in pairs], axis=0)
    return total


def _diagonal_and_excess(s: Array, t: Array, unbiased: bool) -> tuple[Array, Array]:
    """Return A_aa and the sums of W over b ≠ a, [buckets] both, without a matrix of buckets."""
    n = len(s)
    if n < (4 if unbiased else 2):  # A block too small to be centred is left out.
        return np.zeros(s.shape[1]), np.zeros(s.shape[1])
    alpha, beta = (n / (n - 2), 1 / ((n - 1) * (n - 2))) if unbiased else (0.0, 0.0)
    c = s * t
    p = c.sum(0)  # P_aa.
    cross = t @ s.T
    squares = (c * c).sum(0)
    norms = (s * s).sum(0) * (t * t).sum(0)
    excess = p * p.sum() - p**2
    excess += (s * (cross @ t)).sum(0) - p**2
    excess -= 2 * alpha * (c.T @ c.sum(1) - squares)
    excess += 2 * beta * ((s * (cross.T @ t)).sum(0) - norms)
    return p**2 - alpha * squares + beta * norms, excess
