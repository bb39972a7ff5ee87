"""Per-example gradients of the training itself, from its own forward and backward passes.

Nothing is run again: the uses of parameters are seen in the forward pass, and the gradients that
come back to their outputs make the per-example gradients while the backward pass goes on. Where a
parameter's own gradient arrives, before it is accumulated, reduced or clipped, their sum is held
against it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sonde.hooks.gradients.factors.dense import Factor
from sonde.hooks.gradients.factors.sums import joined, summed
from sonde.hooks.gradients.uses.operations import Operation
from sonde.hooks.gradients.uses.parameters import UNSUPPORTED, OwnedParameter
from sonde.hooks.gradients.uses.stand_ins import HeldParameters
from sonde.hooks.gradients.uses.traced_places import Trace, TraceError, trace_of
from sonde.hooks.gradients.uses.uses import ParameterUses
from sonde.hooks.losses.saturation import head_attributes
from sonde.hooks.model import own_work
from sonde.hooks.model.precision import full_precision
from sonde.hooks.model.ranks import has_sharded_parameters
from sonde.hooks.model.taps import add_hook, is_recomputing
from sonde.hooks.record import Observation, Recording
from sonde.hooks.stores.stores import Full, Gram, Sketch
from sonde.hooks.training.examples_in_band import (
    describe_examples,
    left_out,
    micro_batches_of,
    nothing_of,
)
from sonde.hooks.training.micro_batches import MicroBatch
from sonde.hooks.training.source import TrainingStep

from .batch import add_operation, root_of
from .kept import KeptGradients, reduced_rows
from .live_parts import Gradients, Held, Seen
from .live_saturation import OWN, LiveSaturation, saturation_warnings
from .recorded import dtype_of, gradient_arrays
from .sum_checks import SumChecks


class LiveGradients(Observation):
    """Observes the per-example gradients of one step of the training.

    Args:
        step: The step.
        model: The model, without wrappers.
        parameters: The parameters.
        store: The form kept.
        memory: How many bytes may be held for micro-batches to come.
        per_layer: Record each layer's matrix and norms too, not only those of the sum.
    """

    def __init__(
        self,
        step: TrainingStep,
        model: nn.Module,
        parameters: Sequence[OwnedParameter],
        store: Gram | Sketch | Full,
        memory: int,
        *,
        per_layer: bool,
    ) -> None:
        self._step = step
        self._model = model
        self._parameters = {p.tensor: p for p in parameters if p.excluded is None}
        self._held = HeldParameters(model)
        self._settling: set[nn.Parameter] = set()
        self._excluded = {p: p.excluded for p in parameters if p.excluded is not None}
        self._store = store
        self._free_bytes = memory
        self._per_layer = per_layer
        self._gradients: dict[nn.Parameter, Gradients] = defaultdict(Gradients)
        self._pending: dict[nn.Parameter, list[Seen]] = defaultdict(list)
        self._checks = SumChecks()
        self._problems: dict[nn.Parameter, str] = {}
        self._couplings: list[str] = []
        self._error: Exception | None = None
        self._depth = 0
        self._uses: ParameterUses | None = None
        self._micro_batch: MicroBatch | None = None
        self._saturation = LiveSaturation(step.axes.batch_dim)
        self._untraced: str | None = None
        self._traced: Trace | None = None
        self._stack = ExitStack()
        self._stack.callback(add_hook(model, self._enter, is_before=True))
        self._stack.callback(add_hook(model, self._leave, is_last=True))
        for tensor in self._parameters:
            self._settle_with(tensor, tensor)

    def stop(self) -> None:
        """Leave the model as it was."""
        self._stack.close()

    def finish(self) -> Recording:
        """Return what was seen of the step.

        Raises:
            Exception: What went wrong in a hook, which never raises into the training.
        """
        micro_batches = micro_batches_of(self._step, self._error)
        if not micro_batches:
            return nothing_of(self._step)
        with torch.no_grad(), full_precision():
            return self._finish(micro_batches)

    def _finish(self, micro_batches: list[MicroBatch]) -> Recording:
        for tensor in list(self._pending):
            self._settle(tensor)
        self._checks.keep(micro_batches)
        failed = self._checks.failed()
        kept = KeptGradients(sum(one.num_examples for one in micro_batches))
        scales = _scales(micro_batches)
        coverage = {name: why for p, why in self._excluded.items() for name in p.names}
        missing = {
            parameter.name: why.removeprefix(UNSUPPORTED)
            for parameter, why in self._excluded.items()
            if why.startswith(UNSUPPORTED)
        }
        for tensor, parameter in self._parameters.items():
            reason: str | None = self._problems.get(tensor) or failed.get(tensor)
            if reason is None:
                reason = self._add(kept, parameter, micro_batches, scales)
            if reason is not None:
                missing[parameter.name] = reason
            verdict = "exact" if reason is None else f"{UNSUPPORTED}{reason}"
            coverage.update(dict.fromkeys(parameter.names, verdict))
        examples, attributes = describe_examples(micro_batches, of_gradients=True)
        result = kept.result(coverage, OWN, self._saturation.of(micro_batches))
        attributes |= self._attributes()
        attributes |= head_attributes(OWN, result.saturated, result.norms)
        dtype = dtype_of(self._model)
        arrays = gradient_arrays(result, self._store, dtype, per_layer=self._per_layer)
        return Recording(
            [*examples, *arrays] if arrays else [],
            attributes,
            missing | left_out(self._step)[1],
            {"coverage": {"parameters": coverage}},
            saturation_warnings(result.saturated),
        )

    def _attributes(self) -> dict[str, Any]:
        attributes: dict[str, Any] = {"sum_check": self._checks.describe()}
        if self._couplings:
            attributes["coupled"] = (
                f"{self._couplings[0]} couple the examples: a row is the contribution of its "
                "example to the gradient of the batch"
            )
        return attributes | left_out(self._step)[0]

    def _guarded(self, function: Callable[..., None]) -> Callable[..., None]:
        """Let nothing out of a hook, neither a value nor an exception."""

        def call(*args: Any) -> None:
            # A gradient of ours may be on its way from what was computed of a parameter to it.
            if self._error is None and not own_work.depth() and self._step.observes():
                try:
                    # The training's autocast would multiply in half precision.
                    device_type = _device_type(args)
                    with torch.autocast(device_type, enabled=False), full_precision():
                        with torch.no_grad(), own_work.within:
                            function(*args)
                except Exception as error:
                    self._error = error
                    self._gradients.clear()
                    self._pending.clear()

        return call

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1 or self._error is not None or not self._step.observes():
            return
        one = self._step.running_pass
        if one is None or is_recomputing():
            return
        try:
            size = one.micro_batch.size
            if size is None:
                for tensor in self._parameters:
                    self._problems[tensor] = "the number of examples is not known"
                return
            self._micro_batch = one.micro_batch
            take = partial(self._take, one.micro_batch)
            self._traced = self._trace(args, kwargs, size)
            places = None if self._traced is None else self._traced.places
            uses = ParameterUses(
                self._model, self._parameters, take, size, self._held, places=places, level=0
            )
            uses.__enter__()
            self._uses = uses
        except Exception as error:
            self._error = error

    def _trace(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int) -> Trace | None:
        """Return where examples are, as a run on a few has shown; None if that is not possible."""
        self._untraced = self._step.axes.problem
        if self._untraced is not None or size < 2:
            return None
        try:
            batch_dim = self._step.axes.batch_dim
            return trace_of(self._model, self._parameters, args, kwargs, size, batch_dim)
        except TraceError as reason:
            self._untraced = str(reason)
            return None

    def _leave(self, *called: Any) -> None:
        self._depth -= 1
        if self._depth or self._uses is None:
            return
        uses, self._uses = self._uses, None
        uses.__exit__(None, None, None)
        self._error = self._error or uses.error
        try:
            assert self._micro_batch is not None  # As the pass was entered.
            self._saturation.watch(self._micro_batch, called[-1], self._guarded)
        except Exception as error:
            self._error = self._error or error
        for tensor, reason in uses.problems.items():
            self._problems.setdefault(tensor, reason)
        if self._traced and uses.num_reorderings != self._traced.num_reorderings:
            for tensor in self._parameters:
                reason = "rows of examples are taken in another order than in eval mode"
                self._problems.setdefault(tensor, reason)
        if self._untraced is not None:
            # The sum of wrong per-example gradients is right as well, so nothing else would tell.
            for tensor in uses.undecided:
                reason = "two axes have the size of the batch; take another batch size"
                self._problems.setdefault(tensor, reason)
            for tensor in () if has_sharded_parameters(self._model) else uses.unordered:
                reason = f"it is not known which of several rows are whose, as {self._untraced}"
                self._problems.setdefault(tensor, reason)
        self._couplings += uses.couplings

    def _settle_with(self, tensor: nn.Parameter, held: nn.Parameter) -> None:
        """Settle a parameter as the gradient of what its layer holds of it arrives."""
        self._settling.add(held)
        hook = self._guarded(partial(self._settle, tensor))
        self._stack.callback(held.register_hook(hook).remove)

    def _take(
        self, micro_batch: MicroBatch, operation: Operation, outputs: Sequence[Tensor]
    ) -> None:
        """Wait for the gradients of an operation's outputs."""
        seen = Seen(operation, micro_batch, [None] * len(outputs))
        for use in operation.uses:
            for tensor in use.parameters.keys() & self._parameters.keys():
                self._pending[tensor].append(seen)
                held = use.parameters[tensor]
                if held not in self._settling:
                    # No gradient arrives at a sharded one: it is made of those of all ranks.
                    self._settle_with(tensor, held)
        for at, output in enumerate(outputs):
            if output.requires_grad:
                root_of(output).register_hook(self._guarded(partial(self._take_delta, seen, at)))

    def _take_delta(self, seen: Seen, at: int, delta: Tensor | None) -> None:
        if delta is None:
            return
        if seen.is_used or seen.deltas[at] is not None:
            for use in seen.operation.uses:
                for tensor in use.parameters:
                    reason = "gradients came back to its outputs more than once in a step"
                    self._problems.setdefault(tensor, reason)
            return
        seen.deltas[at] = delta.detach()
        if len(seen.deltas) == 1 and not seen.operation.is_gathered:
            # The values of gathered parameters are there when their own gradient arrives.
            self._use(seen)

    def _use(self, seen: Seen) -> None:
        """Make the gradients of an operation's parameters, as what came back to it is complete."""
        if seen.is_used:
            return
        seen.is_used = True
        parts: dict[nn.Parameter, list[Factor]] = defaultdict(list)
        if seen.has_deltas:
            add_operation(seen.operation, seen.deltas, parts, self._problems)
        for tensor, factors in parts.items():
            self._gradients[tensor].parts[seen.micro_batch] += factors

    def _settle(self, tensor: nn.Parameter, gradient: Tensor | None = None) -> None:
        """Keep what a store keeps of the gradients of a parameter that have come."""
        pending = self._pending.pop(tensor, [])
        for seen in pending:
            self._use(seen)
        found = self._gradients[tensor]
        parts, found.parts = found.parts, defaultdict(list)
        if not parts and found.held:
            return  # Of a pass that is not recorded, as the weights had changed.
        total: Tensor | None = None
        for micro_batch, of_micro_batch in parts.items():
            factor = summed(of_micro_batch)
            if micro_batch in found.held:
                reason = "gradients came back to it more than once in a step"
                self._problems.setdefault(tensor, reason)
                continue
            if gradient is not None:
                total = factor.sum() if total is None else total + factor.sum()
            found.held[micro_batch] = self._hold(self._parameters[tensor], factor)
        if gradient is not None and tensor not in self._problems:
            terms = [seen.terms() for seen in pending if seen.has_deltas]
            rows = [factor for of in parts.values() for factor in of]
            self._checks.add(tensor, gradient, total, terms, rows, self._step.arriving())

    def _hold(self, parameter: OwnedParameter, factor: Factor) -> Held:
        if not isinstance(self._store, Gram):
            return Held(None, *reduced_rows(self._store, parameter.name, factor))
        num_bytes = factor.row_bytes * factor.num_examples
        if num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            return Held(factor)
        products = factor.gram()
        return Held(None, products, products.diagonal())

    def _add(
        self,
        kept: KeptGradients,
        parameter: OwnedParameter,
        micro_batches: Sequence[MicroBatch],
        scales: Tensor,
    ) -> str | None:
        """Add the gradients of a parameter to what is kept; return why that is impossible."""
        found = self._gradients[parameter.tensor].held
        held = [found[one] for one in micro_batches if one in found]
        if not held:
            return "no gradient came back to it"
        gone = [m for m in micro_batches if not self._step.counts_for(parameter.tensor, m)]
        if gone:
            of = f"{len(gone)} of {len(micro_batches)} micro-batches"
            return f"its gradients of {of} were set to None or zero before the optimizer stepped"
        if len(held) < len(micro_batches):
            return f"it was seen in {len(held)} of {len(micro_batches)} micro-batches"
        if isinstance(self._store, Gram):
            factors = [one.factor for one in held if one.factor is not None]
            if len(factors) < len(held) > 1:
                return (
                    f"the gradients of its {len(held)} micro-batches take more memory than "
                    "`memory` allows; raise it, or use store=Sketch() or Full()"
                )
            products = joined(factors).gram() if factors else held[0].values
            assert products is not None
            kept.add_products(parameter, products * scales[:, None] * scales)
            return None
        start = 0
        for one in held:
            assert one.values is not None
            assert one.squares is not None
            rows = scales[start : start + len(one.values)]
            values = one.values * rows[:, None].to(one.values.dtype)
            kept.add_rows(self._store, parameter, values, one.squares * rows**2, start)
            start += len(one.values)
        return None


def _scales(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Return what makes each gradient that of an example's own loss, float64 [examples]."""
    parts = []
    for one in micro_batches:
        factor = one.factor()
        value = 1.0 if factor is None else float(factor)
        parts.append(torch.full((one.num_examples,), value, dtype=torch.float64, device="cpu"))
    return torch.cat(parts)


def _device_type(args: Sequence[Any]) -> str:
    return next((x.device.type for x in args if isinstance(x, Tensor)), "cpu")
