"""How much each example counts: CKA without it, in closed form."""

from __future__ import annotations

import math

import numpy as np

from sonde.exceptions import InvalidInputError

from .kernels import Array


def leave_one_out(stack: Array, others: Array | None = None, *, unbiased: bool = True) -> Array:
    """Compute CKA of all layers without each example, in closed form.

    Rows of centred matrices add up to zero. With qᵢ = Σⱼ Kᵢⱼ Lᵢⱼ the inner product of two
    U-centred matrices becomes, without example i and centred anew, ⟨K, L⟩ - 2 qᵢ (n - 2)/(n - 3);
    that of two matrices HKH becomes ⟨K, L⟩ - 2 qᵢ + Kᵢᵢ Lᵢᵢ - 2 (qᵢ - Kᵢᵢ Lᵢᵢ)/(n - 1) +
    Kᵢᵢ Lᵢᵢ/(n - 1)².

    Args:
        stack: One flattened centred Gram matrix a row, [layers, examples²]; see `kernels.center`.
        others: The same for the other layers; `stack` itself if None.
        unbiased: Whether they are U-centred; then at least 5 examples are needed.

    Returns:
        CKA [layers, other_layers, examples] without each example; NaN for layers that have none.

    Raises:
        InvalidInputError: If there are too few examples to leave one out.

    Example:
        >>> from sonde.analysis import kernels
        >>> gram = kernels.center(np.diag([1.0, 2, 3, 4, 9])).ravel()
        >>> leave_one_out(np.stack([gram, gram])).shape
        (2, 2, 5)
    """
    n = math.isqrt(stack.shape[1])
    smallest = 5 if unbiased else 3
    if n < smallest:
        raise InvalidInputError(f"there are {n} examples; leaving one out takes {smallest}")
    columns = stack if others is None else others

    def without(one: Array, other: Array) -> Array:
        """Return the inner product of a layer with layers, [layers, examples]."""
        products = one.reshape(-1, n, n) * other.reshape(-1, n, n)
        q = products.sum(axis=2)
        total = q.sum(axis=1, keepdims=True)
        if unbiased:
            left: Array = total - 2 * q * ((n - 2) / (n - 3))
            return left
        both = products[:, np.arange(n), np.arange(n)]
        left = total - 2 * q + both - 2 * (q - both) / (n - 1) + both / (n - 1) ** 2
        return left

    norms, other_norms = without(stack, stack), without(columns, columns)
    result = np.stack([without(row[None], columns) for row in stack])
    with np.errstate(invalid="ignore", divide="ignore"):
        result /= np.sqrt(np.where(norms > 0, norms, np.nan))[:, None]
        result /= np.sqrt(np.where(other_norms > 0, other_norms, np.nan))[None]
    return result
