"""Operations of a forward pass that use parameters, and what their gradients take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sonde.hooks.gradients.factors.dense import Factor
from sonde.hooks.gradients.rules.places import Deltas, Place, UnsupportedError


@dataclass(frozen=True)
class Use:
    """A use of a parameter, or of something computed from parameters alone.

    Attributes:
        tensor: The parameter, or what was computed.
        parameters: The parameters of the model it was computed from, each with what its layer held
            of it, which is itself unless it is sharded.
        factor: Makes the gradients with respect to the tensor of those to the outputs.
        row_axis: The axis along which the tensor has a row for each example, whose gradient is in
            its own row; None where it has none.
    """

    tensor: Tensor
    parameters: Mapping[nn.Parameter, nn.Parameter]
    factor: Callable[[Deltas], Factor]
    row_axis: int | None = None


@dataclass(frozen=True)
class Operation:
    """An operation that uses parameters.

    Attributes:
        name: Its name.
        shapes: The shapes of its outputs, which themselves are not kept.
        uses: The parameters it uses.
        inputs: What it was given beside them, each with its version at that time.
        places: Where the examples may be, by sizes; None where its arguments tell it.
    """

    name: str
    shapes: list[torch.Size]
    uses: list[Use]
    inputs: list[tuple[Tensor, int]]
    places: list[Place] | None = None

    @property
    def is_gathered(self) -> bool:
        """Whether its parameters are sharded, and were gathered for the time of the operation."""
        return any(p is not held for use in self.uses for p, held in use.parameters.items())

    def check(self) -> None:
        """Refuse inputs that are not what they were.

        Raises:
            UnsupportedError: If one was changed in place.
        """
        if any(tensor._version != version for tensor, version in self.inputs):
            raise UnsupportedError(f"an input of {self.name} was changed in place after the call")
