"""Activations: the outputs of layers on a probe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sonde.hooks.examples.axes import why_no_axis
from sonde.hooks.examples.probe import Probe, call, device_of, undisturbed
from sonde.hooks.examples.rows import OutputPlace
from sonde.hooks.examples.small_runs import SmallRun, run_small
from sonde.hooks.model.layers import select_layers
from sonde.hooks.model.random_states import RandomStates
from sonde.hooks.model.ranks import Shards, agreed, take_buffers_of_first, tell_all
from sonde.hooks.model.taps import tapped, tensor_leaves
from sonde.hooks.record import Recording, Subject
from sonde.hooks.stores.accumulators import Accumulator, Room
from sonde.hooks.stores.passes import Pass, pass_bytes, plan_passes
from sonde.hooks.stores.references import reference_attributes
from sonde.hooks.stores.sharded_outputs import OwnPart, join_ranks
from sonde.hooks.stores.stores import Gram, Store
from sonde.hooks.training.source import TrainingStep
from sonde.log import LogArray

from .layer_measure import LayerMeasure
from .live_outputs import LiveOutputs

# The share of the memory that is left for what is made on the way, as one part in so many.
_SPARE_SHARE = 8


class Activations(LayerMeasure):
    """Record layer outputs: on a probe, in eval mode, or those of the training itself.

    `Activations(TRAINING)` takes the outputs of the training's own forward passes, of every
    micro-batch between a due step and the next one; passes that no gradient comes back to, such as
    those of a validation, are left out. `Recorder.batch` names their examples.

    Feature maps are flattened: every layer is an examples × features matrix. A layer called again
    in one forward pass is recorded as `name#1`; of an output with several tensors each is recorded,
    as `name[0]`, `name[1]`, …. The axis of the examples need not be the first one: it is found by
    running the model on fewer of them. Where the first axis holds several rows of each example,
    such as windows, heads or tokens, [n · k, …] or [k · n, …], an example's features are all its
    rows; four more runs on three examples, once for each model, show which they are. Outputs whose
    rows cannot be told apart are named with the reason.

    Args:
        source: The examples: a `Probe`, what one takes, or `TRAINING`.
        layers: Globs, module types or predicates; None takes every module without children.
        store: The form kept: `Gram()`, `Sketch(dim)` or `Full()`.
        memory: How many bytes `Gram` may hold: its matrices and, with more examples than the
            probe's `batch_size`, features of earlier batches. Features that do not fit beside the
            matrices are held in another pass over the probe; they have a quarter of it at least.
            An eighth is left for what is made on the way. Of the training, which cannot be
            repeated, layers whose features do not fit lack steps of several micro-batches. Of a
            sharded probe a rank holds the features of all its examples of a layer, and beside them
            those of another rank.
        when: When it is due; None takes the recorder's schedule.

    Raises:
        InvalidInputError: If `memory` is below 1.
    """

    name = "activations"

    @cached_property
    def _small(self) -> WeakKeyDictionary[nn.Module, SmallRun]:
        """What a small batch showed of each model."""
        return WeakKeyDictionary()

    def observe(self, subject: Subject, step: TrainingStep) -> LiveOutputs:
        """Begin to take the outputs of the training's next forward passes."""
        return self._observe(subject, step, of_gradients=False)

    def record_bytes(self, subject: Subject) -> int | None:
        """Estimate the bytes of one record on a probe, from a run on two examples."""
        if self.probe is None:
            return None
        model = subject.model
        if model not in self._small:
            selected = select_layers(model, self.layers)
            with undisturbed(model):
                self._small[model] = self._run_small(model, self.probe, selected)
        return sum(self._small[model].kept_bytes(self.store, self.probe.num_examples).values())

    def record(self, subject: Subject) -> Recording:
        """Run the probe forward and keep what the store keeps of each layer."""
        selected = select_layers(subject.model, self.layers)
        model, probe = subject.model, self.probe
        assert probe is not None  # Of the training it is observed.
        shards = self._shards(probe)
        with undisturbed(model) as random_states, torch.no_grad():
            if shards is not None:
                return self._record_sharded(model, probe, selected, shards, random_states)
            if model not in self._small or not self._small[model].is_settled:
                self._small[model] = self._run_small(model, probe, selected)
            small = self._small[model]
            block = self.store.block if isinstance(self.store, Gram) else None
            batch_size = block or probe.batch_size
            starts = range(0, probe.num_examples, batch_size)
            sizes = [min(batch_size, probe.num_examples - start) for start in starts]
            held_bytes = small.held_bytes(self.store)
            kept_bytes = small.kept_bytes(self.store, probe.num_examples)
            outputs = _Outputs(self.store, probe.num_examples, small)
            for held in plan_passes(held_bytes, sizes, self._usable_bytes, kept_bytes):
                first = min((batches.start for batches in held.values()), default=0)
                outputs.start_pass(held, starts[first], pass_bytes(held, held_bytes, sizes))
                for batch in range(first, len(starts)):
                    outputs.start_batch(batch, sizes[batch])
                    rows = slice(starts[batch], starts[batch] + sizes[batch])
                    random_states.seed(rows.start)
                    with tapped(selected, outputs.on_call):
                        call(model, probe.rows(rows, device_of(model))[0])
        recording = outputs.recording(selected)
        block_sizes = self.store.block_sizes(sizes)
        if block_sizes is not None:
            recording.attributes["block_sizes"] = block_sizes
        return recording

    @property
    def _usable_bytes(self) -> int:
        """How many bytes matrices and features may take."""
        return self.memory - self.memory // _SPARE_SHARE

    def _shards(self, probe: Probe) -> Shards | None:
        return probe.shards(self.store.block if isinstance(self.store, Gram) else None)

    def _record_sharded(
        self,
        model: nn.Module,
        probe: Probe,
        selected: dict[str, nn.Module],
        shards: Shards,
        random_states: RandomStates,
    ) -> Recording:
        """Run this rank's part of the probe; the recording of rank 0 is of all parts."""
        take_buffers_of_first(model)
        if model not in self._small:
            self._small[model] = agreed(lambda: self._run_small(model, probe, selected))
        small = self._small[model]
        own = OwnPart(self.store, shards)
        outputs = _Outputs(own, shards.num_examples, small)
        held_bytes = small.held_bytes(self.store)
        kept_bytes = small.kept_bytes(self.store, probe.num_examples)
        arrays: list[LogArray] = []
        # A layer is held whole, as if another batch without examples came.
        for held in plan_passes(held_bytes, [shards.largest, 0], self._usable_bytes, kept_bytes):
            outputs.start_pass(dict.fromkeys(held, range(1)), 0)
            agreed(lambda: self._run_part(model, probe, selected, shards, outputs, random_states))
            outputs.add_missing(tell_all(outputs.missing))
            for name in outputs.complete(held):
                arrays += join_ranks(outputs.accumulator(name), shards, name)
        if not shards.is_first:
            return Recording()
        recording = outputs.recorded(arrays)
        block_sizes = self.store.block_sizes(shards.all_batch_sizes())
        if block_sizes is not None:
            recording.attributes["block_sizes"] = block_sizes
        return recording

    def _run_part(
        self,
        model: nn.Module,
        probe: Probe,
        selected: dict[str, nn.Module],
        shards: Shards,
        outputs: _Outputs,
        random_states: RandomStates,
    ) -> None:
        for rows, is_own in shards.batches():
            random_states.seed(rows.start)
            outputs.start_batch(0, rows.stop - rows.start)
            with tapped(selected if is_own else {}, outputs.on_call):
                call(model, probe.rows(rows, device_of(model))[0])
        if shards.num_examples:
            outputs.finish_pass(selected)

    def _run_small(
        self, model: nn.Module, probe: Probe, selected: dict[str, nn.Module]
    ) -> SmallRun:
        """Run a small batch, whose outputs show which axis holds the examples.

        In a full batch another axis may have the same size by chance, such as the time steps.
        """
        num_rows = 2 if min(probe.batch_size, probe.num_examples) > 2 else 1
        if (shards := self._shards(probe)) is not None:
            num_rows = shards.unlike_size()
        return run_small(model, probe, num_rows, selected)


