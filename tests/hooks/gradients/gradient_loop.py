"""The slow truth about per-example gradients: one backward pass per example, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sonde
from sonde.hooks import ExampleGradientResult
from sonde.hooks.examples.probe import Inputs, call
from sonde.hooks.losses.per_example import Loss

# Both sides are float64: what is left is the rounding of sums in another order.
TOLERANCE = 1e-10

SETTINGS = settings(max_examples=25)


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs.tanh(), targets)


def sum_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs.tanh(), targets, reduction="sum")


LOSSES = st.sampled_from([mean_loss, sum_loss])


def map_inputs(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    if isinstance(inputs, dict):
        return {name: function(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(function(value) for value in inputs)
    return function(inputs)


def as_double(inputs: Inputs) -> Inputs:
    return map_inputs(inputs, lambda x: x.double() if x.is_floating_point() else x)


def num_examples_of(inputs: Inputs) -> int:
    leaves: list[Tensor] = []
    map_inputs(inputs, lambda x: leaves.append(x) or x)  # type: ignore[func-returns-value] # append
    return len(leaves[0])


def loop_gradients(
    model: nn.Module, loss: Loss, inputs: Inputs, targets: Tensor
) -> dict[str, Tensor]:
    """The gradients of each parameter, [examples, *parameter]; the model is in eval mode."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for row in range(len(targets)):
        at = slice(row, row + 1)
        with torch.backends.cudnn.flags(enabled=False):  # Its recurrent layers refuse eval mode.
            outputs = call(model, map_inputs(inputs, lambda x: x[at].clone()))  # noqa: B023 # now
            gradients = torch.autograd.grad(
                loss(outputs, targets[at]), list(named.values()), allow_unused=True
            )
        for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
            dense = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            found[name].append(dense.detach())
    return {name: torch.stack(rows) for name, rows in found.items()}


def rows_of(gradients: dict[str, Tensor]) -> Tensor:
    """The gradients of all parameters as one row per example."""
    return torch.cat([g.reshape(len(g), -1) for g in gradients.values()], 1)


def assert_same_gradients(
    result: ExampleGradientResult, expected: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """Each gradient agrees, relative to the norm of its example's gradient over all parameters."""
    expected = {name: gradients.cpu() for name, gradients in expected.items()}
    norms = rows_of(expected).norm(dim=1)
    assert list(result.parameters) == list(expected)
    for name, gradients in expected.items():
        actual = result.parameters[name].double()
        assert actual.shape == gradients.shape, name
        error = rows_of({name: actual - gradients}).norm(dim=1) / (norms + 1e-30)
        assert float(error.max()) < tolerance, name
    assert float(((result.norms - norms).abs() / (norms + 1e-30)).max()) < tolerance


def assert_same_gram(
    gram: Tensor | None,
    expected: dict[str, Tensor],
    others: dict[str, Tensor] | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Inner products agree, relative to the norms of the two gradients."""
    assert gram is not None
    rows = rows_of(expected).cpu()
    columns = rows if others is None else rows_of(others).cpu()
    scale = rows.norm(dim=1)[:, None] * columns.norm(dim=1) + 1e-30
    assert gram.shape == scale.shape
    assert float(((gram - rows @ columns.T).abs() / scale).max()) < tolerance


def targets_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Targets of the shape of the model's output."""
    with torch.no_grad():
        outputs = call(model, map_inputs(inputs, torch.clone))
    generator = torch.Generator().manual_seed(0)
    return torch.rand(outputs.shape, generator=generator, dtype=torch.float64) * 2 - 1


def kinds(result: ExampleGradientResult) -> dict[str, str]:
    """What is not `exact` or `frozen`, and why."""
    return {k: v for k, v in result.coverage.items() if v not in ("exact", "frozen")}


def check_exact(
    model: nn.Module,
    inputs: Any,
    loss: Loss = sum_loss,
    targets: Tensor | None = None,
    *,
    batch_size: int | None = None,
) -> None:
    """Every parameter is covered by a rule, formed and as inner products, as the loop has it."""
    model = model.cpu().double().eval()  # Some tests share a layer.
    inputs = as_double(inputs)
    if targets is None:
        targets = targets_of(model, inputs)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        given = map_inputs(inputs, lambda x: x.to(device))  # noqa: B023 # used now
        _check_exact(model.to(device), given, loss, targets.to(device), batch_size)


def _check_exact(
    model: nn.Module, inputs: Inputs, loss: Loss, targets: Tensor, batch_size: int | None
) -> None:
    full = sonde.example_gradients(
        model, loss, inputs, targets, store=sonde.Full(), batch_size=batch_size
    )
    assert kinds(full) == {}, kinds(full)
    gram = sonde.example_gradients(model, loss, inputs, targets, batch_size=batch_size)
    expected = loop_gradients(model, loss, inputs, targets)
    assert_same_gradients(full, expected)
    assert_same_gram(gram.total, expected)
