"""Copies to the host: started beside the work of the model, and waited for once they are read.

A plain copy from an accelerator waits for everything the device was given before. These go through
pinned memory on a stream of their own; between tensors of the CPU they are plain copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Pinned memory is taken from all processes, and torch keeps it: so larger blocks are not pinned.
_PINNED_BYTES = 1 << 28

_streams: dict[torch.device, torch.cuda.Stream] = {}


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory of the host for copies from a device."""
    is_small = math.prod(shape) * dtype.itemsize <= _PINNED_BYTES
    is_pinned = device.type == "cuda" and is_small
    return torch.empty(list(shape), dtype=dtype, device="cpu", pin_memory=is_pinned)


def start_copy(into: Tensor, values: Tensor) -> None:
    """Start to copy a tensor, which may change afterwards, into memory of the host.

    Args:
        into: Memory of `empty_on_host`, to be read after `wait_for_copies`.
        values: The tensor.
    """
    if values.device.type != "cuda":
        into.copy_(values)
        return
    # A copy on the device, as the next operation of the model may change the tensor in place.
    values = values.to(into.dtype, copy=True, memory_format=torch.contiguous_format)
    stream = _stream_of(values.device)
    stream.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(stream):
        into.copy_(values, non_blocking=True)
    values.record_stream(stream)


def on_host(values: Tensor) -> Tensor:
    """Return a tensor on the host, to be read after `wait_for_copies`; of the CPU's, itself."""
    if values.device.type != "cuda":
        return values.cpu()
    host = empty_on_host(values.shape, values.dtype, values.device)
    start_copy(host, values)
    return host


def wait_for_copies() -> None:
    """Return once all copies that were started are there."""
    for stream in _streams.values():
        stream.synchronize()


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
