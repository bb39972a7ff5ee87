"""Reentrant checkpoints on probes: what they compute twice is computed once, and seen.

Such a checkpoint runs its function without a graph, and again in the backward pass, which
`torch.autograd.grad` refuses to go through. Run as it stands, the function gives the same values
and gradients; only memory is not saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction


@contextmanager
def checkpoints_run_once() -> Iterator[None]:
    """Let reentrant checkpoints keep what they compute, while entered."""

    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        # Without an input that requires a gradient, none comes back out of a reentrant one.
        needs = any(isinstance(value, Tensor) and value.requires_grad for value in args)
        with torch.set_grad_enabled(needs and torch.is_grad_enabled()):
            return function(*args)

    CheckpointFunction.apply = staticmethod(apply)
    try:
        yield
    finally:
        del CheckpointFunction.apply  # Its base has torch's own.
