"""Micro-batches: what a loop tells of its batches, and the passes whose gradients come together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sonde.exceptions import InvalidInputError
from sonde.hooks.examples.ids import as_int64


@dataclass
class Batch:
    """What a loop tells about a micro-batch; see `Recorder.batch`.

    Attributes:
        ids: One integer per example.
        targets: One target per example.
        reduction: How the loss is made of the losses of the examples.
        divided_by: What the loss was divided by already when it was told.
        num_real: How many of the examples count; the others only fill up the batch.
        scale: The gradient that arrived at the loss: what it was multiplied with on the way.
        is_of_examples: The loss is seen to be made of the examples' own losses as `reduction` says.
    """

    ids: npt.NDArray[np.int64] | None = None
    targets: npt.NDArray[Any] | None = None
    reduction: Literal["mean", "sum"] = "mean"
    divided_by: float = 1
    num_real: int | None = None
    scale: Tensor | None = None
    is_of_examples: bool = False

    @property
    def num_examples(self) -> int | None:
        """How many examples it has, if that was told."""
        told = self.ids if self.ids is not None else self.targets
        return None if told is None else len(told)

    def has_examples_of(self, other: Batch | None) -> bool:
        """Whether the same examples were named of another one; by targets where ids lack."""
        if other is None or self.num_examples != other.num_examples:
            return False
        if self.ids is not None and other.ids is not None:
            return np.array_equal(self.ids, other.ids)
        return np.array_equal(np.asarray(self.targets), np.asarray(other.targets))


@dataclass(eq=False)
class Pass:
    """One forward pass; it counts once a gradient has come back to it."""

    micro_batch: MicroBatch
    has_gradients: bool = False
    backward_passes: set[int] = field(default_factory=set)

    def confirm(self, gradient: Tensor | None = None) -> None:
        """Note that a gradient arrived; a hook that leaves it as it is."""
        self.has_gradients = True
        self.backward_passes.add(backward_pass())


@dataclass(eq=False)
class MicroBatch:
    """The forward passes whose gradients come in one backward pass.

    Attributes:
        size: The number of examples; None if it is not known.
        batch: What the loop told of it.
        passes: The forward passes.
    """

    size: int | None
    batch: Batch | None = None
    passes: list[Pass] = field(default_factory=list)

    @property
    def has_gradients(self) -> bool:
        """Whether its backward pass has begun."""
        return any(one.has_gradients for one in self.passes)

    @property
    def num_examples(self) -> int:
        """The number of examples, as its records have them."""
        return self.size or 0

    def factor(self) -> Tensor | float | None:
        """What makes gradients of the loss those of single examples; None if it is not known."""
        if self.batch is None or self.batch.scale is None:
            return None
        factor = self.num_examples if self.batch.reduction == "mean" else 1
        return factor * self.batch.divided_by / self.batch.scale


def make_batch(
    ids: Any,
    targets: Any,
    loss: Any,
    reduction: Literal["mean", "sum"],
    divided_by: float,
    num_real: int | None = None,
) -> Batch:
    """Check what a loop tells of a micro-batch.

    Raises:
        InvalidInputError: If it does not fit together.
    """
    if reduction not in ("mean", "sum"):
        raise InvalidInputError(f"`reduction` (={reduction!r}) must be 'mean' or 'sum'")
    if not divided_by > 0:
        raise InvalidInputError(f"`divided_by` (={divided_by}) must be > 0")
    if num_real is not None and num_real < 0:
        raise InvalidInputError(f"`num_real` (={num_real}) must be >= 0")
    if loss is not None and (not isinstance(loss, Tensor) or loss.numel() != 1):
        what = f"has shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"is {loss!r}"
        raise InvalidInputError(f"`loss` {what}; expected the tensor that backward() is called on")
    given_ids = None if ids is None else _to_numpy(ids)
    if given_ids is not None and not given_ids.size:
        given_ids = given_ids.astype(np.int64)  # An empty list has no integers to show.
    if given_ids is not None and (given_ids.ndim != 1 or given_ids.dtype.kind not in "iu"):
        raise InvalidInputError(
            f"`ids` has shape {given_ids.shape} and dtype {given_ids.dtype}; expected one integer "
            "for each example"
        )
    given_targets = None if targets is None else _to_numpy(targets)
    if given_targets is not None and given_targets.ndim == 0:
        raise InvalidInputError("`targets` is a single value; expected one for each example")
    if given_ids is not None and given_targets is not None and len(given_ids) != len(given_targets):
        raise InvalidInputError(
            f"`ids` has {len(given_ids)} examples, `targets` {len(given_targets)}"
        )
    if given_ids is not None:
        given_ids = as_int64(given_ids)
    return Batch(given_ids, given_targets, reduction, divided_by, num_real)


def backward_pass() -> int:
    """Return the number of the backward pass that this thread is in; -1 outside of one."""
    return torch._C._current_graph_task_id()  # Private, as in `is_recomputing`.


def _to_numpy(values: Any) -> npt.NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.array(values)
