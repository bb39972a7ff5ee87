"""Probes: fixed, ordered sets of examples, and how to evaluate them without disturbing training."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sonde.exceptions import InvalidInputError
from sonde.hooks.arguments import check_whole
from sonde.hooks.model.own_warnings import without_warnings
from sonde.hooks.model.own_work import evaluating
from sonde.hooks.model.precision import full_precision, without_autocast
from sonde.hooks.model.random_states import RandomStates
from sonde.hooks.model.ranks import Shards, is_distributed, let_go_of_gathered, shards_of
from sonde.hooks.model.state import MadeParametersError, ModelState
from sonde.log import LogArray

from .axes import ExampleAxes
from .datasets import DatasetRows
from .digests import ExamplesDigest, digest, input_digest
from .ids import as_int64

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""What a model is called with: one tensor, positional tensors, or keyword tensors."""


class Probe:
    """A fixed, ordered set of examples, evaluated out of band on due steps.

    The model sees it in eval mode, and nothing of the training changes: not the mode of any module,
    no buffer, no random state, no `.grad`.

    Args:
        inputs: A tensor [examples, …], a tuple or dict of such tensors (the model's positional or
            keyword arguments), or a Dataset or DataLoader of (inputs, targets). A dataset is read
            in its own order; a DataLoader lends its `collate_fn` and batch size, not its sampler.
        targets: One target per example, [examples, …]; a dataset brings its own.
        ids: One integer per example, stable across epochs, ranks and runs. By default the position
            in `inputs`, or for a `Subset` its indices. Positions name the same examples in two runs
            only if both have the same probe; analyses of several runs compare inputs and targets.
        name: The name of this source in the log; by default `probe`.
        batch_size: How many examples are evaluated at once.
        batch_dim: The axis of inputs and targets that holds the examples, of those that have so
            many axes; the others hold them along the first. 1 for models that take [time, examples,
            …]. In outputs either may be the one.
        in_memory: Hold the examples. Otherwise only a dataset's targets are held, and of its
            examples a batch at a time, read again whenever they are needed.
        sharded: Divide the examples between the ranks of a distributed training, each of which
            gives the same whole probe to a recorder; rank 0 records them all. Activations and
            predictions are divided; other measures evaluate all examples on every rank.

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
        batch_dim: int = 0,
        in_memory: bool = True,
        sharded: bool = False,
    ) -> None:
        check_whole("batch_dim", batch_dim, 0)
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1)
        dataset = DatasetRows(inputs) if isinstance(inputs, Dataset | DataLoader) else None
        if dataset is None and not in_memory:
            raise InvalidInputError("`in_memory=False` needs a dataset, which can be read again")
        if dataset is not None:
            if targets is not None:
                raise InvalidInputError("`targets` must be left out: the dataset brings its own")
            ids = dataset.ids if ids is None else ids
            batch_size = batch_size or dataset.batch_size
        self.name = name
        self.axes = ExampleAxes(batch_dim)
        self.sharded = sharded
        self.batch_size = 256 if batch_size is None else batch_size
        self._dataset = dataset
        self._inputs: Inputs | None = None
        if dataset is not None and not in_memory:
            self.num_examples = dataset.num_examples
            targets, self._read_digests = self._read_through(dataset)
        else:
            if dataset is not None:
                inputs, targets = dataset.read(slice(None))
            self._inputs = self._hold(inputs)
            self.num_examples = self._common_length(self._inputs)
        self.targets = None if targets is None else values_of("targets", targets).detach().clone()
        self.ids = _as_ids(ids, self.num_examples)
        self._ids_are_positions = ids is None
        if self.targets is not None:
            num_targets = self.axes.size_of(self.targets)
            if num_targets != self.num_examples:
                raise InvalidInputError(
                    f"`targets` has {num_targets} examples, `inputs` {self.num_examples}"
                )

    def _hold(self, inputs: Any) -> Inputs:
        # A copy, as a probe is fixed, whatever becomes of the tensors it was made of.
        held: Inputs = map_inputs(torch.clone, _as_inputs(inputs))
        return held

    @cached_property
    def _digests(self) -> dict[str, str]:
        # Only once it is asked for: of many examples it takes longer than a small model does.
        if self._inputs is None:
            return self._read_digests
        tensors = _tensors(self._inputs)
        digests = {"input_digest": input_digest(tensors)}
        if len(tensors) > 1 or self.axes.batch_dim:
            # What a probe has, too, that reads its examples batch by batch.
            of_examples = ExamplesDigest(self.num_examples, self.axes)
            of_examples.add(tensors)
            digests["examples_digest"] = of_examples.result()
        return digests

    @property
    def inputs(self) -> Inputs:
        """The inputs of all examples, where they are held in memory.

        Raises:
            InvalidInputError: If they are not.
        """
        if self._inputs is None:
            raise InvalidInputError(f"{self!r} is not held in memory; it is read batch by batch")
        return self._inputs

    def batches(self, device: torch.device) -> Iterator[tuple[Inputs, Tensor | None]]:
        """Yield (inputs, targets) in order, `batch_size` examples at a time, on a device."""
        for rows in self.slices():
            yield self.rows(rows, device)

    def slices(self) -> Iterator[slice]:
        """Yield which examples are evaluated at once, in order."""
        for start in range(0, self.num_examples, self.batch_size):
            yield slice(start, min(start + self.batch_size, self.num_examples))

    def shards(self, block: int | None = None) -> Shards | None:
        """Return how the examples are divided between ranks; None if they are not.

        Args:
            block: Evaluate that many examples at once, which stay on one rank.
        """
        if not self.sharded or not is_distributed():
            return None
        return shards_of(self.num_examples, block or self.batch_size, unit=block or 1)

    def rows(self, rows: slice, device: torch.device) -> tuple[Inputs, Tensor | None]:
        """Return (inputs, targets) of some examples, copied to a device.

        A model may work in place on its input, so it never gets the probe's own tensors.
        """
        targets = None
        if self.targets is not None:
            targets = self.axes.rows_of(self.targets, rows).to(device, copy=True)
        if self._inputs is None:
            assert self._dataset is not None  # One of both holds the examples.
            inputs = _as_inputs(self._dataset.read(rows)[0])
        else:
            inputs = map_inputs(lambda x: self.axes.rows_of(x, rows), self._inputs)
        return map_inputs(lambda x: x.to(device, copy=True), inputs), targets

    def table(self) -> list[LogArray]:
        """Return the ids and targets, as they stand in the log."""
        arrays = [LogArray("id", self.ids, ("example",))]
        if self.targets is not None:
            targets = self.targets.movedim(self.axes.of(self.targets), 0).cpu()
            if targets.dtype == torch.bfloat16:
                targets = targets.float()
            dims = ("example", *(f"target_{axis}" for axis in range(1, targets.ndim)))
            arrays.append(LogArray("target", targets.numpy(), dims))
        return arrays

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the probe: size and digests."""
        described = {
            "num_examples": self.num_examples,
            "batch_size": self.batch_size,
            "id_digest": digest([self.ids]),
            **self._digests,
        }
        if self._ids_are_positions:
            described["ids"] = "positions"
        return described | ({"batch_dim": self.axes.batch_dim} if self.axes.batch_dim else {})

    def _common_length(self, inputs: Inputs) -> int:
        tensors = _tensors(inputs)
        sizes = {self.axes.size_of(tensor) for tensor in tensors}
        if len(sizes) != 1 or 0 in sizes:
            shapes = [tuple(tensor.shape) for tensor in tensors]
            axis = self.axes.batch_dim
            expected = f"with axis {axis} of" if axis else "[examples, …] with"
            raise InvalidInputError(
                f"`inputs` has shapes {shapes}; expected tensors {expected} the same number "
                "of examples, at least one"
            )
        return sizes.pop()

    def _read_through(self, dataset: DatasetRows) -> tuple[Tensor | None, dict[str, str]]:
        """Read a dataset once, batch by batch; return its targets and digests of its inputs."""
        of_batches = []
        of_examples = ExamplesDigest(dataset.num_examples, self.axes)
        targets = []
        num_tensors = 1
        for start in range(0, dataset.num_examples, self.batch_size):
            read, batch_targets = dataset.read(slice(start, start + self.batch_size))
            inputs = _as_inputs(read)
            self._common_length(inputs)
            tensors = _tensors(inputs)
            num_tensors = len(tensors)
            of_batches.append(input_digest(tensors))
            of_examples.add(tensors)
            targets.append(batch_targets)
        joined = None
        if targets[0] is not None:
            read_targets = [as_tensor(target) for target in targets]
            joined = torch.cat(read_targets, self.axes.of(read_targets[0]))
        if num_tensors == 1 and not self.axes.batch_dim:
            return joined, {"input_digest": of_examples.result()}
        # One tensor after the other, as `input_digest` takes them, they cannot be read in batches.
        batches = digest([np.frombuffer("".join(of_batches).encode(), np.uint8)])
        return joined, {
            "input_digest": f"batches of {self.batch_size}: {batches}",
            "examples_digest": of_examples.result(),
        }

    def __repr__(self) -> str:
        return f"Probe({self.num_examples} examples, name={self.name!r})"


