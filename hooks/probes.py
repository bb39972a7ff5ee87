"""Probes: fixed, ordered sets of examples, and how to evaluate them without disturbing training."""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from sonde.exceptions import InvalidInputError
from sonde.log import LogArray

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""What a model is called with: one tensor, positional tensors, or keyword tensors."""


class Probe:
    """A fixed, ordered set of examples, evaluated out of band on due steps.

    The model sees it in eval mode, and nothing of the training changes: not the mode of any module,
    no buffer, no random state, no `.grad`.

    Args:
        inputs: A tensor [examples, …], a tuple or dict of such tensors (the model's positional or
            keyword arguments), or a Dataset or DataLoader of (inputs, targets). A dataset is read
            once, in its own order, and held in memory; a DataLoader lends its `collate_fn` and
            batch size, not its sampler.
        targets: One target per example, [examples, …]; a dataset brings its own.
        ids: One integer per example, stable across epochs, ranks and runs. By default the position
            in `inputs`, or for a `Subset` its indices.
        name: The name of this source in the log; by default `probe`.
        batch_size: How many examples are evaluated at once.

    Raises:
        InvalidInputError: If sizes differ, ids repeat, or there is no example.
    """

    def __init__(
        self,
        inputs: Inputs | npt.NDArray[Any] | Dataset[Any] | DataLoader[Any],
        targets: Tensor | npt.NDArray[Any] | Sequence[int] | None = None,
        ids: Tensor | npt.NDArray[np.integer[Any]] | Sequence[int] | None = None,
        *,
        name: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        if isinstance(inputs, Dataset | DataLoader):
            if targets is not None:
                raise InvalidInputError("`targets` must be left out: the dataset brings its own")
            read = _read_dataset(inputs)
            inputs, targets = read.inputs, read.targets
            ids = read.ids if ids is None else ids
            batch_size = batch_size or read.batch_size
        self.name = name
        self.batch_size = 256 if batch_size is None else batch_size
        self.inputs = _as_inputs(inputs)
        self.num_examples = _common_length(self.inputs)
        self.targets = None if targets is None else torch.as_tensor(targets).detach().clone()
        self.ids = _as_ids(ids, self.num_examples)
        if self.batch_size < 1:
            raise InvalidInputError(f"`batch_size` (={batch_size}) must be >= 1")
        if self.targets is not None and len(self.targets) != self.num_examples:
            raise InvalidInputError(
                f"`targets` has {len(self.targets)} examples, `inputs` {self.num_examples}"
            )

    def batches(self, device: torch.device) -> Iterator[tuple[Inputs, Tensor | None]]:
        """Yield (inputs, targets) in order, `batch_size` examples at a time, on a device."""
        for start in range(0, self.num_examples, self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield self.rows(rows, device)

    def rows(self, rows: slice, device: torch.device) -> tuple[Inputs, Tensor | None]:
        """Return (inputs, targets) of some examples, copied to a device.

        A model may work in place on its input, so it never gets the probe's own tensors.
        """
        targets = None if self.targets is None else self.targets[rows].to(device, copy=True)
        return _map_inputs(self.inputs, lambda x: x[rows].to(device, copy=True)), targets

    def table(self) -> list[LogArray]:
        """Return the ids and targets, as they stand in the log."""
        arrays = [LogArray("id", self.ids, ("example",))]
        if self.targets is not None:
            targets = self.targets.cpu()
            if targets.dtype == torch.bfloat16:
                targets = targets.float()
            dims = ("example", *(f"target_{axis}" for axis in range(1, targets.ndim)))
            arrays.append(LogArray("target", targets.numpy(), dims))
        return arrays

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the probe: size and digests."""
        return {
            "num_examples": self.num_examples,
            "batch_size": self.batch_size,
            "id_digest": digest([self.ids]),
            "input_digest": digest([_as_bytes(tensor) for tensor in _tensors(self.inputs)]),
        }

    def __repr__(self) -> str:
        return f"Probe({self.num_examples} examples, name={self.name!r})"


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model with what a probe holds."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def digest(arrays: Sequence[npt.NDArray[Any]]) -> str:
    """Return a short digest of the shapes, types and bytes of arrays."""
    state = hashlib.sha256()
    for array in arrays:
        state.update(f"{array.dtype.str}{array.shape}".encode())
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()[:16]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a while and leave no trace of what happens meanwhile.

    Within, random numbers are drawn from a fixed seed, so a model that draws some in eval mode
    draws the same ones each time.

    Args:
        model: The model; no forward pass of it may be under way.
    """
    modes = {module: module.training for module in model.modules()}
    slots = {module: dict(module._buffers) for module in modes}
    # Not only buffers: an embedding with max_norm rescales its weight in the forward pass.
    kept = {tensor: tensor.detach().clone() for tensor in _changeable(model)}
    versions = {tensor: tensor._version for tensor in kept}
    random_states = _RandomStates()
    try:
        # Not model.eval(), which a model may override with side effects.
        for module in modes:
            module.training = False
        random_states.seed()
        with torch.autocast(device_of(model).type, enabled=False), run_eagerly(), _layer_by_layer():
            yield
    finally:
        random_states.restore()
        for module, mode in modes.items():
            module.training = mode
            # A module may bind a new tensor to a buffer's name, instead of changing it.
            module._buffers.update(slots[module])
        with torch.no_grad():
            for tensor, copy in kept.items():
                if tensor._version != versions[tensor]:
                    # Through .data, as a graph of the user's may have saved this tensor.
                    tensor.data.copy_(copy)


def run_eagerly() -> AbstractContextManager[Any]:
    """Run compiled modules eagerly: a compiled graph has no hooks, and stays as it is."""
    # Dynamo takes seconds to import, and where it is not imported nothing is compiled.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """Let transformer layers call their parts, which their fused path in eval mode does not."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def _changeable(model: nn.Module) -> list[Tensor]:
    changeable = list(model.buffers())
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            changeable.append(module.weight)
    return changeable


