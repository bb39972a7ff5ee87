"""What this machine's processor computes, where PyTorch leaves some of it to the processor."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn


@cache
def _has_bfloat16_lstm() -> bool:
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
    except RuntimeError:  # oneDNN has none for processors without AVX-512.
        return False
    return True


def needs_bfloat16_lstm() -> None:
    """Skip where an LSTM cannot run under autocast to bfloat16 on the CPU."""
    if not _has_bfloat16_lstm():
        pytest.skip("PyTorch has no LSTM in bfloat16 for this processor")
