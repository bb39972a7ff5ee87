"""Taps: forward hooks that exist only while something is captured."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

OnCall: TypeAlias = Callable[[str, nn.Module, Any, Any], Any]
"""Called with the name of the call, the module, its first input and its output.

What it returns, unless it is None, replaces the output.
"""


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

    handles = [
        module.register_forward_hook(hook_for(name), with_kwargs=True, prepend=first)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensor_leaves(output: Any) -> list[tuple[str, Tensor]]:
    """List the tensors of a module's output, however they are nested.

    Returns:
        (suffix, tensor) pairs. The suffix is empty for an output that is one tensor, otherwise it
        is the way to the tensor, such as `[0]` or `[hidden][1]`. Packed sequences have no batch
        dimension and are left out.
    """
    leaves = list(_leaves(output, ""))
    if len(leaves) == 1:
        return [("", leaves[0][1])]
    return leaves


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
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}[{key}]")
    elif isinstance(value, tuple | list):
        for position, item in enumerate(value):
            yield from _leaves(item, f"{path}[{position}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{path}[{field.name}]")
