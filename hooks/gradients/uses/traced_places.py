"""Traced places: find each example's rows in an operation's output by swapping examples.

Sizes alone do not show how 12 rows belong to 4 examples: 3 consecutive rows each, in turn, or in
some other order; and the sum over all examples is right in any case. So the model is run on a few
examples of a batch, and again with each of them replaced by another: the rows that change belong to
that example.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sonde.hooks.examples.probe import undisturbed
from sonde.hooks.examples.rows import (
    NUM_EXCHANGED,
    RowOrder,
    changed_entries,
    changed_examples,
    unlike,
)
from sonde.hooks.gradients.rules.places import Place, reason_of
from sonde.hooks.model.precision import as_outside
from sonde.hooks.model.state import MadeParametersError
from sonde.hooks.model.taps import map_tensors, tensor_leaves

from .operations import Operation
from .stand_ins import HeldParameters
from .uses import ParameterUses

Places: TypeAlias = Mapping[nn.Parameter, Collection[Place]]
"""Where the examples may be in what operations make of a parameter; nowhere, if it is empty."""


@dataclass(frozen=True)
class Trace:
    """What was seen in a run on a few examples, in eval mode.

    Attributes:
        places: The places by parameter: none where rows are in an order of their own, several where
            it is used in several ways, or nothing has changed.
        num_reorderings: How often rows of examples were taken in an order that values tell.
    """

    places: Places
    num_reorderings: int

    @property
    def holds_for_others(self) -> bool:
        """Whether another batch of the same shapes shows the same."""
        # Weights that are zero as yet may have hidden what would change.
        are_clear = all(len(of_parameter) < 2 for of_parameter in self.places.values())
        return are_clear and not self.num_reorderings


# Of how many kinds of batches places are kept.
_NUM_KEPT = 64


class TraceError(Exception):
    """A model cannot be traced; the text says why."""


class NotYetError(TraceError):
    """This batch shows nothing, but a later one may."""


@dataclass(frozen=True)
class _Use:
    """What an operation made of a parameter, and where its examples may be by sizes."""

    places: list[Place]
    output: Tensor


@dataclass(frozen=True)
class _Run:
    """What operations made of each parameter, in their order; and how often rows were reordered."""

    uses: dict[nn.Parameter, list[_Use]]
    num_reorderings: int


# Or why they cannot be found; not as an error, whose traceback holds the batch and the model.
_seen: WeakKeyDictionary[nn.Module, dict[Hashable, Trace | str]] = WeakKeyDictionary()


def trace_of(
    model: nn.Module,
    wanted: Collection[nn.Parameter],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    size: int,
    batch_dim: int,
) -> Trace:
    """Return what was traced before for such arguments, or trace them.

    Raises:
        NotYetError: If it is not possible as yet.
        TraceError: If that is not possible.
    """
    given = _signature((args, dict(kwargs)), size, batch_dim)
    key = (batch_dim, given, frozenset(id(parameter) for parameter in wanted))
    seen = _seen.setdefault(model, {})
    found = seen.get(key)
    if isinstance(found, str):
        raise TraceError(found)
    if found is not None:
        return found
    if len(seen) >= _NUM_KEPT:  # Batches of sequences may have a shape of their own each.
        seen.pop(next(iter(seen)))
    try:
        trace = _trace(model, wanted, args, kwargs, size, batch_dim)
    except NotYetError:
        raise
    except TraceError as error:
        seen[key] = str(error)
        raise
    if trace.holds_for_others:
        seen[key] = trace
    return trace


def _signature(value: Any, size: int, batch_dim: int) -> Hashable:
    """Return what tells apart arguments for which a model may do other things."""
    if isinstance(value, Tensor):
        return (value.dtype, *_few(value, size, batch_dim).shape)
    if isinstance(value, dict):
        return tuple((key, _signature(item, size, batch_dim)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_signature(item, size, batch_dim) for item in value)
    return (type(value), repr(value))


def _trace(
    model: nn.Module,
    wanted: Collection[nn.Parameter],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    size: int,
    batch_dim: int,
) -> Trace:
    """Run a model on a few examples of a batch, and see which rows are whose.

    Args:
        model: The model; it is left as it was.
        wanted: The parameters whose operations are traced.
        args: What the model is called with.
        kwargs: The same, by name.
        size: The number of examples.
        batch_dim: The axis of its inputs that holds them.

    Raises:
        NotYetError: If the examples are alike, or the model has not made its parameters.
        TraceError: If nothing it is called with holds the examples, it fails on a few of them, or
            it couples them, so that all rows change.
    """
    given = [*args, *kwargs.values()]
    held = [tensor for _, tensor in tensor_leaves(given) if _is_held(tensor, size, batch_dim)]
    if not held:
        raise TraceError(f"nothing it is called with has the {size} examples along one axis")
    few = min(size, NUM_EXCHANGED)
    stand_ins = [_unlike(held, example, batch_dim) for example in range(few)]
    autocast = as_outside(held[0].device.type)

    def run(num: int, exchanged: Collection[int]) -> _Run:
        def some(tensor: Tensor) -> Tensor:
            if not _is_held(tensor, size, batch_dim):
                return tensor.detach().clone()
            taken = tensor.detach().narrow(batch_dim, 0, num).clone()
            for example in exchanged:
                other = tensor.detach().select(batch_dim, stand_ins[example])
                taken.select(batch_dim, example).copy_(other)
            return taken

        few_args, few_kwargs = map_tensors(args, some), map_tensors(dict(kwargs), some)
        return _run(model, wanted, num, autocast, lambda: model(*few_args, **few_kwargs))

    def seen(num: int, groups: Iterable[Collection[int]]) -> Trace:
        base = run(num, ())
        fitting = {p: [set(use.places) for use in uses] for p, uses in base.uses.items()}
        for exchanged in groups:
            others = run(num, exchanged).uses
            for parameter, uses in base.uses.items():
                for at, places in enumerate(fitting[parameter]):
                    places &= _fitting(uses, others.get(parameter, []), at, exchanged, num)
        found = {p: set[Place]().union(*of) if all(of) else set() for p, of in fitting.items()}
        return Trace(found, base.num_reorderings)

    try:
        trace = seen(few, [[example] for example in range(few)])
        if not trace.num_reorderings or size == few:
            return trace
        # A few examples do not speak for all: each has a code, and half of them are exchanged at
        # once, those with a bit of it and those without.
        stand_ins = [_unlike(held, example, batch_dim) for example in range(size)]
        bits = [[bool(n >> bit & 1) for n in range(size)] for bit in range((size - 1).bit_length())]
        halves = [
            [n for n in range(size) if of[n] is side] for of in bits for side in (True, False)
        ]
        of_all = seen(size, halves)
    except TraceError:
        raise
    except MadeParametersError as error:
        raise NotYetError(str(error)) from error
    except Exception as error:
        raise TraceError(f"it fails on some of its examples: {reason_of(error)}") from error
    places = {
        parameter: {place for place in of_few if place in of_all.places.get(parameter, ())}
        for parameter, of_few in trace.places.items()
    }
    return Trace(places, trace.num_reorderings)


def _unlike(held: Sequence[Tensor], example: int, batch_dim: int) -> int:
    """Return another example that differs from one; from the end, so that it is none of the first.

    Raises:
        NotYetError: If a few of them are no others; most batches have no two that are alike.
    """
    other = unlike([(tensor.detach(), batch_dim) for tensor in held], example)
    if other is None:
        raise NotYetError("its examples are alike")
    return other


def _few(tensor: Tensor, size: int, batch_dim: int) -> Tensor:
    """Return the first examples, where a tensor holds them."""
    if not _is_held(tensor, size, batch_dim):
        return tensor.detach()
    return tensor.detach().narrow(batch_dim, 0, min(size, NUM_EXCHANGED))


def _is_held(tensor: Tensor, size: int, batch_dim: int) -> bool:
    return tensor.ndim > batch_dim and tensor.shape[batch_dim] == size


def _run(
    model: nn.Module,
    wanted: Collection[nn.Parameter],
    num_examples: int,
    autocast: AbstractContextManager[Any],
    call: Callable[[], object],
) -> _Run:
    """Return what operations make of parameters.

    Raises:
        TraceError: If one couples the examples.
        Exception: What the model raises.
    """
    found: dict[nn.Parameter, list[_Use]] = defaultdict(list)

    def take(operation: Operation, outputs: Sequence[Tensor]) -> None:
        if operation.places is None:
            return
        made = _Use(operation.places, outputs[0].detach().clone())
        for parameter in {parameter for use in operation.uses for parameter in use.parameters}:
            found[parameter].append(made)

    with undisturbed(model), torch.no_grad(), autocast:
        held = HeldParameters(model)
        uses = ParameterUses(model, wanted, take, num_examples, held, needs_graph=False)
        with uses:
            call()
    if uses.error is not None:
        raise uses.error
    if uses.couplings:
        raise TraceError(f"{uses.couplings[0]} couple its examples")
    return _Run(found, uses.num_reorderings)


def _fitting(
    uses: Sequence[_Use],
    others: Sequence[_Use],
    at: int,
    exchanged: Collection[int],
    num: int,
) -> set[Place]:
    """Return the places of a use at which only entries of exchanged examples have changed."""
    use = uses[at]
    if len(others) != len(uses) or others[at].output.shape != use.output.shape:
        # Which rows there are, as of experts, depends on the examples; but where there is only one
        # place for them in each run, they may just have other lengths.
        places = set(use.places).intersection(*(other.places for other in (*uses, *others)))
        return places if others and len(places) == 1 else set()
    changed = changed_entries(use.output, others[at].output)
    return {place for place in use.places if _fits(place, changed, exchanged, num)}


def _fits(place: Place, changed: Tensor, exchanged: Collection[int], num: int) -> bool:
    """Tell whether only entries changed that are exchanged examples' at a place."""
    if place is Place.SECOND:
        found = set(changed.any(0).nonzero().flatten().tolist())
    else:
        # Of one row for each example both orders are the same.
        order = RowOrder.IN_TURN if place is Place.INNER else RowOrder.TOGETHER
        found = changed_examples(changed.any(1), num, order)
    return found <= set(exchanged)
