"""Recomputing in the backward pass what would take too much memory to keep until then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def recomputed(compute: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Return what a function makes of tensors, keeping only these for its backward pass.

    `torch.utils.checkpoint` ends a second evaluation by an exception, which a function that catches
    exceptions, such as those of a user's loss, does not let through; and it imports the compiler.

    Args:
        compute: Of these tensors to one; it draws no random numbers, and gradients with respect to
            nothing else come back through it.
        tensors: The tensors.
    """
    result: Tensor = _Recomputed.apply(compute, *tensors)
    return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():  # As it is computed in the backward pass.
            return compute(*(tensor.detach() for tensor in tensors)).detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            given = [
                tensor.detach().requires_grad_(is_needed)
                for tensor, is_needed in zip(ctx.saved_tensors, needed, strict=True)
            ]
            result = ctx.compute(*given)
        wanted = [tensor for tensor in given if tensor.requires_grad]
        found = iter(torch.autograd.grad(result, wanted, gradients, allow_unused=True))
        return (None, *(next(found) if is_needed else None for is_needed in needed))
