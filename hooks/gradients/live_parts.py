"""What is held of a step of the training while its backward pass goes on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor

from sonde.hooks.gradients.factors.dense import Factor
from sonde.hooks.gradients.uses.operations import Operation
from sonde.hooks.training.micro_batches import MicroBatch

from .sum_checks import Terms


@dataclass(eq=False)
class Seen:
    """An operation of a pass, with the gradients that have come back to its outputs."""

    operation: Operation
    micro_batch: MicroBatch
    deltas: list[Tensor | None]
    is_used: bool = False

    @property
    def has_deltas(self) -> bool:
        """Whether any have."""
        return any(delta is not None for delta in self.deltas)

    def terms(self) -> Terms:
        """Return what is added up to the gradients of the operation's parameters."""
        deltas = [delta for delta in self.deltas if delta is not None]
        return Terms(deltas, [x for x, _ in self.operation.inputs])


@dataclass
class Held:
    """The gradients of a parameter in one micro-batch: as factors, or what is kept of them."""

    factor: Factor | None
    values: Tensor | None = None
    squares: Tensor | None = None


@dataclass
class Gradients:
    """What is known of one parameter in a step."""

    parts: dict[MicroBatch, list[Factor]] = field(default_factory=lambda: defaultdict(list))
    held: dict[MicroBatch, Held] = field(default_factory=dict)
