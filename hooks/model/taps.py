"""Taps: forward hooks that exist only while something is captured."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from . import own_work

OnCall: TypeAlias = Callable[[str, nn.Module, Any, Any], Any]
"""Called with the name of the call, the module, its first input and its output.

What it returns, unless it is None, replaces the output.
"""

_REDUCE = "__reduce_ex__"
# All tables of hooks share their keys, and note some of them in further tables.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_with_kwargs", "_always_called")


@contextmanager
def tapped(
    modules: Mapping[str, nn.Module], on_call: OnCall, *, first: bool = False
) -> Iterator[None]:
    """Call `on_call` after every call of the given modules; the hooks are gone on exit.

    The first call of a module within the context is named like the module, later ones `name#1`,
    `name#2`, ….

    Args:
        modules: The modules to tap, by name.
        on_call: What to do with a call. It must not keep tensors that a later in-place operation
            may change, unless it copies them.
        first: Come before the hooks that are there already, which may change the output.
    """
    num_calls: Counter[str] = Counter()

    def hook_for(name: str) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            call = num_calls[name]
            num_calls[name] += 1
            given = args[0] if args else next(iter(kwargs.values()), None)
            return on_call(f"{name}#{call}" if call else name, module, given, output)

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(add_hook(module, hook_for(name), first=first))
        yield


def add_hook(
    module: nn.Module,
    hook: Callable[..., Any],
    *,
    is_before: bool = False,
    is_last: bool = False,
    first: bool = False,
) -> Callable[[], None]:
    """Register a forward hook that no copy of the module takes along.

    A copy of a model, such as its moving average, must not record, and a pickle of it must not need
    sonde. Both ask an object how to take it apart; while it has such hooks, a module answers that
    itself.

    Args:
        module: The module.
        hook: Called with the module, its arguments by position and by name and, unless `is_before`,
            its output.
        is_before: Call it before the forward pass.
        is_last: Call it also after a forward pass that failed, with None as its output.
        first: Come before the hooks that are there already.

    Returns:
        A function that removes it.
    """
    ours = _Hook(hook)
    if is_before:
        handle = module.register_forward_pre_hook(ours, prepend=first, with_kwargs=True)
    else:
        handle = module.register_forward_hook(
            ours, prepend=first, with_kwargs=True, always_call=is_last
        )
    module.__dict__[_REDUCE] = partial(_reduce, module)

    def remove() -> None:
        handle.remove()
        if not _our_keys(module.__dict__):
            module.__dict__.pop(_REDUCE, None)

    return remove


class _Hook:
    """A hook of ours, which is known by its type."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._function(*args)
        with own_work.within:
            return self._function(*args)


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """Take a module apart for a copy or a pickle, the way its class does, without our hooks."""
    parts = type(module).__reduce_ex__(module, protocol)
    if isinstance(parts, tuple) and len(parts) > 2 and isinstance(parts[2], dict):
        ours = _our_keys(parts[2])
        state = {
            name: _without(value, ours) if name.endswith(_HOOKS) else value
            for name, value in parts[2].items()
            if name != _REDUCE
        }
        parts = (*parts[:2], state, *parts[3:])
    return parts


def _our_keys(state: Mapping[str, Any]) -> set[int]:
    tables = [state.get("_forward_hooks", {}), state.get("_forward_pre_hooks", {})]
    return {key for table in tables for key, hook in table.items() if isinstance(hook, _Hook)}


def _without(table: Any, keys: set[int]) -> Any:
    return OrderedDict((key, value) for key, value in table.items() if key not in keys)


def is_recomputing() -> bool:
    """Whether a forward pass runs within a backward pass, as a checkpoint repeats one."""
    # Private, but the only sign there is; torch.utils.checkpoint itself asks it.
    return bool(torch._C._current_graph_task_id() != -1)


def tensor_leaves(output: Any) -> list[tuple[str, Tensor]]:
    """List the tensors of a module's output, however they are nested.

    Returns:
        (suffix, tensor) pairs. The suffix is empty for an output that is one tensor, otherwise it
        is the way to the tensor, such as `[0]` or `[hidden][1]`. A packed sequence is padded with
        zeros, [batch, time, …].
    """
    leaves = tensor_paths(output)
    if len(leaves) == 1:
        return [("", leaves[0][1])]
    return leaves


def tensor_paths(output: Any) -> list[tuple[str, Tensor]]:
    """List the tensors of an output as `tensor_leaves` does, with the way to a single one, too."""
    return list(_leaves(output, ""))


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Rebuild an output with each of its tensors replaced, however they are nested."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        rebuilt: Any = copy.copy(value)
        for key, item in value.items():
            rebuilt[key] = map_tensors(item, function)
        return rebuilt
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(item, function) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        changed = {name: map_tensors(getattr(value, name), function) for name in fields}
        return dataclasses.replace(value, **changed)
    return value


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, PackedSequence):
        yield path, pad_packed_sequence(value, batch_first=True)[0]
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}[{key}]")
    elif isinstance(value, tuple | list):
        for position, item in enumerate(value):
            yield from _leaves(item, f"{path}[{position}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{path}[{field.name}]")
