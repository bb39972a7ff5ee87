"""What is called exact, held against what is true: every check returns what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .truth import Rows

# A float32 pass rounds by some 1e-7 an operation, of a sum of a hundred; a score of 30 is off by
# 3e-6, and with it the gradient of a sure example. The tolerance is relative to each row of each
# parameter by itself: nothing hides beside a larger one.
TOLERANCE = 1e-3
# Where float64 has a row that is zero but for rounding, float32 may have its own rounding.
ZERO, ROUNDING = 1e-10, 1e-5
EXACT, COVERED = "exact", ("exact", "fallback")


def is_covered(kind: str) -> bool:
    """Whether there are gradients of a parameter."""
    return kind.split(":")[0] in COVERED


def wrong_coverage(coverage: Mapping[str, str], names: Rows) -> Iterator[str]:
    """Every parameter is accounted for, and what is not exact has its reason."""
    if set(coverage) != set(names):
        yield f"covered are {sorted(coverage)}, not {sorted(names)}"
    for name, kind in coverage.items():
        word, _, reason = kind.partition(": ")
        if word not in ("exact", "fallback", "unsupported") or (word != EXACT and not reason):
            yield f"{name} is {kind!r}, which gives no reason"


def wrong_rows(
    actual: Mapping[str, Tensor], expected: Rows, tolerance: float = TOLERANCE
) -> Iterator[str]:
    """The rows of every covered parameter are the expected ones, each relative to its own norm."""
    whole = norms_of(expected)
    for name, rows in actual.items():
        truth = expected[name].flatten(1)
        error = (rows.double().flatten(1) - truth).norm(dim=1)
        norm = truth.norm(dim=1)
        allowed = torch.where(norm <= ZERO * whole, ROUNDING * whole, tolerance * norm)
        # What is no number in truth may be anything but a number.
        is_wrong = ~(error <= allowed) & ~(norm.isnan() & error.isnan())
        if is_wrong.any():
            row = int((error / (norm + 1e-300)).nan_to_num(torch.inf).argmax())
            yield (
                f"{name}: {int(is_wrong.sum())} of {len(rows)} rows are wrong, such as {row}, by "
                f"{float(error[row] / norm[row]):.2g} of its norm"
            )


def norms_of(rows: Mapping[str, Tensor]) -> Tensor:
    """The norm of each example's gradient, over some parameters."""
    norms: Tensor = torch.linalg.vector_norm(flat(rows), dim=1)
    return norms


def flat(rows: Mapping[str, Tensor]) -> Tensor:
    """The gradients as one row per example."""
    return torch.cat([of.double().flatten(1) for of in rows.values()], 1)


def wrong_gram(
    actual: Tensor, expected: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> Iterator[str]:
    """Inner products are those of the rows, relative to the product of their norms."""
    yield from _wrong_products("inner products", actual, expected, tolerance)


def wrong_sketch(
    actual: Tensor, expected: Mapping[str, Tensor], num_errors: float
) -> Iterator[str]:
    """Inner products of a sketch are right to some standard errors: √(2 / dim) of the norms."""
    tolerance = num_errors * (2 / actual.shape[1]) ** 0.5
    products = actual.double() @ actual.double().T
    yield from _wrong_products("products of the sketch", products, expected, tolerance)


def _wrong_products(
    what: str, actual: Tensor, expected: Mapping[str, Tensor], tolerance: float
) -> Iterator[str]:
    rows = flat(expected)
    norms = rows.norm(dim=1)
    known = norms.isfinite() & (norms > 0)
    scale = norms[known][:, None] * norms[known]
    error = (actual.double() - rows @ rows.T)[known][:, known].abs() / scale
    if not bool((error <= tolerance).all()):
        yield f"{what} are off by {float(error.max()):.2g} of the product of the norms"


def wrong_norms(
    actual: Tensor, expected: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> Iterator[str]:
    """The norms are those of the rows."""
    norms = norms_of(expected)
    error = (actual.double() - norms).abs() / norms
    if not bool(((error <= tolerance) | ~norms.isfinite() | (norms == 0)).all()):
        ratios = [round(float(ratio), 3) for ratio in actual.double() / norms]
        yield f"norms are {ratios} of the true ones"
