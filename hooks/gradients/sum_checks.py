"""The sums of a step's per-example gradients, compared with the training's gradients."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# How far a sum may be off the gradient, relative to its norm, by the type of what came back; and
# relative to the norm of all, where one is zero but for rounding.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2
# On a GPU a float32 gradient may have been multiplied in TF32, which keeps 10 bits.
_GPU_TOLERANCE = 1e-2
_ROUNDING = 1e-2

_FAILED = "the per-example gradients do not add up to the gradient"


@dataclass(frozen=True)
class _Check:
    """A comparison, on the device: nothing waits for it before all are read."""

    distance: Tensor
    norm: Tensor
    tolerance: float
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
        dtypes: Collection[torch.dtype],
        parts: Collection[Hashable] = (),
    ) -> None:
        """Compare the gradient of a parameter, as it arrives, with the sum over examples.

        Args:
            parameter: The parameter.
            gradient: Its gradient.
            total: The sum, flattened; None is zero.
            dtypes: The types of the gradients that made it.
            parts: What it came from, such as micro-batches; nothing where that is not known.
        """
        flat = gradient.detach().to_dense().flatten()
        wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
        difference = flat.to(wide) - (0 if total is None else total.to(wide))
        lowest = min([flat.dtype, *dtypes], key=lambda dtype: dtype.itemsize)
        tolerance = _TOLERANCES.get(lowest, _HALF_TOLERANCE)
        if flat.is_cuda and lowest == torch.float32:
            tolerance = _GPU_TOLERANCE
        norm = flat.to(wide).norm()
        self._checks[parameter].append(_Check(difference.norm(), norm, tolerance, parts))

    def keep(self, counted: Collection[Hashable]) -> None:
        """Drop the comparisons of what came from nothing that counts."""
        for parameter, checks in list(self._checks.items()):
            kept = [one for one in checks if not one.parts or any(p in counted for p in one.parts)]
            self._checks[parameter] = kept
            if not kept:
                del self._checks[parameter]

    def failed(self) -> dict[nn.Parameter, str]:
        """Return which parameters' gradients do not add up, and by how much."""
        total = self._total()
        failed = {}
        for parameter, check in self._each():
            distance, norm = float(check.distance), float(check.norm)
            allowed = check.tolerance * (norm + _ROUNDING * total)
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
