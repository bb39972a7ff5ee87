"""Model states: what a forward pass may change of a model, put back after it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sonde.exceptions import SondeWarning

_Generator: TypeAlias = torch.Generator | np.random.Generator | random.Random

# Tensors that a pass was seen to change in place, beside buffers: only these are copied ahead.
_changing = WeakTensorKeyDictionary()

_are_states: dict[type, bool] = {}


class _Watched(NamedTuple):
    """A tensor of a module, which passes should not change in place."""

    module: nn.Module
    name: str
    tensor: Tensor
    version: int


class ModelState:
    """What a pass may change, as it is now.

    Modes, buffers, generators and tensors that modules hold are put back. A parameter, or another
    tensor, that is changed in place cannot be, the first time: a warning names it, and from then
    on it is copied ahead.

    Args:
        model: The model; no forward pass of it may be under way.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modes = {module: module.training for module in model.modules()}
        # A ScriptModule binds no new tensor to a name.
        eager = [m for m in self._modes if not isinstance(m, torch.jit.ScriptModule)]
        self._buffers = {module: dict(module._buffers) for module in eager}
        self._attributes: dict[nn.Module, dict[str, Tensor]] = {}
        self._sizes: dict[nn.Module, int] = {}
        self._generators: list[tuple[_Generator, Any]] = []
        for module in eager:
            own = {n: value for n, value in vars(module).items() if _is_state(type(value))}
            self._sizes[module] = len(vars(module))
            self._attributes[module] = {n: v for n, v in own.items() if isinstance(v, Tensor)}
            self._generators += [
                (value, _state_of(value)) for value in own.values() if not isinstance(value, Tensor)
            ]
        self._watched = [
            _Watched(module, name, tensor, tensor._version)
            for module in self._modes
            for tensors in (module._parameters, self._attributes.get(module, {}))
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self._copies = {
            tensor: (tensor._version, tensor.detach().clone()) for tensor in self._changeable()
        }

    def evaluate(self) -> None:
        """Put all modules into eval mode. Not by `eval`, which a model may override."""
        for module, mode in self._modes.items():
            if mode:
                self._set_mode(module, False)

    def restore(self) -> None:
        """Put back what has changed."""
        for module, mode in self._modes.items():
            if module.training is not mode:
                self._set_mode(module, mode)
        for module, buffers in self._buffers.items():
            # A module may bind a new tensor to a buffer's name, instead of changing it.
            module._buffers.update(buffers)
        for generator, state in self._generators:
            _set_state(generator, state)
        for module, tensors in self._attributes.items():
            own = vars(module)
            if len(own) != self._sizes[module]:
                new = [n for n, v in own.items() if isinstance(v, Tensor) and n not in tensors]
                for name in new:
                    del own[name]
            own.update(tensors)
        with torch.no_grad():
            for tensor, (version, copy) in self._copies.items():
                if tensor._version != version:
                    # Through .data, as a graph of the user's may have saved this tensor.
                    tensor.data.copy_(copy)
        self._warn_of_changed()  # Last, as it may raise.

    def _set_mode(self, module: nn.Module, mode: bool) -> None:
        own = vars(module)
        if module in self._buffers and "training" in own:
            own["training"] = mode  # A module's own way looks for parameters first, in Python.
        else:
            module.training = mode

    def _changeable(self) -> Iterator[Tensor]:
        """Yield what passes change in place."""
        for module in self._modes:
            yield from (buffer for buffer in module._buffers.values() if buffer is not None)
            # An embedding with max_norm rescales its weight.
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
                yield module.weight
        if _changing:
            yield from (one.tensor for one in self._watched if one.tensor in _changing)

    def _warn_of_changed(self) -> None:
        for module, name, tensor, version in self._watched:
            if tensor._version == version or tensor in self._copies:
                continue
            _changing[tensor] = True
            warnings.warn(
                f"sonde: the forward pass changed `{name}` of {type(module).__name__} in place, in "
                "eval mode, too, which is not put back this once, and is from now on; a buffer "
                "always is",
                SondeWarning,
                stacklevel=2,
            )


def _is_state(kind: type) -> bool:
    """Tell whether attributes of a type are states that passes may change."""
    if kind not in _are_states:  # Subclass checks take longer than all the rest.
        kinds = (Tensor, torch.Generator, np.random.Generator, random.Random)
        _are_states[kind] = issubclass(kind, kinds)
    return _are_states[kind]


def _state_of(generator: _Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate()


def _set_state(generator: _Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.setstate(state)
