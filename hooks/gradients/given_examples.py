"""Examples as a model is given them, which it may change in place."""

from __future__ import annotations

from torch import Tensor, nn

from sonde.hooks.examples.probe import Inputs, Probe, device_of
from sonde.hooks.model.random_states import RandomStates
from sonde.hooks.model.taps import tensor_leaves


class GivenExamples:
    """Some examples of a probe.

    Args:
        model: The model they are for.
        probe: The probe.
        rows: Which of them.
        random_states: Seeded alike whenever they are given.
    """

    def __init__(
        self, model: nn.Module, probe: Probe, rows: slice, random_states: RandomStates
    ) -> None:
        self.probe = probe
        self.rows = rows
        self.num_examples = rows.stop - rows.start
        self._device = device_of(model)
        self._random_states = random_states
        self._next: tuple[Inputs, Tensor | None] | None = probe.rows(rows, self._device)
        self.shapes = tuple((name, leaf.shape) for name, leaf in tensor_leaves(self._next[0]))

    def first(self, number: int) -> Inputs:
        """Return the inputs of the first of them."""
        rows = slice(self.rows.start, min(self.rows.start + number, self.rows.stop))
        return self.probe.rows(rows, self._device)[0]

    def take(self) -> tuple[Inputs, Tensor | None]:
        """Return (inputs, targets), never the same tensors twice."""
        taken, self._next = self._next or self.probe.rows(self.rows, self._device), None
        self.seed(self.rows.start)
        return taken

    def seed(self, example: int) -> None:
        """Let the model draw what it draws for a batch that begins with an example of the probe."""
        self._random_states.seed(example)
