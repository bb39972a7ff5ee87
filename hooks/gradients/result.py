"""What per-example gradients of a set of examples are returned as."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sonde.hooks.losses.float64_heads import FLOAT64


@dataclass
class ExampleGradientResult:
    """Per-example gradients, in the form that a store keeps.

    The gradient of an example is that of its own loss, not divided by the number of examples.

    Attributes:
        total: Over all covered parameters: of `Gram` float64 [examples, examples], or with `others`
            [examples, others]; of `Sketch` [examples, dim]; of `Full` None.
        layers: The same for each layer that owns parameters; empty of `Full`.
        parameters: Of `Full`, the gradients of each parameter, [examples, *parameter].
        norms: The norm of each example's gradient over all covered parameters, float64 [examples].
        layer_norms: The same for each layer.
        coverage: For each parameter `exact`, `fallback: why`, `frozen`, or `unsupported: why`.
        head: The precision of the losses: `float64`, or that of the outputs and why.
        saturated: The examples whose gradient float32 would have rounded at the head, bool
            [examples]; None where it is not known, as of parameters by the fallback alone.
    """

    total: Tensor | None = None
    layers: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    norms: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    layer_norms: dict[str, Tensor] = field(default_factory=dict)
    coverage: dict[str, str] = field(default_factory=dict)
    head: str = FLOAT64
    saturated: Tensor | None = None

    def __repr__(self) -> str:
        kinds = [kind.partition(":")[0] for kind in self.coverage.values()]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        num_layers = len(self.layer_norms)
        return (
            f"<gradients of {len(self.norms)} examples, {num_layers} layers; parameters: {counts}>"
        )
