"""Digests: short texts by which readers tell whether two runs recorded the same examples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .axes import ExampleAxes


def digest(arrays: Sequence[npt.NDArray[Any]]) -> str:
    """Return a short digest of the shapes, types and bytes of arrays."""
    state = hashlib.sha256()
    for array in arrays:
        state.update(_header(array.dtype.str, array.shape))
        state.update(np.ascontiguousarray(array).data)
    return _short(state)


def input_digest(tensors: Sequence[Tensor]) -> str:
    """Return the digest of the inputs of all examples at once, tensor after tensor."""
    return digest([_as_bytes(tensor) for tensor in tensors])


class ExamplesDigest:
    """A digest of inputs that is the same however many examples are read at once.

    Args:
        num_examples: How many there are in all.
        axes: Where the inputs hold them.
    """

    def __init__(self, num_examples: int, axes: ExampleAxes) -> None:
        self._num_examples = num_examples
        self._axes = axes
        self._states: list[Any] = []  # Any: hashlib names no type for its objects.

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Take in the inputs of the next examples."""
        rows = [_as_bytes(x.movedim(self._axes.of(x), 0)) for x in tensors]
        if not self._states:
            for x, values in zip(tensors, rows, strict=True):
                num_bytes = values.size // self._axes.size_of(x) * self._num_examples
                state = hashlib.sha256()
                # As `digest` begins one of all examples.
                state.update(_header(values.dtype.str, (num_bytes,)))
                self._states.append(state)
        for state, values in zip(self._states, rows, strict=True):
            state.update(values.data)

    def result(self) -> str:
        """Return it; for a single tensor along the first axis it is the input digest."""
        texts = [_short(state) for state in self._states]
        if len(texts) == 1:
            return texts[0]
        return digest([np.frombuffer("".join(texts).encode(), np.uint8)])


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    return f"{dtype}{shape}".encode()


def _short(state: Any) -> str:  # Any: hashlib names no type for its objects.
    text: str = state.hexdigest()
    return text[:16]


def _as_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    flat = tensor.cpu().contiguous().reshape(-1)
    return cast("npt.NDArray[np.uint8]", flat.view(torch.uint8).numpy())