class PassingProbe(Probe):
    """A probe that is gone before its inputs change, so that it needs no copy of them."""

    def _hold(self, inputs: Any) -> Inputs:
        return _as_inputs(inputs)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model with what a probe holds."""
    args, kwargs = arguments_of(inputs)
    return model(*args, **kwargs)


def arguments_of(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return what a probe holds as positional and named arguments of a model."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[RandomStates]:
    """Put a model into eval mode for a while and leave no trace of what happens meanwhile.

    Within, random numbers are drawn from a fixed seed, so a model that draws some in eval mode
    draws the same ones each time. Autocast is off, also where the model enters it by itself, and
    float32 is multiplied as such, so every device and every step gives the same.

    Args:
        model: The model; no forward pass of it may be under way.

    Yields:
        What seeds again, so that an example gets the same numbers however often a model is run.

    Raises:
        MadeParametersError: If the pass made parameters: they were drawn here, so they are not
            those of the training, and are gone again.
    """
    state = ModelState(model)
    random_states = RandomStates()
    made: list[str] = []
    try:
        state.evaluate()
        random_states.seed()
        with (
            evaluating(model),
            torch.autocast(device_of(model).type, enabled=False),
            without_autocast(model),
            full_precision(),
            run_eagerly(),
            _layer_by_layer(),
            without_warnings(),  # The model gives them in the training, too.
        ):
            yield random_states
    finally:
        random_states.restore()
        let_go_of_gathered(model)
        made = state.restore()
    if made:
        raise MadeParametersError(
            f"the model makes parameters in its first forward pass ({', '.join(made[:5])}), and "
            "the training has not run it yet; run it once first"
        )


class _Eagerly:
    """What runs compiled modules eagerly, for as long as anyone needs it.

    Several recorders begin and end their steps in any order, so the last one to end gives back what
    the first one found: contexts that are left in another order than the reverse one would not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._stance: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._num_users += 1
            # Dynamo takes seconds to import, and where it is not imported nothing is compiled.
            if self._stance is None and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_users -= 1
            if self._num_users == 0 and self._stance is not None:
                stance, self._stance = self._stance, None
                stance.__exit__(None, None, None)


