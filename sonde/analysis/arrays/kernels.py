"""Kernels over examples: Gram matrices, their centring, and CKA between them.

Every function is a pure function of arrays and computes in float64. A Gram matrix K has the axes
[examples, examples]; entry (i, j) is the similarity of examples i and j in one layer. Two Gram
matrices can be compared when their examples are the same, in the same order.

The estimators, with H = I - 11ᵀ/n:

- biased, HSIC₀ = vec(HKH)·vec(HLH) / (n - 1)²  (Gretton et al. 2005). With more features than
  examples it is large even between independent layers, so it is never the default.
- unbiased, HSIC₁ (Song et al. 2012, eq. 5), written as vec(U(K))·vec(U(L)) / (n(n - 3)) with the
  U-centring U of Székely and Rizzo (2014). It needs four examples and may be negative.

CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), from Kornblith et al. (2019), "Similarity of Neural
Network Representations Revisited", eq. 4: 0 for unrelated layers, 1 for layers equal up to rotation
and scale. Written with centred Gram matrices it is a cosine, so all pairs of layers at once are one
matrix product.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import InvalidInputError, MismatchError

Array = npt.NDArray[np.float64]
Real = npt.NDArray[Any]  # Any: float16, float32, float64 and integers are all welcome.

# Asymmetry that rounding explains, relative to the largest entry (GPU kernels in TF32: 1e-3).
_ASYMMETRY = 1e-2


def center(gram: Real, unbiased: bool = True) -> Array:
    """Center a Gram matrix so that inner products of centred matrices are HSIC up to scale.

    A layer that is constant over the examples centres to rounding error only; that is returned as
    exact zeros, so that such a layer can be told apart.

    Args:
        gram: Symmetric matrix [examples, examples].
        unbiased: U-centring for HSIC₁ (needs 4 examples) instead of HKH for HSIC₀.

    Returns:
        A new float64 matrix [examples, examples]; U-centred, its diagonal is zero.

    Raises:
        InvalidInputError: If `gram` is not square and symmetric, is not finite, or is too small.

    Example:
        >>> center(np.diag([1.0, 3.0]), unbiased=False)
        array([[ 1., -1.],
               [-1.,  1.]])
    """
    problem = _problem(gram, unbiased)
    if problem is not None:
        raise InvalidInputError(f"`gram` {problem}")
    return _centered(gram, unbiased)


def center_blocks(grams: Sequence[Real], unbiased: bool = True) -> Array:
    """Center a Gram matrix of which only diagonal blocks are known.

    CKA of what it returns is minibatch CKA, a ratio of means over blocks (Nguyen et al., 2021,
    2010.15327, section 3). The study has blocks of equal size and counts them equally. Here a block
    of n examples counts n(n - 3), or (n - 1)² where biased, because that is what the inner product
    of two centred blocks is, in units of its HSIC. HSIC₁ of every block has the same mean, so any
    weights that depend on sizes alone leave a mean over blocks unbiased; the variance of HSIC₁
    between unrelated layers is proportional to 1/(n(n - 3)), so these give the least variance. Of
    blocks of 32, 32, 32 and 4 examples, equal weights would let the last one make nearly all of it.

    Args:
        grams: Symmetric matrices [examples, examples], one per block.
        unbiased: U-centring for HSIC₁ (needs 4 examples) instead of HKH for HSIC₀.

    Returns:
        One vector, float64 [sum of examples²]. Blocks too small to be centred are zero.

    Raises:
        InvalidInputError: If a block is not square and symmetric, or not finite, or all are too
            small.
    """
    smallest = 4 if unbiased else 2
    is_any_large_enough = max(len(gram) for gram in grams) >= smallest
    vectors = [
        np.zeros(gram.size)
        if len(gram) < smallest and is_any_large_enough
        else center(gram, unbiased).ravel()
        for gram in grams
    ]
    return np.concatenate(vectors)


def hsic(gram: Real, other: Real, *, unbiased: bool = True) -> float:
    """Estimate the Hilbert-Schmidt independence criterion of two kernels.

    Args:
        gram: Gram matrix [examples, examples].
        other: Gram matrix of the same examples in the same order.
        unbiased: HSIC₁ of Song et al. (2012), which may be negative, instead of HSIC₀.

    Returns:
        The estimate, in the product of the units of both kernels; 0 means independent.

    Raises:
        MismatchError: If the two matrices differ in their number of examples.

    Example:
        >>> hsic(np.eye(2), np.eye(2), unbiased=False)
        1.0
    """
    centered, other_centered = center(gram, unbiased), center(other, unbiased)
    if centered.shape != other_centered.shape:
        raise MismatchError(
            f"`gram` has {len(centered)} examples, `other` {len(other_centered)}; "
            "both must be of the same examples"
        )
    n = len(centered)
    scale = n * (n - 3) if unbiased else (n - 1) ** 2
    return float(np.vdot(centered, other_centered)) / scale


def cka_matrix(
    grams: Sequence[Real] | Real,
    others: Sequence[Real] | Real | None = None,
    *,
    unbiased: bool = True,
) -> Array:
    """Compare every layer of one group with every layer of another by CKA.

    Memory: one float64 copy of all Gram matrices, 8 * layers * examples² bytes.

    Args:
        grams: Gram matrices of the layers, [layers, examples, examples] or a sequence of matrices.
        others: Gram matrices of the other layers over the same examples; `grams` itself if None.
        unbiased: Ratio of HSIC₁ (debiased CKA, may be negative) instead of HSIC₀ (in [0, 1]).

    Returns:
        CKA as a matrix [layers, other_layers]. A layer without variance over the examples (its
        HSIC with itself is zero) has no CKA: its row, or its column, is NaN.

    Raises:
        InvalidInputError: If there is no Gram matrix, or one is not square and symmetric, is not
            finite or is too small.
        MismatchError: If the Gram matrices differ in their number of examples.

    Example:
        >>> x, y = np.eye(4)[:, :1], np.eye(4)[:, 1:2]
        >>> cka_matrix([linear_gram(x), linear_gram(y)], unbiased=False).round(3)
        array([[1.   , 0.111],
               [0.111, 1.   ]])
    """
    stack = _stack("grams", grams, unbiased)
    if others is None:
        return centered_cka(stack)
    other_stack = _stack("others", others, unbiased)
    if stack.shape[1] != other_stack.shape[1]:
        raise MismatchError(
            f"`grams` are of {math.isqrt(stack.shape[1])} examples, `others` of "
            f"{math.isqrt(other_stack.shape[1])}; both must be of the same examples"
        )
    return centered_cka(stack, other_stack)


def centered_cka(stack: Array, others: Array | None = None) -> Array:
    """Compute CKA from Gram matrices that `center` has centred already.

    Args:
        stack: One flattened centred Gram matrix a row, [layers, examples * examples].
        others: The same for the other layers; `stack` itself if None.

    Returns:
        CKA [layers, other_layers]; NaN for layers whose centred Gram is all zero or not finite.
    """
    norms = _norms(stack)
    other_norms = norms if others is None else _norms(others)
    product = stack @ (stack if others is None else others).T
    product /= norms[:, None]
    product /= other_norms[None, :]
    return product


def linear_gram(features: Real) -> Array:
    """Compute the linear kernel K = XXᵀ in float64.

    Args:
        features: Examples by features, [examples, features] or [examples, ...] (flattened).

    Returns:
        Gram matrix [examples, examples].

    Raises:
        InvalidInputError: If `features` has fewer than two axes or is not finite.

    Example:
        >>> linear_gram(np.array([[1, 0], [1, 2]]))
        array([[1., 1.],
               [1., 5.]])
    """
    x = _features(features)
    return x @ x.T


def rbf_gram(features: Real, threshold: float = 1.0) -> Array:
    """Compute the Gaussian kernel with a bandwidth relative to the median distance.

    K = exp(-d² / (2 threshold² median(d²))), the median over all pairs, pairs of an example with
    itself included, as in the code released with Kornblith et al. (2019).

    Args:
        features: Examples by features, [examples, features] or [examples, ...] (flattened).
        threshold: Bandwidth as a fraction of the root of the median squared distance, > 0.

    Returns:
        Gram matrix [examples, examples] with entries in (0, 1] and a diagonal of ones.

    Raises:
        InvalidInputError: If `features` has fewer than two axes or is not finite, if `threshold`
            is not positive, or if more than half of the pairs are at distance zero.

    Example:
        >>> rbf_gram(np.array([[0.0], [1.0], [3.0]])).round(3)
        array([[1.   , 0.607, 0.011],
               [0.607, 1.   , 0.135],
               [0.011, 0.135, 1.   ]])
    """
    if not threshold > 0:
        raise InvalidInputError(f"`threshold` (={threshold}) must be > 0")
    x = _features(features)
    x = x - x.mean(axis=0)  # Distances do not change, but far fewer digits cancel.
    return rbf_of_grams([x @ x.T], threshold)[0]


def rbf_of_grams(grams: Sequence[Real], threshold: float = 1.0) -> list[Array]:
    """Compute the Gaussian kernel of features of which only linear Gram matrices are known.

    See `rbf_gram`: d² of two examples is Kᵢᵢ + Kⱼⱼ - 2Kᵢⱼ. Of several blocks of examples there is
    one bandwidth, from the distances inside all of them.

    Args:
        grams: Linear Gram matrices [examples, examples], one per block.
        threshold: Bandwidth as a fraction of the root of the median squared distance, > 0.

    Returns:
        Gram matrices [examples, examples] with entries in (0, 1] and a diagonal of ones.

    Raises:
        InvalidInputError: If `threshold` is not positive, or if more than half of the pairs are at
            distance zero.

    Example:
        >>> rbf_of_grams([np.array([[0.0, 0.0], [0.0, 1.0]])])[0].round(3)
        array([[1.   , 0.368],
               [0.368, 1.   ]])
    """
    if not threshold > 0:
        raise InvalidInputError(f"`threshold` (={threshold}) must be > 0")
    distances = [squared_distances(gram) for gram in grams]
    median = float(np.median(np.concatenate([block.ravel() for block in distances])))
    if median == 0:
        raise InvalidInputError(
            "`features` has a median distance of 0 between examples: too many are equal "
            "for an RBF bandwidth"
        )
    return [np.exp(block / (-2 * threshold**2 * median)) for block in distances]


def squared_distances(gram: Real) -> Array:
    """Compute squared distances between examples from their inner products.

    Args:
        gram: Linear Gram matrix [examples, examples]; features may have any vector subtracted.

    Returns:
        Squared distances [examples, examples], not negative, zero on the diagonal.

    Example:
        >>> squared_distances(np.array([[1.0, 2.0], [2.0, 9.0]]))
        array([[0., 6.],
               [6., 0.]])
    """
    product = gram.astype(np.float64)
    squares = np.diagonal(product)
    distances: Array = np.maximum(squares[:, None] + squares[None, :] - 2 * product, 0)
    np.fill_diagonal(distances, 0)
    return distances


def _features(features: Real) -> Array:
    """Flatten to [examples, features] in float64.

    Raises:
        InvalidInputError: If there are fewer than two axes or non-finite values.
    """
    if features.ndim < 2:
        raise InvalidInputError(
            f"`features` has shape {list(features.shape)}; expected [examples, features]"
        )
    x = features.reshape(len(features), -1).astype(np.float64)
    if not np.isfinite(x).all():
        raise InvalidInputError(
            f"`features` holds {np.count_nonzero(~np.isfinite(x))} non-finite values"
        )
    return x


def _problem(gram: Real, unbiased: bool) -> str | None:
    """Say why a matrix cannot be centred, None if it can."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        return f"has shape {list(gram.shape)}; expected [examples, examples]"
    if len(gram) < (4 if unbiased else 2):
        need = "4 (unbiased HSIC divides by n - 3)" if unbiased else "2"
        return f"has {len(gram)} examples; expected at least {need}"
    if not np.isfinite(gram).all():
        return f"holds {np.count_nonzero(~np.isfinite(gram))} non-finite values"
    if np.abs(gram - gram.T).max() > _ASYMMETRY * np.abs(gram).max():
        return "is not symmetric; make a Gram matrix of features with `linear_gram`"
    return None


