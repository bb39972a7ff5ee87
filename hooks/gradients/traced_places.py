"""Traced places: which rows of an operation's output are whose, as an exchanged example shows.

Sizes do not tell whether 12 rows are 3 of each of 4 examples, one behind the other, or in turn, or
in an order of their own; and the sum over all examples is right in any case. So a model is run on a
few examples of a batch, and again with each of them exchanged for another: the rows that change are
its rows.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sonde.hooks.precision import as_outside
from sonde.hooks.probes import undisturbed
from sonde.hooks.taps import map_tensors, tensor_leaves

from .held_parameters import HeldParameters
from .layouts import Place, reason_of
from .parameter_uses import Operation, ParameterUses

Places: TypeAlias = Mapping[nn.Parameter, Collection[Place]]
"""Where the examples may be in what operations make of a parameter; nowhere, if it is empty."""

# How many examples are exchanged, in turn; how many are looked at for one that is unlike another;
# and of how many kinds of batches places are kept.
NUM_TRACED = 3
_NUM_COMPARED = 16
_NUM_KEPT = 64
# A row has changed if it did by this part of what the most changed one did: rounding may differ.
_CHANGED = 1e-4


class TraceError(Exception):
    """A model cannot be traced; the text says why."""


class AlikeError(TraceError):
    """The examples of a batch are alike, so that to exchange them shows nothing."""


@dataclass(frozen=True)
class _Use:
    """What an operation made of a parameter, and where its examples may be by sizes."""

    places: list[Place]
    output: Tensor


# Or why they cannot be found; not as an error, whose traceback holds the batch and the model.
_seen: WeakKeyDictionary[nn.Module, dict[Hashable, Places | str]] = WeakKeyDictionary()


def places_seen(
    model: nn.Module,
    wanted: Collection[nn.Parameter],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    size: int,
    batch_dim: int,
) -> Places:
    """Return the places that were traced before for such arguments, or trace them.

    Raises:
        AlikeError: If the examples of this batch are alike.
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
        places = traced_places(model, wanted, args, kwargs, size, batch_dim)
    except AlikeError:  # Those of the next batch may not be.
        raise
    except TraceError as error:
        seen[key] = str(error)
        raise
    if all(len(of_parameter) < 2 for of_parameter in places.values()):
        seen[key] = places  # Else weights that are zero as yet may have hidden what would change.
    return places


