"""Checks: per-example gradients held against those of examples that are run alone.

A rule sees what an operation saw, and cannot know what else happened: an axis that only looks like
the batch, examples that a normalization couples, a script that uses a weight unseen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sonde.hooks.examples.probe import Probe, call, device_of
from sonde.hooks.gradients.rules.places import reason_of
from sonde.hooks.gradients.uses.parameters import OwnedParameter
from sonde.hooks.gradients.uses.stand_ins import HeldParameters
from sonde.hooks.losses.coupled import COUPLED
from sonde.hooks.losses.float64_heads import Float64Heads
from sonde.hooks.losses.per_example import Loss, example_loss

from .batch import BatchGradients, loss_of_model

# How many examples are run alone, and how far off gradients may be, relative to their own norms:
# rounding differs between a batch and an example alone.
_NUM_CHECKED = 2
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 5e-3}
_HALF_TOLERANCE = 0.2
# On a GPU a float32 gradient may have been multiplied in TF32, which keeps 10 bits.
_GPU_TOLERANCE = 2e-2
# Gradients that cancel, such as those of a key's bias, are rounding alone. How large that is shows
# as the backward pass is run again from a loss that is multiplied by another number, divided out:
# every product is then rounded anew. The rounding of a batch has more terms and a forward pass of
# its own, hence some times that of the example.
_SEEDS = (0.7, 3.0)
_ROUNDING = 30
# Where an example alone cancels, perhaps to zero exactly: of the norm over all parameters, a
# fraction of the type's last digit. A gradient that is small but no rounding has no such floor.
_DIGITS = 1e-2


def differing(
    model: nn.Module,
    loss: Loss | None,
    probe: Probe,
    start: int,
    batch: BatchGradients,
    parameters: Sequence[OwnedParameter],
    held: HeldParameters,
    rows: Sequence[int] | None = None,
) -> dict[nn.Parameter, str]:
    """Return which parameters' gradients differ from those of examples alone, and why.

    Args:
        model: The model, in eval mode.
        loss: Its loss.
        probe: The examples.
        start: The first example of the batch in the probe.
        batch: The gradients of a batch of it.
        parameters: Those to check, each with gradients in the batch.
        held: What stands for the parameters of the model.
        rows: The examples that are run alone, counted from the first of the batch; by default two.
    """
    tensors = [parameter.tensor for parameter in parameters]
    # With sharded parameters no graph reaches those; the layers' own were seen in the batch.
    of_layers = [held.held_for(tensor) for tensor in tensors]
    differ: dict[nn.Parameter, str] = {}
    has_gradients = False
    for row in _checked_rows(batch) if rows is None else rows:
        try:
            alone = _Alone(model, loss, probe, start + row, of_layers)
        except Exception as error:  # Whatever a model does to a batch of one, it is the reason.
            reason = f"one example alone fails: {reason_of(error)}"
            return dict.fromkeys(tensors, reason)
        has_gradients |= alone.norm > 0
        for at, tensor in enumerate(tensors):
            formed = batch.factors[tensor].form(slice(row, row + 1))[0].double()
            if not alone.fits(at, formed):
                differ.setdefault(tensor, _why(loss, batch, formed, alone.gradients[at].double()))
    if differ and loss is None and not has_gradients:
        # Zero for an example alone, and not in the batch: it is compared with the others.
        return dict.fromkeys(tensors, f"{COUPLED}: that of one example alone has no gradient")
    return differ


def weighing(
    model: nn.Module,
    probe: Probe,
    start: int,
    batch: BatchGradients,
    parameters: Sequence[OwnedParameter],
    held: HeldParameters,
) -> dict[nn.Parameter, str]:
    """Return why no row is known to be of its example's own loss, where examples weigh unlike.

    Of a model that returns its loss, and does not show how it is made of those of the examples,
    each example is run alone. What they weigh is the same for all parameters, so that gradients of
    one, the largest, tell it of all.

    Args:
        model: The model, which returns its loss.
        probe: The examples.
        start: The first example of the batch in the probe.
        batch: The gradients of a batch of it.
        parameters: Those to check, each with gradients in the batch.
        held: What stands for the parameters of the model.
    """
    first = slice(0, 1)
    largest = max(parameters, key=lambda p: float(batch.factors[p.tensor].form(first).norm()))
    rows = range(batch.num_examples)
    differ = differing(model, None, probe, start, batch, [largest], held, rows)
    reasons = list(differ.values())
    return dict.fromkeys((p.tensor for p in parameters), reasons[0]) if reasons else {}


def _checked_rows(batch: BatchGradients) -> list[int]:
    number = min(_NUM_CHECKED, batch.num_examples)
    if batch.shares is not None:
        # Where examples weigh unlike, those that weigh most and least.
        order = batch.shares.argsort().tolist()
        return sorted({order[0], order[-1]} if number > 1 else {order[0]})
    # Gradients are largest, and rounding matters least, where the loss is.
    losses = torch.zeros(batch.num_examples, device="cpu") if batch.losses is None else batch.losses
    largest: list[int] = losses.nan_to_num().topk(number).indices.tolist()
    return largest


def _why(loss: Loss | None, batch: BatchGradients, formed: Tensor, exact: Tensor) -> str:
    if batch.couplings:
        return (
            f"the gradient of one example alone differs: {batch.couplings[0]} couple the examples"
        )
    size = float(formed.norm() * exact.norm())
    if loss is None and size > 0 and float(formed @ exact) > (1 - 1e-4) * size:
        return "the loss is a mean over something other than examples, such as labelled tokens"
    return "the gradient of one example alone differs"


class _Alone:
    """The gradients of one example, run in a batch of its own.

    Attributes:
        gradients: Those of each parameter, flattened.
        norm: Their norm over all parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        probe: Probe,
        row: int,
        tensors: Sequence[nn.Parameter],
    ) -> None:
        self._tensors = tensors
        self._roundings: list[float] | None = None
        with torch.enable_grad():
            self._value = loss_alone(model, loss, probe, row)
        self.gradients = self._from(1.0)
        self.norm = sum(float((of.double() ** 2).sum()) for of in self.gradients) ** 0.5

    def fits(self, at: int, formed: Tensor) -> bool:
        """Return whether a gradient of a batch is that of the example, but for rounding."""
        exact = self.gradients[at]
        dtype = exact.dtype
        tolerance = _TOLERANCES.get(dtype, _HALF_TOLERANCE)
        if exact.is_cuda and dtype == torch.float32:
            tolerance = _GPU_TOLERANCE
        distance = float((formed - exact.double()).norm())
        norm = float(exact.double().norm())
        allowed = tolerance * norm
        # Where the loss itself has diverged, both are no numbers, and nothing can be compared.
        if distance <= allowed or not bool(exact.isfinite().all()):
            return True
        rounding = _ROUNDING * self._rounding(at)
        allowed += rounding
        if norm <= rounding:
            allowed += _DIGITS * torch.finfo(dtype).eps * self.norm
        return distance <= allowed

    def _rounding(self, at: int) -> float:
        if self._roundings is None:
            again = [self._from(seed) for seed in _SEEDS]
            self._roundings = [
                max(float((of[i].double() - exact.double()).norm()) for of in again)
                for i, exact in enumerate(self.gradients)
            ]
        return self._roundings[at]

    def _from(self, seed: float) -> list[Tensor]:
        gradients = torch.autograd.grad(
            self._value,
            self._tensors,
            torch.full_like(self._value, seed),
            allow_unused=True,
            retain_graph=True,
        )
        return [
            (torch.zeros_like(t) if g is None else g / seed).detach().to_dense().flatten()
            for g, t in zip(gradients, self._tensors, strict=True)
        ]


def loss_alone(model: nn.Module, loss: Loss | None, probe: Probe, row: int) -> Tensor:
    """Return the loss of one example, run in a batch of its own."""
    inputs, targets = probe.rows(slice(row, row + 1), device_of(model))
    with Float64Heads() as heads:
        outputs = call(model, inputs)
    if loss is None:
        return loss_of_model(outputs)
    return example_loss(loss, outputs, targets, heads).sum()