def _centered(gram: Real, unbiased: bool) -> Array:
    """Center a copy of a valid matrix, with rounding error set to zero."""
    centered: Array = np.array(gram, dtype=np.float64)
    n = len(centered)
    rounding = 10 * precision_of(gram) * float(np.linalg.norm(centered))
    if unbiased:
        np.fill_diagonal(centered, 0)
        means = centered.sum(axis=0) / (n - 2)
        means -= means.sum() / (2 * (n - 1))
    else:
        means = centered.mean(axis=0)
        means -= means.mean() / 2
    centered -= means[:, None]
    centered -= means[None, :]
    if unbiased:
        np.fill_diagonal(centered, 0)
    if np.linalg.norm(centered) <= rounding:
        centered[:] = 0
    return centered


def precision_of(gram: Real) -> float:
    """Return the rounding of the type of a matrix, that of float64 for integers."""
    precision = gram.dtype if np.issubdtype(gram.dtype, np.floating) else np.float64
    return float(np.finfo(precision).eps)


def _stack(name: str, grams: Sequence[Real] | Real, unbiased: bool) -> Array:
    """Center Gram matrices into one array [layers, examples * examples].

    Raises:
        InvalidInputError: If there is no matrix, or one that cannot be centred.
        MismatchError: If the matrices differ in their number of examples.
    """
    if len(grams) == 0:
        raise InvalidInputError(f"`{name}` is empty; expected at least one Gram matrix")
    n = len(grams[0])
    stack: Array = np.empty((len(grams), n * n))
    for index, gram in enumerate(grams):
        problem = _problem(gram, unbiased)
        if problem is not None:
            raise InvalidInputError(f"`{name}[{index}]` {problem}")
        if len(gram) != n:
            raise MismatchError(
                f"`{name}[{index}]` has {len(gram)} examples, `{name}[0]` {n}; "
                "all must be of the same examples"
            )
        stack[index] = _centered(gram, unbiased).ravel()
    return stack


def _norms(stack: Array) -> Array:
    """Norm of each row; NaN where there is nothing to divide by."""
    norms: Array = np.sqrt(np.einsum("ij,ij->i", stack, stack))
    norms[norms == 0] = np.nan
    return norms
