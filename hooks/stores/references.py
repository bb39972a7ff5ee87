"""References: what is subtracted from features far from zero before they are multiplied.

float32 has seven digits. Where all examples share an offset of 3,000 standard deviations, inner
products need fourteen for what differs between examples: centring would leave rounding errors only.
One vector subtracted from all examples changes nothing that is centred, such as CKA; what it adds
to inner products is kept in float64, so that readers return those of the features themselves.

Most layers need none: it is the first examples of a step that decide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sonde.log import LogArray

from .log_arrays import to_log_array
from .self_products import self_product

# So many examples decide: with three, one of them may be an outlier.
NUM_DECIDING = 3
# Squared norms of so many times the squared distances cost too many digits, times the epsilon.
# Of float32 64: rounding errors of products are then below 1e-5 of what centring leaves.
_COSTLY = 2.0**-17
# What is subtracted from at once, in bytes: the features themselves may be all that fits.
_PIECE_BYTES = 16 << 20

OFFSETS = "gram_offset"
SKETCH_REFERENCE = "sketch_reference"

DESCRIPTION = (
    "feature by feature the median of the first three examples (of a block: of its first three); "
    f"of layers with `{OFFSETS}` or `{SKETCH_REFERENCE}` it was subtracted before multiplying"
)


class Reference:
    """What is subtracted from the features of a layer; the same for all batches of a step.

    Args:
        values: The vector, [features], in the type in which features are multiplied; None where
            nothing has to be subtracted.
        dtype: That type.
    """

    def __init__(self, values: Tensor | None, dtype: torch.dtype) -> None:
        self.values = values
        self.dtype = dtype

    @classmethod
    def of(cls, features: Tensor, dtype: torch.dtype, products: Tensor | None = None) -> Reference:
        """Choose what to subtract by the first features that are seen, [batch, features].

        Args:
            features: The features.
            dtype: The type in which they are multiplied.
            products: Their inner products, [batch, batch], if they are known.
        """
        if products is None:
            rows = features[:NUM_DECIDING].to(dtype)
            products = rows @ rows.T
        if not _is_far_from_zero(products[:NUM_DECIDING, :NUM_DECIDING]):
            return cls(None, dtype)
        return cls(_middle(features[:NUM_DECIDING].to(dtype)), dtype)

    @property
    def is_zero(self) -> bool:
        """Whether nothing is subtracted."""
        return self.values is None

    def fits(self, features: Tensor) -> bool:
        """Tell whether it can be subtracted from features, [batch, features]."""
        return self.values is None or len(self.values) == features.shape[1]

    def subtract_from(self, copy: Tensor) -> Tensor:
        """Make a copy of features in this type, [batch, features], relative to it, in place."""
        return copy if self.values is None else copy.sub_(self.values)

    def pieces(self, features: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield features, [batch, features], relative to it, some columns at a time.

        A copy of all may not fit into memory. Without a reference there is one piece and no copy.
        """
        num_features = features.shape[1]
        if self.values is None or num_features == 0:
            yield slice(0, num_features), features.to(self.dtype)
            return
        width = max(1, _PIECE_BYTES // (self.dtype.itemsize * max(1, len(features))))
        for start in range(0, num_features, width):
            columns = slice(start, min(start + width, num_features))
            yield columns, features[:, columns].to(self.dtype) - self.values[columns]

    def products(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inner products of features relative to it, [batch, batch], and `offsets`.

        Args:
            features: The features, [batch, features], not yet relative.
        """
        gram: Tensor | None = None
        offsets = torch.zeros(len(features), dtype=torch.float64, device=features.device)
        for columns, piece in self.pieces(features):
            of_piece = self_product(piece)
            gram = of_piece if gram is None else gram.add_(of_piece)
            offsets += self.offsets(piece, columns)
        assert gram is not None  # There is a piece even of no features.
        return gram, offsets

    def offsets(self, relative: Tensor, columns: slice = slice(None)) -> Tensor:
        """Return what makes inner products of relative features those of features, by example.

        With x' = x − r, x·y is x'·y' + (x'·r + r·r / 2) + (y'·r + r·r / 2).

        Args:
            relative: Relative features, or some columns of them.
            columns: Which these are.

        Returns:
            What these columns add, float64 [batch].
        """
        if self.values is None:
            return torch.zeros(len(relative), dtype=torch.float64, device=relative.device)
        values = self.values[columns]
        return (relative @ values).double() + values.double().square().sum() / 2


def gram_offsets(
    references: Iterable[Reference | None], offsets: Tensor | None, layer: str
) -> list[LogArray]:
    """Return what a record holds of the offsets of a layer's inner products: none if all are 0."""
    has_some = any(reference is not None and not reference.is_zero for reference in references)
    if not has_some or offsets is None:
        return []
    return [to_log_array(offsets, OFFSETS, ("example",), layer)]


def reference_attributes(arrays: Sequence[LogArray]) -> dict[str, str]:
    """Return what a record says of references, if any of its arrays has one."""
    has_one = any(array.field in (OFFSETS, SKETCH_REFERENCE) for array in arrays)
    return {"reference": DESCRIPTION} if has_one else {}


def _is_far_from_zero(of_rows: Tensor) -> bool:
    """Tell by inner products of rows, [rows, rows], whether what differs between them is lost."""
    if len(of_rows) < 2:
        return len(of_rows) == 1  # One example does not show how far others are from it.
    products: list[list[float]] = of_rows.tolist()
    squares = [of_row[at] for at, of_row in enumerate(products)]
    # NaN and infinity stay where they are: subtracted, they would be in all examples.
    if not math.isfinite(sum(map(sum, products))):
        return False
    distances = [
        squares[i] + squares[j] - 2 * products[i][j]
        for i, j in itertools.combinations(range(len(products)), 2)
    ]
    return max(squares) > _COSTLY / torch.finfo(of_rows.dtype).eps * min(distances)


def _middle(rows: Tensor) -> Tensor:
    """Return feature by feature the median of three rows, of fewer the first row, [features]."""
    if len(rows) < NUM_DECIDING:
        return rows[0].clone()
    first, second, third = rows
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    return torch.maximum(low, torch.minimum(high, third))
