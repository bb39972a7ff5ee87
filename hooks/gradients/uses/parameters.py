"""Parameters of a model, with every place that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from sonde.hooks.model.layers import layers_of

UNSUPPORTED = "unsupported: "
"""How coverage of a parameter begins that has no gradients; what follows is why."""


@dataclass(frozen=True, eq=False)
class OwnedParameter:
    """A parameter and everywhere it stands.

    Attributes:
        tensor: The parameter.
        places: (layer, name) pairs; of a tied parameter several.
    """

    tensor: nn.Parameter
    places: list[tuple[str, str]]

    @cached_property
    def names(self) -> list[str]:
        """Its name at each place."""
        return [f"{layer}.{name}" if layer else name for layer, name in self.places]

    @cached_property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]

    @property
    def excluded(self) -> str | None:
        """Why it has no gradients, as coverage says it; None if it may have some."""
        if not self.tensor.requires_grad:
            return "frozen"
        if self.tensor.is_complex():
            return (
                f"{UNSUPPORTED}it is complex; keep it real, and make it complex by view_as_complex"
            )
        return None

    @property
    def layer(self) -> str:
        """The layer that owns it first."""
        return self.places[0][0]


def owned_parameters(
    model: nn.Module, selected: Mapping[str, nn.Module] | None = None
) -> list[OwnedParameter]:
    """Return the parameters of some layers, or of all, each with all its places in the model."""
    found: dict[nn.Parameter, OwnedParameter] = {}
    for layer, module in layers_of(model).items():
        # Not named_parameters, which lists a tied parameter once.
        for name, tensor in module._parameters.items():
            if tensor is not None:
                found.setdefault(tensor, OwnedParameter(tensor, [])).places.append((layer, name))
    return [
        parameter
        for parameter in found.values()
        if selected is None or any(layer in selected for layer, _ in parameter.places)
    ]
