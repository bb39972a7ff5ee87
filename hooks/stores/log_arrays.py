"""Tensors as arrays of the log."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sonde.log import LogArray

from .host_copies import on_host


def to_log_array(
    values: Tensor, field: str, dims: tuple[str, ...], layer: str | None = None
) -> LogArray:
    """Bring a tensor that nobody changes any more to the CPU, as an array of the log.

    bfloat16 keeps its bits. From an accelerator the values are there after `wait_for_copies`.
    """
    values = on_host(values.detach())
    if values.dtype == torch.bfloat16:
        bits = values.contiguous().view(torch.int16).numpy().view(np.uint16)
        return LogArray(field, bits, dims, layer, dtype="bfloat16", is_owned=True)
    return LogArray(field, values.numpy(), dims, layer, is_owned=True)
