"""Model states: what a forward pass may change of a model, put back after it."""

from __future__ import annotations

import random
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from sonde.exceptions import SondeError, SondeWarning

from .kept_tensors import KeptTensor, can_be_kept, fingerprint
from .ranks import has_sharded_parameters
from .walks import modules_of

_Generator: TypeAlias = torch.Generator | np.random.Generator | random.Random


class _Tensors:
    """A set of tensors that are somewhere else."""

    # Each is looked for in every pass: WeakTensorKeyDictionary takes ten times as long for that.

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Tensor]] = {}

    def add(self, tensor: Tensor) -> None:
        key = id(tensor)
        self._references[key] = weakref.ref(tensor, lambda _: self.discard(key))

    def discard(self, key: int) -> None:
        self._references.pop(key, None)

    def __contains__(self, tensor: Tensor) -> bool:
        reference = self._references.get(id(tensor))
        return reference is not None and reference() is tensor


# Tensors beside buffers that a pass has changed: they are copied before each pass.
_changing = _Tensors()
# Tensors that a pass has left as they were: of them only the version is looked at again.
_steady = _Tensors()
# So many bytes of tensors that no pass has been seen to leave alone are copied before it. Of larger
# models only a sum over the others is kept, so that a first pass does not double their memory.
_FIRST_COPY_BYTES = 64 << 20

# What every module has beside what its class gives it: hooks, parameters, buffers, modules.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_OWN_TABLES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, dict, set)
# Most of what modules hold is one of these, or an empty table of hooks. A model has hundreds of
# them, so they are passed over quickly.
_EMPTY: dict[Any, Any] = {}
_PLAIN = frozenset([bool, int, float, str, type(None)])


class MadeParametersError(SondeError, RuntimeError):
    """A pass made parameters that the training has not made yet; they are gone again."""


class _Watched(NamedTuple):
    """A tensor of a module that is not copied, and what tells whether it has changed."""

    module: nn.Module
    name: str
    tensor: Tensor
    version: int | None
    fingerprint: Tensor | None