def _signature(value: Any, size: int, batch_dim: int) -> Hashable:
    """Return what tells apart arguments for which a model may do other things."""
    if isinstance(value, Tensor):
        return (value.dtype, *_few(value, size, batch_dim).shape)
    if isinstance(value, dict):
        return tuple((key, _signature(item, size, batch_dim)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_signature(item, size, batch_dim) for item in value)
    return (type(value), repr(value))


def traced_places(
    model: nn.Module,
    wanted: Collection[nn.Parameter],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    size: int,
    batch_dim: int,
) -> Places:
    """Run a model on a few examples of a batch, and see which rows are whose.

    Args:
        model: The model; it is left as it was.
        wanted: The parameters whose operations are traced.
        args: What the model is called with.
        kwargs: The same, by name.
        size: The number of examples.
        batch_dim: The axis of its inputs that holds them.

    Returns:
        The places by parameter: none where rows are in an order of their own, several where it is
        used in several ways, or nothing has changed.

    Raises:
        AlikeError: If the examples are alike.
        TraceError: If nothing it is called with holds the examples, it fails on a few of them, or
            it couples them, so that all rows change.
    """
    given = [*args, *kwargs.values()]
    held = [tensor for _, tensor in tensor_leaves(given) if _is_held(tensor, size, batch_dim)]
    if not held:
        raise TraceError(f"nothing it is called with has the {size} examples along one axis")
    num = min(size, NUM_TRACED)
    stand_ins = [_unlike(held, example, batch_dim) for example in range(num)]
    autocast = as_outside(held[0].device.type)

    def run(exchanged: int | None) -> dict[nn.Parameter, list[_Use]]:
        def some(tensor: Tensor) -> Tensor:
            few = _few(tensor, size, batch_dim).clone()
            if exchanged is not None and _is_held(tensor, size, batch_dim):
                other = tensor.detach().select(batch_dim, stand_ins[exchanged])
                few.select(batch_dim, exchanged).copy_(other)
            return few

        few_args, few_kwargs = map_tensors(args, some), map_tensors(dict(kwargs), some)
        return _uses_in(model, wanted, num, autocast, lambda: model(*few_args, **few_kwargs))

    try:
        base = run(None)
        fitting = {p: [set(use.places) for use in uses] for p, uses in base.items()}
        for exchanged in range(num):
            others = run(exchanged)
            for parameter, uses in base.items():
                for at, places in enumerate(fitting[parameter]):
                    places &= _fitting(uses, others.get(parameter, []), at, exchanged, num)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(f"it fails on {num} examples: {reason_of(error)}") from error
    return {
        parameter: set().union(*of_uses) if all(of_uses) else ()
        for parameter, of_uses in fitting.items()
    }


def _unlike(held: Sequence[Tensor], example: int, batch_dim: int) -> int:
    """Return another example that differs from one; from the end, so that it is none of the first.

    Raises:
        AlikeError: If a few of them are no others; most batches have no two that are alike.
    """
    size = held[0].shape[batch_dim]
    for other in reversed(range(max(0, size - _NUM_COMPARED), size)):
        pairs = [(t.select(batch_dim, example), t.select(batch_dim, other)) for t in held]
        if not all(torch.equal(one, another) for one, another in pairs):
            return other
    raise AlikeError("its examples are alike")


def _few(tensor: Tensor, size: int, batch_dim: int) -> Tensor:
    """Return the first examples, where a tensor holds them."""
    if not _is_held(tensor, size, batch_dim):
        return tensor.detach()
    return tensor.detach().narrow(batch_dim, 0, min(size, NUM_TRACED))


def _is_held(tensor: Tensor, size: int, batch_dim: int) -> bool:
    return tensor.ndim > batch_dim and tensor.shape[batch_dim] == size


def _uses_in(
    model: nn.Module,
    wanted: Collection[nn.Parameter],
    num_examples: int,
    autocast: AbstractContextManager[Any],
    call: Callable[[], object],
) -> dict[nn.Parameter, list[_Use]]:
    """Return what operations make of parameters, in their order.

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

    with warnings.catch_warnings(), undisturbed(model), torch.no_grad(), autocast:
        warnings.simplefilter("ignore")  # The model's own come with its next pass.
        held = HeldParameters(model)
        uses = ParameterUses(model, wanted, take, num_examples, held, needs_graph=False)
        with uses:
            call()
    if uses.error is not None:
        raise uses.error
    if uses.couplings:
        raise TraceError(f"{uses.couplings[0]} couple its examples")
    return found


def _fitting(
    uses: Sequence[_Use], others: Sequence[_Use], at: int, exchanged: int, num: int
) -> set[Place]:
    """Return the places of a use at which only entries of an exchanged example have changed."""
    use = uses[at]
    if len(others) != len(uses) or others[at].output.shape != use.output.shape:
        # Which rows there are, as of experts, depends on the examples; but where each has one,
        # they may just have another length.
        is_by_example = all(len(other.output) == num for other in (*uses, *others))
        return {Place.FIRST} if others and is_by_example and use.places == [Place.FIRST] else set()
    changed = _changed(use.output, others[at].output)
    return {place for place in use.places if _fits(place, changed, exchanged, num)}


def _changed(base: Tensor, other: Tensor) -> Tensor:
    """Return which entries along the first two axes have changed, [rows, columns]."""
    difference = (base - other).abs().double().nan_to_num()
    if not difference.numel():
        return torch.zeros(*base.shape[:1], 1, dtype=torch.bool)
    rows = difference.reshape(*base.shape[:2], -1) if base.ndim > 1 else difference[:, None, None]
    largest = rows.amax(2)
    return largest > _CHANGED * largest.max()


def _fits(place: Place, changed: Tensor, example: int, num: int) -> bool:
    """Tell whether only entries changed that are an example's at a place."""
    by_example = changed.any(1)
    if place is Place.SECOND:
        by_example = changed.any(0)
    elif place is Place.INNER:
        by_example = by_example.unflatten(0, (-1, num)).any(0)
    elif place is Place.OUTER:
        by_example = by_example.unflatten(0, (num, -1)).any(1)
    return not bool(by_example[:example].any() | by_example[example + 1 :].any())
