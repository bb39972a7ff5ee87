"""Arrivals: which passes' gradients are in `.grad` when an optimizer steps.

A gradient that has come back need not count: a GradScaler skips the update, a loop drops a batch
that is not finite, the loss of a GAN's generator leaves gradients in the discriminator. They are
set to None, or to zero, before others arrive or before the step. So as a gradient arrives at a
parameter, and at the step, it is looked whether what came earlier is still there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

_Part = TypeVar("_Part")


@dataclass
class _Arrival(Generic[_Part]):
    """A gradient that was added to a parameter's.

    Attributes:
        parts: What it came from.
        before: Whether the parameter's gradient had an entry that is not zero, on the device; None
            where it was None, True where nothing came before.
        own: The same of this one alone.
        version: That of the parameter.
        has_changed: The parameter has changed since the arrival before.
        is_accumulated: It was added to the parameter's gradient.
    """

    parts: Sequence[_Part]
    before: Tensor | bool | None
    own: Tensor | None
    version: int
    has_changed: bool = False
    is_accumulated: bool = False


class Arrivals(Generic[_Part]):
    """The gradients that have arrived at parameters, in their order."""

    def __init__(self) -> None:
        self._arrivals: dict[nn.Parameter, list[_Arrival[_Part]]] = defaultdict(list)

    def add(self, parameter: nn.Parameter, gradient: Tensor, parts: Sequence[_Part]) -> None:
        """Add a gradient that will be added to a parameter's, unless it is only asked for.

        Args:
            parameter: The parameter.
            gradient: What arrives.
            parts: What it comes from.
        """
        earlier = self._accumulated(parameter)
        before: Tensor | bool | None = _has_any(parameter.grad) if earlier else True
        has_changed = bool(earlier) and earlier[-1].version != parameter._version
        own = _has_any(gradient)
        arrival = _Arrival(parts, before, own, parameter._version, has_changed)
        self._arrivals[parameter] = [*earlier, arrival]

    def note_accumulated(self, parameter: nn.Parameter) -> None:
        """Note that the latest gradient was added; `torch.autograd.grad` only hands it out."""
        for arrival in self._arrivals[parameter][-1:]:
            arrival.is_accumulated = True

    def _accumulated(self, parameter: nn.Parameter) -> list[_Arrival[_Part]]:
        return [arrival for arrival in self._arrivals[parameter] if arrival.is_accumulated]

    def kept(self, updated: Collection[nn.Parameter]) -> dict[nn.Parameter, list[_Part]]:
        """Return what the gradient of each parameter is made of now, that at least one came to.

        Args:
            updated: The parameters that are updated next; the gradients of others may have been
                used, and are not looked at.
        """
        found = {p: of for p in list(self._arrivals) if (of := self._accumulated(p))}
        now = {p: _has_any(p.grad) for p in found if p in updated}
        arrivals = [arrival for of in found.values() for arrival in of]
        flags = [*now.values(), *(a.before for a in arrivals), *(a.own for a in arrivals)]
        known = _read([flag for flag in flags if isinstance(flag, Tensor)])
        kept = {}
        for parameter, of_parameter in found.items():
            parts: list[_Part] = []
            had_any = False
            for arrival in of_parameter:
                # Weights that changed meanwhile were updated by another optimizer, which has used
                # the gradient; but not those that the attached one is still to update.
                is_used = arrival.has_changed and parameter not in updated
                if not is_used and _is_lost(arrival.before, had_any, known):
                    parts, had_any = [], False
                parts += arrival.parts
                had_any = had_any or known[id(arrival.own)]
            if _is_lost(now.get(parameter, True), had_any, known):
                parts = []
            kept[parameter] = parts
        return kept

    def came_to(self, parameters: Iterable[nn.Parameter]) -> set[_Part]:
        """Return everything that a gradient has come from to some of these parameters."""
        arrivals = [arrival for p in parameters for arrival in self._accumulated(p)]
        return {part for arrival in arrivals for part in arrival.parts}


def _is_lost(flag: Tensor | bool | None, had_any: bool, known: dict[int, bool]) -> bool:
    """Tell whether a gradient is gone; one that is zero may have been so all the time."""
    return flag is None or (isinstance(flag, Tensor) and had_any and not known[id(flag)])


def _has_any(gradient: Tensor | None) -> Tensor | None:
    """Return whether a gradient has an entry that is not zero, on its device; None has none."""
    if gradient is None:
        return None
    values = gradient._values() if gradient.is_sparse else gradient
    return values.detach().any()


def _read(flags: Sequence[Tensor]) -> dict[int, bool]:
    """Return the values of flags by identity, waiting for each device once."""
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for flag in flags:
        by_device[flag.device].append(flag)
    return {
        id(flag): value
        for of_device in by_device.values()
        for flag, value in zip(of_device, torch.stack(of_device).tolist(), strict=True)
    }
