"""The training itself as a source: which passes make a step, and what each one's examples are."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sonde.hooks.examples.probe import run_eagerly
from sonde.hooks.losses.graphs import shown_loss
from sonde.hooks.model import own_work
from sonde.hooks.model.ranks import has_sharded_parameters
from sonde.hooks.model.taps import add_hook, is_recomputing, tensor_leaves

from .arrivals import Arrivals
from .batch_axes import BatchAxes
from .micro_batches import Batch, MicroBatch, Pass, backward_pass
from .optimizer_steps import is_updating


@dataclass(frozen=True)
class Training:
    """The live batch, as the training sees it: the source of measures in band.

    Args:
        batch_dim: The axis of the model's inputs that holds the examples.
    """

    batch_dim: int = 0
    name: ClassVar[str] = "training"


TRAINING = Training()
"""Record what the training itself computes, in its own forward and backward passes."""


# Why a micro-batch does not count.
_THROWN_AWAY = "their gradients were set to None or zero before the optimizer stepped"
_NOT_UPDATED = "their gradients came to no parameter that the attached optimizer updates"

_MISUSE = (
    "examples that recorder.batch() named belong to no forward pass of the step, because it was "
    "called twice for one micro-batch, or after its backward pass; call it once for each "
    "micro-batch, between its forward and its backward pass, or put both into "
    "`with recorder.batch(ids=…):`"
)


class TrainingStep:
    """Observes the passes of one training step, from when it is made until `stop`.

    Passes without gradients, such as those of a validation, are left out; so are those after the
    weights have changed within the optimizer's step, as one that evaluates its closure again makes
    them; and those whose gradients are gone when the optimizer steps.

    Args:
        model: The model, without wrappers.
        axes: How the batch axis of layer outputs is found.
        optimizers: Those that the recorder is attached to, which may come later.

    Attributes:
        axes: The same.
        error: What went wrong in a hook, which never raises into the training.
        mismatch: Why nothing can be recorded of the step: what the loop told does not fit.
        num_late_passes: The number of passes left out as the weights had changed.
        num_empty_passes: The number of passes left out as their batch had no example.
        dropped: How many micro-batches were left out as they did not count, by the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        axes: BatchAxes,
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        self._model = model
        self.axes = axes
        self._micro_batches: list[MicroBatch] = []
        self._forward = _forward_of(model)
        self._running: Pass | None = None
        self._depth = 0
        self._told: Batch | None = None  # Of the micro-batch that comes next.
        self._is_certain = False  # The pass is still to come, for certain.
        self._was_replaced = False  # Examples were named twice, before any pass.
        self._is_apart = False  # The next pass begins a micro-batch, whatever came before.
        # Not those a pass finds: with sharded parameters the layers then hold others, whole ones.
        self._parameters = list(model.parameters())
        self._optimizers = optimizers
        self._versions: dict[nn.Parameter, int] = {}
        self._is_lazy = any(isinstance(p, nn.UninitializedParameter) for p in model.parameters())
        self.error: Exception | None = None
        self.mismatch: str | None = None
        self.num_late_passes = 0
        self.num_empty_passes = 0
        self._parts = own_work.parts_of(model)
        self.dropped: Counter[str] = Counter()
        self._kept: dict[nn.Parameter, list[MicroBatch]] | None = None
        self._stack = ExitStack()
        self._stack.enter_context(run_eagerly())
        self._stack.callback(add_hook(model, self._guarded(self._enter), is_before=True))
        self._stack.callback(add_hook(model, self._guarded(self._leave), is_last=True))
        self._arrivals = Arrivals[MicroBatch]()
        # What arrives at sharded parameters is held elsewhere for a while.
        if not self._is_lazy and not has_sharded_parameters(model):
            self._follow_gradients()

    def stop(self) -> None:
        """Leave the model as it was."""
        self._stack.close()

    @property
    def is_paused(self) -> bool:
        """Whether what runs now is no pass of the training, but an evaluation of ours."""
        return own_work.is_evaluated(self._parts)

    def observes(self) -> bool:
        """Whether a hook that is called now is to look."""
        return self.error is None and not self.is_paused and not torch.compiler.is_compiling()

    @property
    def running_pass(self) -> Pass | None:
        """The pass of the training whose forward runs now."""
        return self._running

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """The micro-batches that gradients came back to; once it is settled, those that count."""
        return [micro_batch for micro_batch in self._micro_batches if micro_batch.has_gradients]

    def arriving(self) -> list[MicroBatch]:
        """Return the micro-batches whose gradients the backward pass that runs now brings."""
        if self.num_late_passes or not self.observes():
            return []
        passes = [one for of in self._micro_batches for one in of.passes if one.has_gradients]
        running = backward_pass()
        # Not within a reentrant checkpoint, which has a backward pass of its own.
        if not any(running in one.backward_passes for one in passes):
            running = max((max(one.backward_passes) for one in passes), default=running)
        found = [one.micro_batch for one in passes if running in one.backward_passes]
        return list(dict.fromkeys(found))

    def settle(self, *, is_before_update: bool) -> None:
        """Leave out what does not count, as the step is over.

        Args:
            is_before_update: The attached optimizer updates its parameters next, by the gradients
                that they have now. After an update these may be cleared already.
        """
        updated = self._updated()
        self._kept = self._arrivals.kept(updated if is_before_update else ())
        looked_at = updated or set(self._kept)
        counted = {one for p in looked_at for one in self._kept.get(p, [])}
        came_to = self._arrivals.came_to(looked_at)
        for one in self._arrivals.came_to(self._kept) - counted:
            self.dropped[_THROWN_AWAY if one in came_to else _NOT_UPDATED] += 1
            self._micro_batches.remove(one)

    def counts_for(self, parameter: nn.Parameter, micro_batch: MicroBatch) -> bool:
        """Tell whether the gradients of a micro-batch are in a parameter's, as far as is known."""
        kept = None if self._kept is None else self._kept.get(parameter)
        return kept is None or micro_batch in kept

    def forward_pass(self, first_input: Any) -> Pass | None:
        """Return the pass that a layer's call belongs to; None if it is not recorded.

        Args:
            first_input: What the layer was called with, for a call outside the model's own forward.
        """
        if self._depth:
            return self._running
        if not torch.is_grad_enabled():
            return None
        # The user calls a part of the model by itself.
        last = self._micro_batches[-1] if self._micro_batches else None
        if last is not None and not last.has_gradients and not self._is_apart:
            return last.passes[-1]
        leaves = tensor_leaves(first_input)
        micro_batch = self._open(len(leaves[0][1]) if leaves and leaves[0][1].ndim else None)
        if micro_batch is None:
            return None
        if not micro_batch.passes:
            micro_batch.passes.append(Pass(micro_batch))
        return micro_batch.passes[-1]

    def recomputed_pass(self) -> Pass | None:
        """Return the pass that a checkpoint computes again; None if that is not known."""
        passes = self._micro_batches[-1].passes if self._micro_batches else []
        return passes[0] if len(passes) == 1 else None

    def tell(self, batch: Batch, loss: Tensor | None, *, is_ahead: bool) -> None:
        """Take what the loop tells of a micro-batch.

        Args:
            batch: What it tells.
            loss: The loss, before its backward pass.
            is_ahead: The forward pass is still to come, for certain.
        """
        if self.error is not None:
            return
        last = self._micro_batches[-1] if self._micro_batches else None
        if is_ahead or last is None or last.has_gradients:
            self._tell_ahead(batch, is_certain=is_ahead)
        elif last.batch is None:
            self._attach(last, batch)
        elif batch.num_examples is None or batch.has_examples_of(last.batch):
            # Its examples were named before, and now comes the loss.
            if loss is not None:
                last.batch.reduction, last.batch.divided_by = batch.reduction, batch.divided_by
            if batch.num_real is not None:
                last.batch.num_real = batch.num_real
            batch = last.batch
        else:
            self._tell_ahead(batch, is_certain=False)
        if loss is not None and loss.requires_grad:
            shown = shown_loss(loss)
            batch.is_of_examples = shown is not None and shown.is_of_examples(
                batch.reduction, batch.divided_by
            )
            loss.register_hook(lambda gradient: setattr(batch, "scale", gradient.detach().clone()))

    @property
    def misuse(self) -> str | None:
        """Why examples that `Recorder.batch` named are those of no pass, once the step is over."""
        if self.num_late_passes:  # They may have been named, as those of a closure are.
            return None
        return _MISUSE if self._was_replaced or self._is_waiting() else None

    def _tell_ahead(self, batch: Batch, *, is_certain: bool) -> None:
        """Name the examples of the next pass."""
        if self._told is not batch and self._is_waiting() and batch.num_examples is not None:
            self._was_replaced |= not batch.has_examples_of(self._told)
        self._told, self._is_apart, self._is_certain = batch, True, is_certain

    def _is_waiting(self) -> bool:
        """Tell whether examples were named, perhaps by mistake, of a pass that did not come."""
        told = self._told
        return told is not None and told.num_examples is not None and not self._is_certain

    def take_back(self, batch: Batch) -> None:
        """Forget what was told of the latest passes, as it is of those to come."""
        last = self._micro_batches[-1] if self._micro_batches else None
        if last is not None and last.batch is batch:
            last.batch = None

    def end_batch(self) -> None:
        """Let the next pass begin another micro-batch."""
        self._told, self._is_apart = None, True

    def _attach(self, micro_batch: MicroBatch, batch: Batch) -> None:
        micro_batch.batch = batch
        told, size = batch.num_examples, micro_batch.size
        if told is not None and micro_batch.passes and size not in (None, told):
            # What was seen of them is divided among as many examples as they seemed to have.
            self.mismatch = (
                f"{told} examples were named of a pass over {size}; name one for each of its rows"
            )
        elif told is not None:
            micro_batch.size = told

    def _guarded(self, hook: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            if self.observes() and not is_recomputing():
                try:
                    hook(*args)
                except Exception as error:
                    self.error = error

        return call

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._running = None
        if not torch.is_grad_enabled():
            return
        size = self.axes.size_of(args, kwargs)
        micro_batch = self._open(size)
        self.num_empty_passes += size == 0 and micro_batch is None
        if micro_batch is not None:
            if _forward_of(self._model) is not self._forward:
                # As a trainer runs a whole step through it, which must not run twice.
                self.axes.give_up("its forward was replaced by another function meanwhile")
            self.axes.look(self._model, args, kwargs, micro_batch.size)  # Nothing runs as yet.
            self._running = Pass(micro_batch)
            micro_batch.passes.append(self._running)

    def _leave(self, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth or self._running is None:
            return
        if self._is_lazy:  # This pass has made the parameters.
            self._is_lazy = False
            self._versions = self._parameter_versions()
        for _suffix, tensor in tensor_leaves(output):
            if tensor.requires_grad:
                tensor.register_hook(self._running.confirm)
        self._running = None

    def _open(self, size: int | None) -> MicroBatch | None:
        """Return the micro-batch that a pass over `size` examples belongs to."""
        told = self._told
        if told is not None and told.num_examples is not None:
            size = told.num_examples
        if size == 0:
            self._told = None
            return None
        last = self._micro_batches[-1] if self._micro_batches else None
        if last is not None and not self._is_apart and not last.has_gradients:
            if size == last.size or (last.batch is not None and last.batch.num_examples):
                return last
        if not self._micro_batches:
            # Only now: before, a model is prepared, or a checkpoint is loaded into it.
            self._versions = self._parameter_versions()
        if self._has_changed():
            if not self._optimizers or is_updating(self._optimizers):
                self.num_late_passes += 1
                return None
            # Something else has moved the weights, as sharpness-aware minimization does. If what
            # came before is thrown away, its gradients are gone at the step.
            self._versions = self._parameter_versions()
        micro_batch = MicroBatch(size)
        if told is not None:
            self._attach(micro_batch, told)
        self._told, self._is_apart = None, False
        self._micro_batches.append(micro_batch)
        return micro_batch

    def _follow_gradients(self) -> None:
        for parameter in self._parameters:
            if parameter.requires_grad:
                on_arrival = parameter.register_hook(partial(self._on_arrival, parameter))
                added = parameter.register_post_accumulate_grad_hook(self._on_accumulated)
                self._stack.callback(on_arrival.remove)
                self._stack.callback(added.remove)

    def _on_arrival(self, parameter: nn.Parameter, gradient: Tensor | None) -> None:
        if gradient is None or own_work.depth() or not self.observes():
            return
        try:
            arriving = self.arriving()
            # Late passes are of no record, but their gradients may be all that the step will use.
            if arriving or self.num_late_passes:
                with own_work.within, torch.no_grad():
                    self._arrivals.add(parameter, gradient, arriving)
        except Exception as error:
            self.error = error

    def _on_accumulated(self, parameter: Tensor) -> None:
        if own_work.depth() or not self.observes():
            return
        if self.arriving() or self.num_late_passes:
            self._arrivals.note_accumulated(parameter)  # type: ignore[arg-type] # it is one

    def _parameter_versions(self) -> dict[nn.Parameter, int]:
        return {parameter: parameter._version for parameter in self._parameters}

    def _has_changed(self) -> bool:
        """Tell whether weights have changed: those that make a step, if that is known."""
        updated = self._updated()
        versions = [pair for pair in self._versions.items() if not updated or pair[0] in updated]
        return any(parameter._version != version for parameter, version in versions)

    def _updated(self) -> set[nn.Parameter]:
        """Return the parameters of the model that the attached optimizers update."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        return {p for group in groups for p in group["params"]}.intersection(self._parameters)


class BatchContext:
    """What `Recorder.batch` returns: it may be used as a context manager around the passes."""

    def __init__(self, step: TrainingStep | None, batch: Batch, loss: Tensor | None) -> None:
        self._step = step
        self._batch = batch
        if step is not None:
            step.tell(batch, loss, is_ahead=False)

    def lies_ahead(self) -> None:
        """Say that the forward pass of this micro-batch is still to come."""
        if self._step is not None:
            self._step.take_back(self._batch)
            self._step.tell(self._batch, None, is_ahead=True)

    def __enter__(self) -> None:
        self.lies_ahead()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._step is not None:
            self._step.end_batch()


def _forward_of(model: nn.Module) -> Any:  # Any: a function of any kind.
    """Return the function behind a model's forward, whatever wraps it, as for mixed precision."""
    forward = inspect.unwrap(model.forward)
    return getattr(forward, "__func__", forward)
