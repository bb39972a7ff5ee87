"""Steps that no optimizer tells of: seen by the weights, which change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The smallest ones: biases, which change whenever anything does.
_NUM_WATCHED = 4


class HandSteps:
    """Tells whether a model's weights have changed.

    Writing to `parameter.data` counts up no version, so that values have to be compared.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = [
            p
            for p in model.parameters()
            if p.requires_grad and not isinstance(p, nn.UninitializedParameter)
        ]
        self._watched = sorted(trained, key=lambda parameter: parameter.numel())[:_NUM_WATCHED]
        self._values = [_own_part(parameter).clone() for parameter in self._watched]

    def has_stepped(self) -> bool:
        """Return whether a weight has changed since the last time this was asked."""
        pairs = zip(self._watched, self._values, strict=True)
        if all(torch.equal(_own_part(parameter), value) for parameter, value in pairs):
            return False
        self._values = [_own_part(parameter).clone() for parameter in self._watched]
        return True


def _own_part(parameter: nn.Parameter) -> Tensor:
    """Return what this rank holds of a parameter: to compare all of it takes all ranks."""
    own = parameter.detach()
    return own.to_local() if hasattr(own, "to_local") else own