class _RandomStates:
    """The random states a forward pass can draw from."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def seed(self) -> None:
        """Start from a fixed seed. Not torch.manual_seed, which also seeds a CUDA yet to start."""
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        if self._cuda:
            torch.cuda.manual_seed_all(0)

    def restore(self) -> None:
        """Go back to the states at the start."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


class _ReadDataset:
    """A dataset read into memory, in its own order."""

    def __init__(self, items: list[Any], collate: Any, ids: Any, batch_size: int | None) -> None:
        batch = collate(items)
        is_pair = isinstance(batch, tuple | list) and len(batch) == 2
        self.inputs: Inputs = batch[0] if is_pair else batch
        self.targets: Tensor | None = batch[1] if is_pair else None
        self.ids = ids
        self.batch_size = batch_size


def _read_dataset(source: Dataset[Any] | DataLoader[Any]) -> _ReadDataset:
    loader = source if isinstance(source, DataLoader) else None
    dataset = cast("Dataset[Any]", loader.dataset if loader is not None else source)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise InvalidInputError(
            f"{type(dataset).__name__} has no fixed order; give the probe tensors, or a dataset "
            "with __len__ and __getitem__"
        )
    # Reading draws random numbers where the dataset augments; the training must not notice.
    random_states = _RandomStates()
    try:
        random_states.seed()
        items = [dataset[position] for position in range(len(dataset))]
    finally:
        random_states.restore()
    if not items:
        raise InvalidInputError(f"{type(dataset).__name__} has no example")
    return _ReadDataset(
        items,
        loader.collate_fn if loader is not None else default_collate,
        list(dataset.indices) if isinstance(dataset, Subset) else None,
        loader.batch_size if loader is not None else None,
    )


def _as_inputs(inputs: Any) -> Inputs:
    if isinstance(inputs, Mapping):
        return {str(name): _own(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_own(value) for value in inputs)
    return _own(inputs)


def _own(value: Any) -> Tensor:
    # A copy, as a probe is fixed, whatever becomes of the tensors it was made of.
    return torch.as_tensor(value).detach().clone()


def _tensors(inputs: Inputs) -> list[Tensor]:
    if isinstance(inputs, dict):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple) else [inputs]


def _map_inputs(inputs: Inputs, function: Any) -> Inputs:
    if isinstance(inputs, dict):
        return {name: function(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(function(value) for value in inputs)
    return cast(Tensor, function(inputs))


def _common_length(inputs: Inputs) -> int:
    sizes = {len(tensor) if tensor.ndim else 0 for tensor in _tensors(inputs)}
    if len(sizes) != 1 or 0 in sizes:
        shapes = [tuple(tensor.shape) for tensor in _tensors(inputs)]
        raise InvalidInputError(
            f"`inputs` has shapes {shapes}; expected tensors [examples, …] with the same number "
            "of examples, at least one"
        )
    return sizes.pop()


def _as_ids(ids: Any, num_examples: int) -> npt.NDArray[np.int64]:
    if ids is None:
        return np.arange(num_examples, dtype=np.int64)
    given = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
    if given.shape != (num_examples,) or given.dtype.kind not in "iu":
        raise InvalidInputError(
            f"`ids` has shape {given.shape} and dtype {given.dtype}; expected one integer for "
            f"each of the {num_examples} examples"
        )
    values, counts = np.unique(given, return_counts=True)
    if counts.max() > 1:
        raise InvalidInputError(f"`ids` repeats {values[counts.argmax()]}; each must be unique")
    return given.astype(np.int64)


def _as_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    flat = tensor.cpu().contiguous().reshape(-1)
    return cast("npt.NDArray[np.uint8]", flat.view(torch.uint8).numpy())