_eagerly = _Eagerly()


def run_eagerly() -> AbstractContextManager[Any]:
    """Run compiled modules eagerly: a compiled graph has no hooks, and stays as it is."""
    return _eagerly


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """Let transformer layers call their parts, which their fused path in eval mode does not."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def as_tensor(values: Any) -> Tensor:
    """Return a tensor as it is, and other values as a tensor of the CPU.

    `torch.as_tensor` would bring both to the default device.
    """
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


def _as_inputs(inputs: Any) -> Inputs:
    if isinstance(inputs, Mapping):
        return {str(name): values_of("inputs", value).detach() for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(values_of("inputs", value).detach() for value in inputs)
    return values_of("inputs", inputs).detach()


def values_of(name: str, values: Any) -> Tensor:
    """Return an argument as a tensor.

    Raises:
        InvalidInputError: If it cannot be one.
    """
    try:
        return as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        dtype = getattr(values, "dtype", None)
        kind = type(values).__name__ + (f" of {dtype}" if dtype is not None else "")
        raise InvalidInputError(
            f"`{name}` contains a {kind}, which is no tensor and cannot become one ({error}); "
            "give tensors, arrays or lists of numbers"
        ) from error


def _tensors(inputs: Inputs) -> list[Tensor]:
    if isinstance(inputs, dict):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple) else [inputs]


def map_inputs(function: Callable[..., Any], inputs: Any, *others: Any) -> Any:
    """Apply a function to each tensor of inputs, and to what others have in its place."""
    if isinstance(inputs, dict):
        return {name: function(x, *(of[name] for of in others)) for name, x in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(function(*same) for same in zip(inputs, *others, strict=True))
    return function(inputs, *others)


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
    return as_int64(given)
