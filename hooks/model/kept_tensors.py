"""Kept tensors: what a tensor held before a pass, and how it gets that back, to the last bit.

A pass may write into a tensor behind autograd's version counter: by `.data`, through a NumPy array
that shares its memory, or in a fused kernel, as observers of quantization-aware training do. So
values are compared, not versions.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class KeptTensor:
    """The memory and the values of a tensor, as they are now.

    Args:
        tensor: The tensor; dense, and on a device that has values.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        # Where the tensor lies now: a pass may point it at other memory, of another shape.
        self._place = tensor.data
        self._values = _without_repetitions(self._place).clone()

    def restore(self) -> bool:
        """Give the tensor its memory and its values back; return whether they had changed."""
        tensor, place = self._tensor, self._place
        has_moved = _place_of(tensor) != _place_of(place)
        if has_moved:
            tensor.data = place
        values = _without_repetitions(place)
        # Not written where nothing has changed: the memory may be that of a read-only file.
        has_changed = not torch.equal(_bits(values), _bits(self._values))
        if has_changed:
            # Through .data, as a graph of the user's may have saved this tensor.
            values.copy_(self._values)
        return has_moved or has_changed


def can_be_kept(tensor: Tensor) -> bool:
    """Return whether a tensor has values in memory that can be copied and written back."""
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return is_plain and tensor.layout is torch.strided and not tensor.is_meta


def fingerprint(tensor: Tensor) -> Tensor:
    """Return a sum over a tensor's bits, int64 [], on its device: other values, another sum."""
    return _bits(_without_repetitions(tensor.data)).sum(dtype=torch.int64)


def _place_of(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _without_repetitions(tensor: Tensor) -> Tensor:
    """Take one of the values that lie in the same place, as in an expanded tensor."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _bits(tensor: Tensor) -> Tensor:
    """View numbers as integers: NaN is equal to itself then, and -0.0 another value than 0.0."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.is_quantized:
        return tensor.int_repr()
    return tensor if tensor.dtype is torch.bool else tensor.view(_INTEGERS[tensor.element_size()])
