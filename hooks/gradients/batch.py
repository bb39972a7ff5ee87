"""Per-example gradients of one batch: a forward and a backward pass, and a rule per operation.

Only the gradients with respect to the outputs of operations are computed, none of a parameter
itself, and no `.grad` is touched. Where a value is computed from parameters alone, such as a
parametrized weight, its gradient is back-propagated to the parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from sonde.exceptions import InvalidInputError
from sonde.hooks.examples.axes import ExampleAxes, OutputAxes
from sonde.hooks.examples.probe import Inputs, call
from sonde.hooks.gradients.factors.dense import Dense, Factor
from sonde.hooks.gradients.factors.sums import summed
from sonde.hooks.gradients.rules.places import UnsupportedError, reason_of
from sonde.hooks.gradients.uses.operations import Operation, Use
from sonde.hooks.gradients.uses.stand_ins import GatheredValues, HeldParameters
from sonde.hooks.gradients.uses.uses import ParameterUses
from sonde.hooks.losses.coupled import couples
from sonde.hooks.losses.float64_heads import FLOAT64, Float64Heads
from sonde.hooks.losses.graphs import shown_loss
from sonde.hooks.losses.per_example import Loss, example_losses
from sonde.hooks.losses.saturation import Logits
from sonde.hooks.model.taps import tensor_leaves

# Gradients with respect to what is computed from parameters are taken on in blocks of this size.
_CHAIN_BYTES = 64 << 20


@dataclass
class BatchGradients:
    """The per-example gradients of a batch.

    Attributes:
        num_examples: The number of examples.
        factors: The gradients of each parameter that has some.
        problems: Why there are none, by parameter.
        couplings: What makes gradients of an example depend on the others.
        losses: The loss of each example, where it is known; [examples].
        ambiguous: The parameters for which sizes do not tell where the examples are.
        are_saturated: Which examples float32 would have saturated, [examples]; None if not known.
        head: The precision of the losses.
        shares: What rows were multiplied by to be those of the examples' own losses, [examples]; of
            a model that returns its loss, and None where its graph does not show how it is made.
        couples: The loss is seen to couple the examples.
        in_functions: Those that autograd functions use, where nothing is seen.
    """

    num_examples: int
    factors: dict[nn.Parameter, Factor] = field(default_factory=dict)
    problems: dict[nn.Parameter, str] = field(default_factory=dict)
    couplings: list[str] = field(default_factory=list)
    losses: Tensor | None = None
    ambiguous: set[nn.Parameter] = field(default_factory=set)
    are_saturated: Tensor | None = None
    head: str = FLOAT64
    shares: Tensor | None = None
    couples: bool = False
    in_functions: set[nn.Parameter] = field(default_factory=set)


def batch_gradients(
    model: nn.Module,
    loss: Loss | None,
    inputs: Inputs,
    targets: Tensor | None,
    num_examples: int,
    wanted: Iterable[nn.Parameter],
    held: HeldParameters,
    choices: Mapping[nn.Parameter, int] | None = None,
    output_axes: OutputAxes | None = None,
    *,
    holds_loss: bool = False,
) -> BatchGradients:
    """Compute the per-example gradients of a batch.

    Args:
        model: The model.
        loss: (outputs, targets) of a batch to a scalar; None where the model returns its loss.
        inputs: What the model is called with.
        targets: One target per example.
        num_examples: The number of examples.
        wanted: The parameters.
        held: What stands for the parameters of the model.
        choices: Which of `layouts.ORDERS` decides where the examples are, by parameter; else 0.
        output_axes: Tells where the examples are; by default along the first axis.
        holds_loss: See whether the loss couples the examples, which evaluates it once more.

    Raises:
        InvalidInputError: If the loss is no scalar, or the outputs have no row per example.
    """
    operations: list[Operation] = []
    edges: list[list[GradientEdge | None]] = []

    def take(operation: Operation, outputs: Sequence[Tensor]) -> None:
        # The edge, not the tensor: an in-place operation on the output does not move it.
        edges.append(
            [get_gradient_edge(root_of(out)) if out.requires_grad else None for out in outputs]
        )
        operations.append(operation)

    wanted = list(wanted)
    heads = Float64Heads()
    uses = ParameterUses(model, wanted, take, num_examples, held, choices, heads=heads)
    with torch.enable_grad():
        with uses:
            outputs = call(model, inputs)
        if uses.error is not None:
            raise uses.error
        if uses.hidden is not None:
            return _not_gone_through(uses, num_examples, wanted)
        total, losses, shares = _loss_of(loss, outputs, targets, num_examples, output_axes, heads)
        known = [edge for of_operation in edges for edge in of_operation if edge is not None]
        axes = output_axes or OutputAxes(ExampleAxes())
        # Where nothing else needs to know where the examples are, the model is not run for it.
        axes = axes if loss is not None else OutputAxes(axes.inputs)
        is_coupled = False
        if holds_loss and loss is not None and losses is not None:
            is_coupled = couples(loss, outputs, targets, losses, axes, heads)
        logits = Logits(outputs, num_examples, axes, heads)
        ends = [*known, *logits.edges] if known else []
        found = list(torch.autograd.grad(total, ends, allow_unused=True)) if ends else []
    result = BatchGradients(
        num_examples,
        couplings=uses.couplings,
        losses=None if losses is None else losses.detach(),
        ambiguous=uses.ambiguous,
        shares=shares,
        couples=is_coupled,
    )
    result.are_saturated = logits.are_saturated(found[len(known) :])
    del found[len(known) :]
    result.head = FLOAT64 if heads.refusal is None else f"as the model's outputs: {heads.refusal}"
    parts: dict[nn.Parameter, list[Factor]] = defaultdict(list)
    result.problems = dict(uses.problems)
    with torch.no_grad(), GatheredValues(model) as values:
        # From the last to the first, so that what an operation was given is let go of in turn.
        while operations:
            operation = operations.pop()
            values.gather(p for use in operation.uses for p in use.parameters)
            deltas = [None if edge is None else found.pop() for edge in reversed(edges.pop())]
            deltas.reverse()
            add_operation(operation, deltas, parts, result.problems)
    result.in_functions = set(uses.in_functions)
    for parameter in wanted:
        reason = _why_unseen(uses, parameter)
        if parameter not in parts or parameter in uses.in_functions:
            result.problems.setdefault(parameter, reason)
        if parameter not in result.problems:
            result.factors[parameter] = summed(parts[parameter])
    return result


def _not_gone_through(
    uses: ParameterUses, num_examples: int, wanted: Sequence[nn.Parameter]
) -> BatchGradients:
    """Return that no gradient is known, as going back would add to `.grad`."""
    reason = f"the autograd function {uses.hidden} goes back to parameters by itself"
    problems = {p: _why_unseen(uses, p) if p in uses.in_functions else reason for p in wanted}
    return BatchGradients(num_examples, problems=problems, in_functions=set(uses.in_functions))


def _why_unseen(uses: ParameterUses, parameter: nn.Parameter) -> str:
    """Return why no operation gave the gradients of a parameter."""
    if parameter in uses.in_functions:
        function = uses.in_functions[parameter]
        return (
            f"it is behind the autograd function {function}, for which `sonde.gradient_rule` "
            "takes a rule"
        )
    if parameter in uses.without_gradients:
        return "it ran without gradients, as under no_grad"
    return "it was never used in the forward pass"


def add_operation(
    operation: Operation,
    deltas: Sequence[Tensor | None],
    parts: dict[nn.Parameter, list[Factor]],
    problems: dict[nn.Parameter, str],
) -> None:
    """Add the gradients that an operation's parameters have of those of its outputs.

    Args:
        operation: The operation.
        deltas: The gradients with respect to its outputs; None where none came back.
        parts: What is added to, by parameter.
        problems: Why gradients of a parameter cannot be given.
    """
    if all(delta is None for delta in deltas):
        # No path from these outputs to the loss: the gradient is zero.
        deltas = [operation.uses[0].tensor.new_zeros(shape) for shape in operation.shapes]
    # What came back may be that of the tensor an output is a view of.
    deltas = [
        None if delta is None else delta.view(shape)
        for delta, shape in zip(deltas, operation.shapes, strict=True)
    ]
    for use in operation.uses:
        try:
            operation.check()
            factor = use.factor(deltas)
            for parameter, part in _at_parameters(use, factor):
                parts[parameter].append(part)
        except UnsupportedError as reason:
            for parameter in use.parameters:
                problems.setdefault(parameter, str(reason))
        except Exception as error:  # Whatever a user's operation makes fail, it is the reason.
            for parameter in use.parameters:
                problems.setdefault(parameter, f"{operation.name} fails: {reason_of(error)}")


def root_of(output: Tensor) -> Tensor:
    """Return the tensor whose place in the graph an in-place operation on an output keeps.

    On a view of a whole tensor, as a linear layer may return, it gives the view another place.
    """
    base = output._base
    if base is not None and base.numel() == output.numel():
        if base.is_contiguous() and output.is_contiguous() and base.requires_grad:
            return base
    return output


def loss_of_model(outputs: Any) -> Tensor:
    """Return the loss a model returns: a scalar, or what stands as `loss` in its output.

    Raises:
        InvalidInputError: If there is none.
    """
    value = getattr(outputs, "loss", None)
    leaves = dict(tensor_leaves(outputs))
    value = leaves.get("[loss]", value) if value is None else value
    if value is None and len(leaves) == 1:
        value = next(iter(leaves.values()))
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InvalidInputError(
            f"the model returned {type(outputs).__name__} without a scalar loss; give `loss`, or "
            "let it return its loss, or an output with `loss`"
        )
    return value.reshape(())


def _loss_of(
    loss: Loss | None,
    outputs: Any,
    targets: Tensor | None,
    num_examples: int,
    output_axes: OutputAxes | None,
    heads: Float64Heads,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the sum of the examples' losses, and each of them where it is known.

    Of a model that returns its loss, return what gradients are multiplied by on their way, too.
    """
    if loss is None:
        value = loss_of_model(outputs)
        shown = shown_loss(value, heads)
        # What a loss is divided by otherwise may depend on the examples, too.
        is_known = shown is not None and shown.scale == 1
        shares = shown.shares(num_examples) if shown is not None and is_known else None
        if shown is not None and shares is not None and bool((shares != 1).any()):
            shown.apply(shares)
        return value * num_examples, None, shares
    losses = example_losses(loss, outputs, targets, num_examples, output_axes, heads)
    return losses.sum(), losses, None


