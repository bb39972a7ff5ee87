"""Inner products and norms of rows whose squares may leave the range of float32.

Its normal numbers are 1.2e-38 … 3.4e38, so the square of a row of norm 1e-20 or 1e20 is lost while
the row itself is not. What comes near these ends is multiplied in float64.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

# Between these, squares lose nothing: the smallest number of float32 is 2⁻¹⁴⁹, its largest 2¹²⁸.
# The room below is for long rows, and for products with other numbers on the way.
SMALLEST, LARGEST = 2.0**-80, 2.0**100
# Of how many values a norm is taken in the type of the values.
_PIECE = 1024


def are_outside(squares: Tensor) -> Tensor:
    """Return which squares are near the ends of float32's range, or beyond them; zeros too."""
    return ~((squares >= SMALLEST) & (squares <= LARGEST))


def are_inside(squares: Tensor) -> bool:
    """Return whether all squares lie well within float32's range."""
    if not squares.numel():
        return True
    smallest, largest = squares.aminmax()
    return smallest.item() >= SMALLEST and largest.item() <= LARGEST


def are_nonzero(values: Tensor) -> Tensor:
    """Return which rows are not zero, bool [n]."""
    # Takes about a fifth of the time that `any` takes: measured, of 32 rows of zeros on a CPU.
    rows = values.flatten(1)
    if not rows.shape[1]:
        return rows.new_zeros(len(rows), dtype=torch.bool)
    return (rows.amax(1) != 0) | (rows.amin(1) != 0)


def products_between(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner products of rows with others, [n, m], float64 on the CPU."""
    if left.dtype != torch.float64 and any(_loses_rows(side) for side in (left, right)):
        left, right = left.double(), right.double()
    return (left @ right.T).double().cpu()


def row_squares(values: Tensor) -> Tensor:
    """Return the squared norm of each row, float64 [n], on the CPU."""
    # Norms of pieces, then their sum in float64: converting the values themselves takes longer.
    squares = _piece_squares(values).cpu()
    if values.dtype == torch.float64 or are_inside(squares):
        return squares
    lost = are_outside(squares) & are_nonzero(values).cpu()
    if bool(lost.any()):
        squares[lost] = _norms(values[lost.to(values.device)].double()).square().cpu()
    return squares


def _loses_rows(values: Tensor) -> bool:
    squares = _norms(values).double().square().cpu()
    if are_inside(squares):
        return False
    return bool((are_outside(squares) & are_nonzero(values).cpu()).any())


def _piece_squares(values: Tensor) -> Tensor:
    if values.shape[1] <= _PIECE:
        return _norms(values).double().square()
    split = values.shape[1] // _PIECE * _PIECE
    pieces, rest = values[:, :split].unflatten(1, (-1, _PIECE)), values[:, split:]
    norms = torch.cat([_norms(pieces), _norms(rest)[:, None]], 1)
    return norms.double().square().sum(1)


def _norms(values: Tensor) -> Tensor:
    return cast(Tensor, torch.linalg.vector_norm(values, dim=-1))
