"""Precision: float32 computed as float32, whatever a training allows its own products."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import nn


class _Setting(NamedTuple):
    """What decides how float32 is multiplied, and what keeps it float32."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]
    full: Any


def _settings() -> list[_Setting]:
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    products: Any = torch.backends.cuda.matmul
    found = [
        _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        _attribute(cudnn, "allow_tf32", False),
    ]
    if hasattr(products, "fp32_precision"):  # Of torch >= 2.9, beside the other two.
        backends = (products, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
        found += [_attribute(backend, "fp32_precision", "ieee") for backend in backends]
    return found


def _attribute(owner: Any, name: str, full: Any) -> _Setting:
    return _Setting(partial(getattr, owner, name), partial(setattr, owner, name), full)


_SETTINGS = _settings()


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 in float32, and not in TF32 or bfloat16.

    TF32 keeps 10 bits of the mantissa. On a GPU it is what convolutions take unless they are told
    otherwise, and what `torch.set_float32_matmul_precision("high")` allows everything.
    """
    before = []
    for setting in _SETTINGS:
        try:
            before.append((setting, setting.get()))
        except RuntimeError:  # The newer settings were used, and torch refuses to read the older.
            continue
    try:
        for setting, _ in before:
            setting.set(setting.full)
        yield
    finally:
        for setting, value in before:
            setting.set(value)


class _Thread(threading.local):
    """What this thread does about autocast.

    Attributes:
        keeps_off: Autocast that is entered stays off.
        num_kept_off: How often it was entered nevertheless.
    """

    keeps_off = False
    num_kept_off = 0


_thread = _Thread()
_enter_autocast: Callable[[torch.autocast], Any] = torch.autocast.__enter__
_lock = threading.Lock()
_num_patches = 0
_casting: WeakSet[nn.Module] = WeakSet()  # Models that enter autocast by themselves.
_needing: WeakSet[nn.Module] = WeakSet()  # Those of them that fail without it.


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Keep autocast off, also where the model enters it by itself.

    `torch.autocast(enabled=False)` around a call does not: what Accelerate and the Trainer of
    transformers build into `model.forward` enters autocast within the call, and so may a decorator
    or a `with` statement of the model's own. In other threads autocast works as ever.

    Args:
        model: The model; after `keep_autocast` what it enters by itself is on.
    """
    if model in _needing:
        yield
        return
    before, num_before = _thread.keeps_off, _thread.num_kept_off
    _patch(1)
    _thread.keeps_off = True
    try:
        yield
    finally:
        _thread.keeps_off = before
        _patch(-1)
        if _thread.num_kept_off > num_before:
            _casting.add(model)


def is_kept_off(model: nn.Module) -> bool:
    """Return whether a model enters autocast by itself, and is evaluated without."""
    return model in _casting and model not in _needing


def keep_autocast(model: nn.Module, is_kept: bool) -> None:
    """Let a model enter autocast by itself from now on, or no longer."""
    (_needing.add if is_kept else _needing.discard)(model)


def _patch(change: int) -> None:
    """Put `_enter` in the place of what enters autocast, as long as any thread needs it."""
    global _num_patches, _enter_autocast
    autocast: Any = torch.autocast
    with _lock:
        if not _num_patches:
            _enter_autocast = autocast.__enter__
        _num_patches += change
        autocast.__enter__ = _enter if _num_patches else _enter_autocast


def _enter(autocast: torch.autocast) -> Any:
    entered = _enter_autocast(autocast)
    if _thread.keeps_off and torch.is_autocast_enabled(autocast.device):
        _thread.num_kept_off += 1
        torch.set_autocast_enabled(autocast.device, False)  # Its exit restores what was before.
    return entered


class _Outside(torch.autocast):
    """Autocast as it was outside of `without_autocast`."""

    keeps_off = False

    def __enter__(self) -> Any:
        self._kept_off, _thread.keeps_off = _thread.keeps_off, self.keeps_off
        return super().__enter__()  # type: ignore[no-untyped-call]  # Of torch.

    def __exit__(self, *error: Any) -> Any:
        _thread.keeps_off = self._kept_off
        return super().__exit__(*error)


def as_outside(device_type: str) -> torch.autocast:
    """Return what brings autocast back to what it is now, where it is switched off meanwhile.

    What it casts is not kept: of a pass without gradients it would have none in the next one.
    """
    outside = _Outside(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )
    outside.keeps_off = _thread.keeps_off
    return outside
