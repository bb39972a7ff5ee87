"""Precision: float32 multiplied as float32, whatever a training allows its own products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch


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


def as_outside(device_type: str) -> torch.autocast:
    """Return what brings autocast back to what it is now, where it is switched off meanwhile.

    What it casts is not kept: of a pass without gradients it would have none in the next one.
    """
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )
