"""Steps of a training without a `torch.optim` optimizer: seen by the weights, which change."""

from __future__ import annotations

import torch
from torch import nn

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
        self._values = [parameter.detach().clone() for parameter in self._watched]

    def has_stepped(self) -> bool:
        """Return whether a weight has changed since the last time this was asked."""
        pairs = zip(self._watched, self._values, strict=True)
        if all(torch.equal(parameter.detach(), value) for parameter, value in pairs):
            return False
        self._values = [parameter.detach().clone() for parameter in self._watched]
        return True