class _Outputs:
    """Collects the outputs of layers over the batches of a probe, in one pass or several."""

    def __init__(self, store: Store | OwnPart, num_examples: int, small: SmallRun) -> None:
        self._store = store
        self._room = Room(small.device)
        self._num_examples = num_examples
        self._small = small
        self._places: dict[str, OutputPlace] = {}
        self._held: Pass = {}
        self._none = small.none
        self._accumulators: dict[str, Accumulator] = {}
        self._counts: Counter[str] = Counter()
        self._shapes = {name: list(features.shape[1:]) for name, features in self._none.items()}
        self.missing: dict[str, str] = {}
        self._called: set[nn.Module] = set()

    def start_pass(self, held: Pass, first: int, num_bytes: int = 0) -> None:
        """Start a pass over the probe.

        Args:
            held: The batches of outputs that it holds.
            first: The example it begins at.
            num_bytes: How many bytes it holds.
        """
        self._held = held
        for accumulator in self._accumulators.values():
            accumulator.start(first)
        self._room.clear(0)  # Before matrices of other layers come.
        for name in held:
            if name in self._none and name not in self._accumulators and name not in self.missing:
                features = self._none[name]
                accumulator = self._store.accumulator(self._num_examples, features, self._room)
                accumulator.start(first)
                self._accumulators[name] = accumulator
        self._room.clear(num_bytes)

    def start_batch(self, number: int, size: int) -> None:
        """Start a batch of the probe."""
        self._batch = number
        self._size = size

    def on_call(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        """Take one output of a layer."""
        self._called.add(module)
        leaves = tensor_leaves(output)
        if not leaves:
            self.missing[name] = f"its output ({type(output).__name__}) holds no tensor"
        for suffix, tensor in leaves:
            self._add(f"{name}{suffix}", tensor)

    def recording(self, selected: dict[str, nn.Module]) -> Recording:
        """Return what was collected, and which layers are missing."""
        self._held = dict.fromkeys(self._accumulators, range(0))
        self.finish_pass(selected)
        complete = self.complete(self._accumulators)
        arrays = [self._accumulators[name].arrays(name) for name in complete]
        return self.recorded([array for of_layer in arrays for array in of_layer])

    def finish_pass(self, selected: dict[str, nn.Module]) -> None:
        """Note what is missing of the outputs whose last batch this was, and of the layers."""
        for name in self._held:
            if name not in self.missing and self._counts[name] != self._num_examples:
                self.missing[name] = f"it saw {self._counts[name]} of {self._num_examples} examples"
        for name, module in selected.items():
            if module not in self._called:
                self.missing[name] = "it was never called in the forward pass"

    def add_missing(self, of_ranks: Sequence[dict[str, str]]) -> None:
        """Note what is missing on any rank."""
        for rank, missing in enumerate(of_ranks):
            for name, reason in missing.items():
                self.missing.setdefault(name, f"on rank {rank} {reason}")

    def complete(self, names: Iterable[str]) -> list[str]:
        """Return those of some outputs that nothing is missing of."""
        return [name for name in names if name in self._accumulators and name not in self.missing]

    def accumulator(self, name: str) -> Accumulator:
        """Return what takes the features of an output."""
        return self._accumulators[name]

    def recorded(self, arrays: list[LogArray]) -> Recording:
        """Return a recording of these arrays, and what is missing."""
        shapes = {
            array.layer: self._shapes[array.layer] for array in arrays if array.layer is not None
        }
        attributes: dict[str, Any] = {**reference_attributes(arrays)}
        notes: dict[str, Mapping[str, Any]] = {"layers": {"feature_shapes": shapes}}
        return Recording(arrays, attributes, self.missing, notes)

    def _add(self, name: str, tensor: Tensor) -> None:
        if name in self.missing:
            return
        if tensor.is_nested:
            self.missing[name] = "its output is a nested tensor"
            return
        place = self._place(name, tensor)
        if isinstance(place, str):
            self.missing[name] = place
            self._accumulators.pop(name, None)
            return
        if not tensor.is_floating_point():
            self.missing[name] = f"its output is {tensor.dtype}, not floating point"
            return
        if name not in self._held:
            return  # It is the turn of others.
        features = place.features(tensor, self._size)
        if self._shapes[name] != list(features.shape[1:]):
            self.missing[name] = (
                f"its output for an example changes in shape between batches: "
                f"{self._shapes[name]}, then {list(features.shape[1:])}"
            )
            self._accumulators.pop(name, None)
            return
        is_held = self._batch in self._held[name]
        self._accumulators[name].add(features, is_held=is_held)
        self._counts[name] += len(features) * is_held

    def _place(self, name: str, tensor: Tensor) -> OutputPlace | str:
        if not self._small.seen(name):
            return why_no_axis(tensor.shape, self._size)
        known = self._places.get(name)
        if known is not None and known.holds(tensor.shape, self._size):
            return known
        place = self._small.place(name, tensor.shape, self._size)
        if isinstance(place, OutputPlace):
            if known is not None:
                return why_no_axis(tensor.shape, self._size)
            self._places[name] = place
        return place