class ModelState:
    """What a pass may change, as it is now.

    Modes, buffers, hooks, submodules, generators and whatever else modules hold by name are put
    back; so is what is in their lists, dicts and sets, but not what other objects hold. What a
    pass adds goes as a whole: a flag together with the hooks that it stands for.

    Buffers are always copied. Parameters and other tensors are copied before the first pass, up to
    64 MiB of them, and from then on if that pass changed them. What it changed beyond that is
    named by a warning, because it cannot be put back this once.

    Args:
        model: The model; no forward pass of it may be under way.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = modules_of(model)
        # A ScriptModule binds nothing new to a name, and a lazy one becomes another for good.
        others = (torch.jit.ScriptModule, LazyModuleMixin)
        self._modes = {module: module.training for module in modules}
        self._names = {m: dict(vars(m)) for m in modules if not isinstance(m, others)}
        self._tables = {
            m: [dict(names[name]) if names[name] else _EMPTY for name in _OWN_TABLES]
            for m, names in self._names.items()
        }
        self._contents: list[tuple[Any, Any]] = []
        self._generators: list[tuple[_Generator, Any]] = []
        self._tensors: dict[Tensor, tuple[nn.Module, str]] = {}
        # With sharded parameters modules hold other tensors during a pass, which come and go.
        self._is_sharded = has_sharded_parameters(model)
        for module in modules:
            for name, parameter in module._parameters.items():
                self._take(module, name, parameter)
        for module, names in self._names.items():
            for name, value in names.items():
                if name in _OF_EVERY_MODULE and not value:
                    if isinstance(value, dict) and name not in _OWN_TABLES:
                        self._contents.append((value, _EMPTY))
                elif type(value) not in _PLAIN and name not in _OWN_TABLES:
                    self._take(module, name, value)
        self._kept = {
            tensor: KeptTensor(tensor) for tensor in _changeable(modules) if can_be_kept(tensor)
        }
        self._watched: list[_Watched] = []
        self._keep_or_watch()

    def evaluate(self) -> None:
        """Put all modules into eval mode. Not by `eval`, which a model may override."""
        for module, mode in self._modes.items():
            if mode and module in self._names and "training" in self._names[module]:
                vars(module)["training"] = False  # A module's own way looks for parameters first.
            elif mode:
                module.training = False

    def restore(self) -> list[str]:
        """Put back what has changed; return the names of parameters that were made meanwhile."""
        made = []
        for module, names in self._names.items():
            own = vars(module)
            for name in own.keys() - names.keys():
                del own[name]
            own.update(names)
            made += self._restore_tables(module)
        for module, mode in self._modes.items():
            if module.training is not mode:
                module.training = mode
        for container, content in self._contents:
            if not container and not content:
                continue
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for generator, state in self._generators:
            _set_state(generator, state)
        with torch.no_grad():
            for tensor, kept in self._kept.items():
                if kept.restore() and tensor in self._tensors:
                    _changing.add(tensor)
                elif tensor in self._tensors and tensor not in _changing:
                    _steady.add(tensor)
        self._warn_of_changed()  # Last, as it may raise.
        return made

    def _restore_tables(self, module: nn.Module) -> list[str]:
        """Put back what a module owns; return the names of parameters that were made."""
        parameters, buffers, modules = self._tables[module]
        made = []
        if module._parameters.keys() != parameters.keys():
            made = [name for name in module._parameters.keys() - parameters.keys()]
        for name in made:
            del module._parameters[name]
        if module._modules.keys() != modules.keys():
            for name in module._modules.keys() - modules.keys():
                new = module._modules.pop(name)
                made += [] if new is None else [f"{name}.{p}" for p, _ in new.named_parameters()]
        # A module may bind a new tensor to a buffer's name, instead of changing it.
        for table, before in ((module._buffers, buffers), (module._modules, modules)):
            if not table and not before:
                continue
            for name in table.keys() - before.keys():
                del table[name]
            table.update(before)
        return made

    def _take(self, module: nn.Module, name: str, value: Any) -> None:
        """Note what an attribute holds, where passes may change that."""
        if isinstance(value, Tensor):
            self._tensors.setdefault(value, (module, name))
        elif isinstance(value, _Generator):
            self._generators.append((value, _state_of(value)))
        elif isinstance(value, dict) if name in _OF_EVERY_MODULE else type(value) in _CONTAINERS:
            self._contents.append((value, value.copy()))
            for item in value.values() if isinstance(value, dict) else value:
                if isinstance(item, Tensor):
                    self._tensors.setdefault(item, (module, name))

    def _keep_or_watch(self) -> None:
        """Copy tensors that passes may change, the small ones first; watch the others."""
        free_bytes = 0 if self._is_sharded else _FIRST_COPY_BYTES
        for tensor in sorted(self._tensors, key=_num_bytes):
            if tensor in self._kept or is_lazy(tensor):  # A lazy one is made by a pass, for good.
                continue
            is_new = can_be_kept(tensor) and tensor not in _steady
            if is_new and (tensor in _changing or tensor.nbytes <= free_bytes):
                free_bytes -= 0 if tensor in _changing else tensor.nbytes
                self._kept[tensor] = KeptTensor(tensor)
                continue
            mark = fingerprint(tensor) if is_new and not self._is_sharded else None
            place = self._tensors[tensor]
            self._watched.append(_Watched(*place, tensor, _version_of(tensor), mark))

    def _warn_of_changed(self) -> None:
        for module, name, tensor, version, mark in self._watched:
            is_same = mark is None or bool(fingerprint(tensor) == mark)
            if is_same and _version_of(tensor) == version:
                if mark is not None:
                    _steady.add(tensor)
                continue
            _changing.add(tensor)
            _steady.discard(id(tensor))
            warnings.warn(
                f"sonde: the forward pass modifies `{name}` of {type(module).__name__} in place "
                "even in eval mode. This change could not be undone; from now on sonde restores "
                "it. (Buffers are always restored.)",
                SondeWarning,
                stacklevel=2,
            )


def _changeable(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    """Yield what passes are known to change in place."""
    for module in modules:
        yield from (buffer for buffer in module._buffers.values() if buffer is not None)
        # An embedding with max_norm rescales those rows of its weight that have grown.
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            yield module.weight


def _num_bytes(tensor: Tensor) -> int:
    return tensor.nbytes if tensor.layout is torch.strided else 0


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
