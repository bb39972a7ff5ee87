"""Model states: what a forward pass may change of a model, put back after it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.weak import WeakTensorKeyDictionary

from sonde.exceptions import SondeWarning

_Generator: TypeAlias = torch.Generator | np.random.Generator | random.Random

# Tensors that a pass was seen to change in place, beside buffers: only these are copied ahead.
_changing = WeakTensorKeyDictionary()

# What every module has beside what its class gives it: hooks, parameters, buffers, modules.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class _Watched(NamedTuple):
    """A tensor of a module, which passes should not change in place."""

    module: nn.Module
    name: str
    tensor: Tensor
    version: int | None


class ModelState:
    """What a pass may change, as it is now.

    Modes, buffers, generators and whatever else modules hold by name are put back; so is what is
    in their lists, dicts and sets, but not what other objects hold. A parameter, or another tensor,
    that is changed in place cannot be, the first time: a warning names it, and from then on it is
    copied ahead.

    Args:
        model: The model; no forward pass of it may be under way.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        # A ScriptModule binds nothing new to a name, and a lazy one becomes another for good.
        others = (torch.jit.ScriptModule, LazyModuleMixin)
        self._modes = {module: module.training for module in modules}
        self._names = {m: dict(vars(m)) for m in modules if not isinstance(m, others)}
        self._buffers = {module: dict(module._buffers) for module in self._names}
        self._contents: list[tuple[Any, Any]] = []
        self._generators: list[tuple[_Generator, Any]] = []
        self._watched: list[_Watched] = []
        for module in modules:
            for name, parameter in module._parameters.items():
                self._watch(module, name, parameter)
        for module, names in self._names.items():
            for name in names.keys() - _OF_EVERY_MODULE:
                self._take(module, name, names[name])
        self._copies = {
            tensor: (_version_of(tensor), tensor.detach().clone())
            for tensor in self._changeable(modules)
        }

    def evaluate(self) -> None:
        """Put all modules into eval mode. Not by `eval`, which a model may override."""
        for module, mode in self._modes.items():
            if mode and module in self._names and "training" in self._names[module]:
                vars(module)["training"] = False  # A module's own way looks for parameters first.
            elif mode:
                module.training = False

    def restore(self) -> None:
        """Put back what has changed."""
        for module, names in self._names.items():
            own = vars(module)
            for name in own.keys() - names.keys():
                del own[name]
            own.update(names)
            # A module may bind a new tensor to a buffer's name, instead of changing it.
            module._buffers.update(self._buffers[module])
        for module, mode in self._modes.items():
            if module.training is not mode:
                module.training = mode
        for container, content in self._contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for generator, state in self._generators:
            _set_state(generator, state)
        with torch.no_grad():
            for tensor, (version, copy) in self._copies.items():
                if _version_of(tensor) != version:
                    # Through .data, as a graph of the user's may have saved this tensor.
                    tensor.data.copy_(copy)
        self._warn_of_changed()  # Last, as it may raise.

    def _watch(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            self._watched.append(_Watched(module, name, tensor, _version_of(tensor)))

    def _take(self, module: nn.Module, name: str, value: Any) -> None:
        """Note what an attribute holds, where passes may change that."""
        if isinstance(value, Tensor):
            self._watch(module, name, value)
        elif isinstance(value, _Generator):
            self._generators.append((value, _state_of(value)))
        elif type(value) in (list, dict, set):
            self._contents.append((value, value.copy()))

    def _changeable(self, modules: list[nn.Module]) -> Iterator[Tensor]:
        """Yield what passes change in place."""
        for module in modules:
            yield from (buffer for buffer in module._buffers.values() if buffer is not None)
            # An embedding with max_norm rescales its weight.
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
                yield module.weight
        if _changing:
            yield from (one.tensor for one in self._watched if one.tensor in _changing)

    def _warn_of_changed(self) -> None:
        for module, name, tensor, version in self._watched:
            if _version_of(tensor) == version or tensor in self._copies:
                continue
            _changing[tensor] = True
            warnings.warn(
                f"sonde: the forward pass changed `{name}` of {type(module).__name__} in place, in "
                "eval mode, too, which is not put back this once, and is from now on; a buffer "
                "always is",
                SondeWarning,
                stacklevel=2,
            )


def _version_of(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place; an inference tensor does not count it."""
    try:
        return tensor._version
    except RuntimeError:
        return None


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