def _at_parameters(use: Use, factor: Factor) -> list[tuple[nn.Parameter, Factor]]:
    """Take the gradients of what a parameter was made into on to the parameter."""
    parameters = list(use.parameters)
    if isinstance(use.tensor, nn.Parameter):
        return [(parameters[0], factor)]
    row_bytes = max(1, use.tensor.nbytes) * (1 if use.row_axis is None else factor.num_examples)
    size = max(1, _CHAIN_BYTES // row_bytes)
    found: list[list[Tensor]] = [[] for _ in parameters]
    for start in range(0, factor.num_examples, size):
        rows = slice(start, min(start + size, factor.num_examples))
        formed = factor.form(rows)
        shape = use.tensor.shape
        if use.row_axis is not None:
            # The gradient of an example is in its own row of the tensor, and zero in the others.
            outer = formed.new_zeros(len(formed), *shape)
            by_row = outer.movedim(1 + use.row_axis, 1)
            example = torch.arange(len(formed), device=formed.device)
            by_row[example, rows.start + example] = formed.reshape(-1, *by_row.shape[2:])
            formed = outer
        formed = formed.reshape(len(formed), *shape).to(use.tensor.dtype)
        gradients = _taken_on(use.tensor, list(use.parameters.values()), formed)
        for part, gradient in zip(found, gradients, strict=True):
            part.append(gradient)
    return [(p, Dense(torch.cat(part))) for p, part in zip(parameters, found, strict=True)]


def _taken_on(
    tensor: Tensor, parameters: Sequence[nn.Parameter], gradients: Tensor
) -> Sequence[Tensor]:
    """Take gradients [n, *tensor] on to the parameters it was computed from, [n, *parameter]."""

    def back(of_tensor: Tensor, is_batched: bool) -> Sequence[Tensor]:
        return torch.autograd.grad(
            tensor,
            parameters,
            of_tensor,
            retain_graph=True,
            is_grads_batched=is_batched,
            materialize_grads=True,
        )

    with torch.enable_grad():
        try:
            return back(gradients, True)
        except Exception:  # Not every backward pass can be batched, such as one that is sparse.
            alone = [[g.to_dense() for g in back(row, False)] for row in gradients]
            return [torch.stack(rows) for rows in zip(*alone, strict=True)]
