"""The sums of a step's per-example gradients, compared with the training's gradients.

Both add up the same terms in another order, so the terms tell by how much they may differ. A
gradient may be far smaller than its terms: where they cancel, as those of the bias of attention's
keys do, both sums are rounding alone. It may also be far smaller than the gradients of the other
parameters, and must be right all the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sonde.hooks.gradients.factors.dense import Dense, Factor

# How far a sum may be off the gradient, relative to its norm, by the type of what came back.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2
# On a GPU a float32 gradient may have been multiplied in TF32, which keeps 10 bits.
_GPU_TOLERANCE = 1e-2
# How many times the rounding of one sum two may be apart.
_ROUNDING = 4

_FAILED = "the per-example gradients do not add up to the gradient"


@dataclass(frozen=True)
class Terms:
    """What was added up to a gradient, by one operation.

    Attributes:
        deltas: The gradients with respect to its outputs.
        inputs: What it was given.
    """

    deltas: Sequence[Tensor]
    inputs: Sequence[Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The lowest precision of them."""
        floating = [x.dtype for x in (*self.deltas, *self.inputs) if x.is_floating_point()]
        return min(floating, key=lambda dtype: dtype.itemsize)

    def bound(self, parameter: nn.Parameter) -> Tensor:
        """Return what their absolute values add up to at most, as a norm over elements, [].

        A term is δ·x, and by Cauchy and Schwarz Σ|δ·x| ≤ ‖δ‖·‖x‖. For a matrix x is an input. For a
        vector, whose elements each meet a part of δ and x, it may be 1, too: a bias has that, and a
        scale behind a normalization about as much.
        """
        deltas = torch.stack([_norm(delta) for delta in self.deltas]).norm()
        is_vector = parameter.ndim < 2
        sizes = [_norm(x).to(deltas) for x in self.inputs if x.is_floating_point()]
        if is_vector or not sizes:
            sizes.append(deltas.new_tensor(math.sqrt(sum(delta.numel() for delta in self.deltas))))
        bound: Tensor = deltas * torch.stack(sizes).max()
        return bound / math.sqrt(parameter.numel()) if is_vector else bound


@dataclass(frozen=True)
class _Check:
    """A comparison, on the device: nothing waits for it before all are read."""

    distance: Tensor
    norm: Tensor
    tolerance: float
    rounding: Tensor | float
    parts: Collection[Hashable]


class SumChecks:
    """The comparisons of a step."""

    def __init__(self) -> None:
        self._checks: dict[nn.Parameter, list[_Check]] = defaultdict(list)

    def add(
        self,
        parameter: nn.Parameter,
        gradient: Tensor,
        total: Tensor | None,
        terms: Sequence[Terms],
        rows: Sequence[Factor],
        parts: Collection[Hashable] = (),
    ) -> None:
        """Compare the gradient of a parameter, as it arrives, with the sum over examples.

        Args:
            parameter: The parameter.
            gradient: Its gradient.
            total: The sum, flattened; None is zero.
            terms: What it was added up from.
            rows: The gradients of the examples.
            parts: What it came from, such as micro-batches; nothing where that is not known.
        """
        flat = gradient.detach().to_dense().flatten()
        wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
        difference = flat.to(wide) - (0 if total is None else total.to(wide))
        lowest = min([flat.dtype, *(one.dtype for one in terms)], key=lambda dtype: dtype.itemsize)
        tolerance = _TOLERANCES.get(lowest, _HALF_TOLERANCE)
        if flat.is_cuda and lowest == torch.float32:
            tolerance = _GPU_TOLERANCE
        distance, norm = difference.norm(), flat.to(wide).norm()
        # Rarely needed; on a GPU, asking whether it is would wait for what the training computes.
        is_near = distance.device.type == "cpu" and bool(distance <= tolerance * norm)
        allowed = 0.0 if is_near else _rounding(parameter, terms, rows, lowest)
        self._checks[parameter].append(_Check(distance, norm, tolerance, allowed, parts))

    def keep(self, counted: Collection[Hashable]) -> None:
        """Drop the comparisons of what came from nothing that counts."""
        for parameter, checks in list(self._checks.items()):
            kept = [one for one in checks if not one.parts or any(p in counted for p in one.parts)]
            self._checks[parameter] = kept
            if not kept:
                del self._checks[parameter]

    def failed(self) -> dict[nn.Parameter, str]:
        """Return which parameters' gradients do not add up, and by how much."""
        failed = {}
        for parameter, check in self._each():
            distance, norm = float(check.distance), float(check.norm)
            allowed = check.tolerance * norm + float(check.rounding)
            # Nothing can be compared with a gradient that is not finite, as of a diverged training.
            if math.isfinite(norm) and not distance <= allowed:
                failed[parameter] = f"{_FAILED}: {_size_of(distance, norm)}"
        return failed

    def describe(self) -> dict[str, float] | str:
        """Return what a record says of them."""
        if not self._checks:
            return "no gradient of a parameter was seen"
        compared = [one for one in self._each() if math.isfinite(one[1].norm)]
        if not compared:
            return "no gradient of a parameter was finite"
        total = self._total()
        worst = max(float(check.distance) for _, check in compared)
        return {
            "parameters": len({parameter for parameter, _ in compared}),
            "largest_difference": worst / total if total else worst,
        }

    def _total(self) -> float:
        """Return the norm of all gradients that are finite."""
        norms = [float(check.norm) for _, check in self._each()]
        return math.hypot(*(norm for norm in norms if math.isfinite(norm)))

    def _each(self) -> Iterator[tuple[nn.Parameter, _Check]]:
        for parameter, checks in self._checks.items():
            for check in checks:
                yield parameter, check


def _size_of(distance: float, norm: float) -> str:
    """Say how far a sum is from a gradient of a norm, which is finite."""
    if not math.isfinite(distance):
        return "their sum is not finite, but the gradient is"
    if not norm:
        return f"the gradient is zero, but their sum has norm {distance:.2g}"
    return f"the difference has {100 * distance / norm:.2g} % of the gradient's norm"


def _rounding(
    parameter: nn.Parameter, terms: Sequence[Terms], rows: Sequence[Factor], lowest: torch.dtype
) -> Tensor | float:
    """Return by how much sums of the same terms may differ, as a norm over a parameter's elements.

    Products and sums of half precision are accumulated in float32; what is rounded to half
    precision is a row of an example, and the gradient.

    Args:
        parameter: The parameter.
        terms: What was added up.
        rows: The gradients of the examples; those that are not formed are not rounded either.
        lowest: The lowest precision of them all.
    """
    digits = torch.finfo(lowest)
    # Below the smallest normal number digits are lost: of float16 that is at 6e-5 already.
    found: Tensor | float = digits.smallest_normal * digits.eps * math.sqrt(parameter.numel())
    accumulated = min(digits.eps, torch.finfo(torch.float32).eps)
    for of_operation in terms:
        found = found + accumulated * of_operation.bound(parameter)
    for factor in rows:
        if isinstance(factor, Dense):
            found = found + digits.eps * _norm(factor.values)
    return _ROUNDING * found


def _norm(values: Tensor) -> Tensor:
    dense = values.detach().to_dense()
    norm: Tensor = torch.linalg.vector_norm(
        dense, dtype=torch.promote_types(dense.dtype, torch.float32)
    )
    return norm
