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
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sonde.hooks.probes import undisturbed
from sonde.hooks.taps import map_tensors, tensor_leaves

from .held_parameters import HeldParameters
from .layouts import Place, reason_of
from .parameter_uses import Operation, ParameterUses

Places: TypeAlias = Mapping[nn.Parameter, Collection[Place]]
"""Where the examples may be in what operations make of a parameter; nowhere, if it is empty."""

# How many examples are exchanged, in turn.
NUM_TRACED = 3
_NUM_COMPARED = 16
_NUM_KEPT = 64
# A row has changed if it did by this part of what the most changed one did: rounding may differ.
_CHANGED = 1e-4


class TraceError(Exception):
    """A model cannot be traced; the text says why."""


class AlikeError(TraceError):
    """The examples of a batch are alike, so that to exchange them shows nothing."""


_seen: WeakKeyDictionary[nn.Module, dict[Hashable, Places | TraceError]] = WeakKeyDictionary()


@dataclass
class _Uses:
    """What operations made of a parameter in a pass, in their order."""

    places: list[list[Place]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def places_seen(
    model: nn.Module,
    wanted: Collection[nn.Parameter],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    size: int,
    batch_dim: int,
) -> Places:
    """Return the places that were traced before for such examples, or trace them.

    Raises:
        AlikeError: If the examples of this batch are alike.
        TraceError: If that is not possible.
    """
    shapes = tuple(
        (name, tensor.dtype, *_few(tensor, size, batch_dim).shape)
        for name, tensor in tensor_leaves([*args, *kwargs.values()])
    )
    key = (batch_dim, shapes, frozenset(id(parameter) for parameter in wanted))
    seen = _seen.setdefault(model, {})
    if key not in seen:
        if len(seen) >= _NUM_KEPT:  # Batches of sequences may have a shape of their own each.
            seen.pop(next(iter(seen)))
        try:
            seen[key] = traced_places(model, wanted, args, kwargs, size, batch_dim)
        except AlikeError:  # Those of the next batch may not be.
            raise
        except TraceError as error:
            seen[key] = error
    found = seen[key]
    if isinstance(found, TraceError):
        raise found
    return found


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
        The places by parameter.

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

    def run(exchanged: int | None) -> dict[nn.Parameter, _Uses]:
        def some(tensor: Tensor) -> Tensor:
            few = _few(tensor, size, batch_dim).clone()
            if exchanged is not None and _is_held(tensor, size, batch_dim):
                other = tensor.detach().select(batch_dim, stand_ins[exchanged])
                few.select(batch_dim, exchanged).copy_(other)
            return few

        few_args, few_kwargs = map_tensors(args, some), map_tensors(dict(kwargs), some)
        return _uses_in(model, wanted, num, lambda: model(*few_args, **few_kwargs))

    try:
        base = run(None)
        others = [run(exchanged) for exchanged in range(num)]
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(f"it fails on {num} examples: {reason_of(error)}") from error
    return {
        parameter: _common(uses, [one.get(parameter) for one in others])
        for parameter, uses in base.items()
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
    call: Callable[[], object],
) -> dict[nn.Parameter, _Uses]:
    """Return what operations make of parameters.

    Raises:
        TraceError: If one couples the examples.
        Exception: What the model raises.
    """
    found: dict[nn.Parameter, _Uses] = defaultdict(_Uses)

    def take(operation: Operation, outputs: Sequence[Tensor]) -> None:
        if operation.places is None:
            return
        output = outputs[0].detach().clone()
        for use in operation.uses:
            for parameter in use.parameters:
                found[parameter].places.append(operation.places)
                found[parameter].outputs.append(output)

    with (
        warnings.catch_warnings(),
        undisturbed(model),
        torch.enable_grad(),
        # Else a checkpoint around the model would count what is saved here, too.
        torch.autograd.graph.saved_tensors_hooks(_itself, _itself),
    ):
        warnings.simplefilter("ignore")  # The model's own come with its next pass.
        uses = ParameterUses(model, wanted, take, num_examples, HeldParameters(model))
        with uses:
            call()
    if uses.error is not None:
        raise uses.error
    if uses.couplings:
        raise TraceError(f"{uses.couplings[0]} couple its examples")
    return found


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _common(base: _Uses, others: Sequence[_Uses | None]) -> Collection[Place]:
    """Return the places of a parameter's operations; none if one is at none of them."""
    found: set[Place] = set()
    for at, places in enumerate(base.places):
        changes = []
        for other in others:
            outputs = [] if other is None else other.outputs
            if len(outputs) != len(base.outputs) or outputs[at].shape != base.outputs[at].shape:
                return ()  # Which rows there are depends on the examples.
            changes.append(_changed(base.outputs[at], outputs[at]))
        fitting = [place for place in places if _fits(place, changes)]
        if not fitting:
            return ()
        found.update(fitting)
    return found


def _changed(base: Tensor, other: Tensor) -> Tensor:
    """Return which entries along the first two axes have changed, [rows, columns]."""
    difference = (base - other).abs().double().nan_to_num()
    if not difference.numel():
        return torch.zeros(*base.shape[:1], 1, dtype=torch.bool)
    rows = difference.reshape(*base.shape[:2], -1) if base.ndim > 1 else difference[:, None, None]
    largest = rows.amax(2)
    return largest > _CHANGED * largest.max()


def _fits(place: Place, changes: Sequence[Tensor]) -> bool:
    """Tell whether of each exchanged example only entries changed that are at its place."""
    num = len(changes)
    for example, changed in enumerate(changes):
        by_example = changed.any(1)
        if place is Place.SECOND:
            by_example = changed.any(0)
        elif place is Place.INNER:
            by_example = by_example.unflatten(0, (-1, num)).any(0)
        elif place is Place.OUTER:
            by_example = by_example.unflatten(0, (num, -1)).any(1)
        if bool(by_example[:example].any() | by_example[example + 1 :].any()):
            return False
    return True
