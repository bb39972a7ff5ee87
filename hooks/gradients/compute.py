"""Per-example gradients of a set of examples: one forward and one backward pass, no loop.

The forward pass notes which operations use parameters; one backward pass of the summed losses gives
the gradients with respect to their outputs; a rule per operation turns both into per-example
gradients, and of these only what a store keeps is made. The gradient of one example is that of its
own loss, not divided by the number of examples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.examples.axes import OutputAxes
from sonde.hooks.examples.probe import PassingProbe, Probe, arguments_of, undisturbed
from sonde.hooks.examples.rows import NUM_EXCHANGED
from sonde.hooks.examples.small_runs import seen_by
from sonde.hooks.gradients.factors.dense import Factor
from sonde.hooks.gradients.factors.sums import joined
from sonde.hooks.gradients.rules.places import ORDERS
from sonde.hooks.gradients.rules.recurrent import backward_through_recurrent
from sonde.hooks.gradients.uses.checkpoints import checkpoints_run_once
from sonde.hooks.gradients.uses.parameters import UNSUPPORTED, OwnedParameter, owned_parameters
from sonde.hooks.gradients.uses.stand_ins import HeldParameters
from sonde.hooks.gradients.uses.traced_places import TraceError, trace_of
from sonde.hooks.losses.coupled import COUPLED
from sonde.hooks.losses.float64_heads import FLOAT64
from sonde.hooks.losses.per_example import Loss
from sonde.hooks.model.layers import Selector, layers_of, select_layers
from sonde.hooks.model.random_states import RandomStates
from sonde.hooks.model.ranks import gradients_unsynced, has_sharded_parameters, let_go_of_gathered
from sonde.hooks.stores.stores import Full, Gram, Sketch, Store

from .batch import BatchGradients, batch_gradients
from .checks import differing, weighing
from .given_examples import GivenExamples
from .kept import KeptGradients, reduced_rows
from .result import ExampleGradientResult
from .verdicts import Problems, Verdict, verdict_of
from .without_rules import WithoutRules, that_fit

EXACT = "exact"

_Factors: TypeAlias = defaultdict[OwnedParameter, list[Factor]]


def example_gradients(
    model: nn.Module,
    loss: Loss | None,
    inputs: Probe | Any,
    targets: Any = None,
    *,
    store: Store | None = None,
    layers: Selector | Sequence[Selector] | None = None,
    others: Probe | tuple[Any, Any] | None = None,
    batch_size: int | None = None,
    memory: int = 1 << 30,
) -> ExampleGradientResult:
    """Compute per-example gradients of a model, in eval mode; the model is left as it was.

    For each shape of a batch, every parameter is held once against the gradients of two examples
    that are run alone. What no rule covers, or does not pass, is given to `torch.func`; what that
    cannot transform is evaluated one example after the other, which takes a forward and a backward
    pass for each. Where not even that works, as with a model that fails on one example, the
    parameter is named.

    The loss sees the model's outputs in float64, and what ends a model in it, such as log-softmax
    or a loss of its own, is computed in float64; the rest of the model stays as it is. In float32
    softmax − one-hot rounds the true class's entry to 0 where the model is sure of an example, so
    that a third of its gradient's direction is left.

    Args:
        model: The model.
        loss: (outputs, targets) of a batch to a scalar. It is applied to one example at a time, so
            mean and sum over the batch give the same, and class weights that a mean divides out
            have no effect. None where the model returns its loss, the mean over the batch.
        inputs: The examples: a `Probe`, or what one takes.
        targets: One target per example.
        store: The form: `Gram()`, `Sketch(dim)` or `Full()`.
        layers: Only parameters of these layers; None takes all.
        others: Other examples, a `Probe` or (inputs, targets) like the first ones: the inner
            products of the gradients of the first with those of these are computed, such as of
            training and validation examples. Only of `Gram`.
        batch_size: How many examples are evaluated at once.
        memory: How many bytes `Gram` may hold of all examples; what does not fit takes another pass
            over the examples, for other layers. What no rule covers is evaluated for as many
            parameters at once as fit into it with the rows of a batch, whatever the store.

    Returns:
        The gradients in that form, and what is covered.

    Raises:
        InvalidInputError: If the loss is no scalar, the outputs have no row per example, or options
            do not fit together.
        LayerNotFoundError: If a selector takes nothing.

    Example:
        >>> from torch import nn
        >>> from torch.nn.functional import cross_entropy
        >>> model = nn.Linear(4, 3)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> example_gradients(model, cross_entropy, x, y).total.shape
        torch.Size([8, 8])
    """
    kept = check_store(Gram() if store is None else store)
    probe = _as_probe(inputs, targets, batch_size)
    probes = [probe]
    if isinstance(others, Probe):
        probes.append(others)
    elif others is not None:
        batch_dim = probe.axes.batch_dim
        pair = _pair(others)
        probes.append(PassingProbe(*pair, batch_size=probe.batch_size, batch_dim=batch_dim))
    if len(probes) > 1 and not isinstance(kept, Gram):
        raise InvalidInputError(f"`others` takes inner products, which {kept!r} does not keep")
    layers_of(model)  # Refuses what cannot be evaluated, before anything is touched.
    selected = None if layers is None else select_layers(model, layers)
    with (
        undisturbed(model) as random_states,
        gradients_unsynced(model),
        backward_through_recurrent(model),
        checkpoints_run_once(),
    ):
        let_go_of_gathered(model)  # Such as those that a validation has left.
        evaluation = _Evaluation(model, loss, probes, kept, memory, random_states)
        return evaluation.run(owned_parameters(model, selected))


def check_store(store: Store) -> Gram | Sketch | Full:
    """Return a store in which gradients can be kept.

    Raises:
        InvalidInputError: If it is none.
    """
    if not isinstance(store, Gram | Sketch | Full):
        raise InvalidInputError(f"`store` (={store!r}) must be Gram(), Sketch(dim) or Full()")
    if isinstance(store, Gram) and store.block is not None:
        raise InvalidInputError("`store` must be Gram(), without blocks, of gradients")
    if isinstance(store, Full) and (store.pool is not None or store.units is not None):
        raise InvalidInputError("`store` must be Full() or Full(dtype) of gradients")
    return store


class _Evaluation:
    """One evaluation of per-example gradients."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        probes: list[Probe],
        store: Gram | Sketch | Full,
        memory: int,
        random_states: RandomStates,
    ) -> None:
        self._model = model
        self._loss = loss
        self._probes = probes
        self._store = store
        self._memory = memory
        self._random_states = random_states
        self._output_axes = [OutputAxes(probe.axes, seen_by(model, probe)) for probe in probes]
        self._held = HeldParameters(model)
        self._saturated: dict[int, Tensor | None] = {}
        self._head = FLOAT64
        self._without_rules = WithoutRules(model, loss, self._held, memory)
        self._unsupported = self._without_rules.unsupported

    def run(self, parameters: list[OwnedParameter]) -> ExampleGradientResult:
        """Compute the gradients of some parameters."""
        trained = []
        coverage: dict[str, str] = {}
        for parameter in parameters:
            if parameter.excluded is None:
                trained.append(parameter)
            else:
                coverage.update(dict.fromkeys(parameter.names, parameter.excluded))
        kept = self._kept_of(trained)
        while kept.added & self._unsupported.keys():
            # What turned out only in a later batch is in the sums already.
            kept = self._kept_of(trained)
        for parameter in trained:
            coverage.update(dict.fromkeys(parameter.names, self._coverage(parameter)))
        kept.sort(trained)
        return kept.result(coverage, self._head, self._are_saturated())

    def _are_saturated(self) -> Tensor | None:
        """Return which of the first examples are saturated, if that is known of each."""
        found = [self._saturated.get(rows.start) for rows in self._probes[0].slices()]
        known = [mask.cpu() for mask in found if mask is not None]
        return torch.cat(known) if len(known) == len(found) else None

    def _kept_of(self, trained: list[OwnedParameter]) -> KeptGradients:
        """Return what the store keeps of all examples, but of parameters known as unsupported."""
        kept = KeptGradients(self._probes[0].num_examples)
        remaining = [p for p in trained if p.name not in self._unsupported]
        while remaining:
            done = self._pass(remaining, kept)
            remaining = [parameter for parameter in remaining if parameter not in done]
        return kept

    def _coverage(self, parameter: OwnedParameter) -> str:
        if parameter.name in self._unsupported:
            return f"{UNSUPPORTED}{self._unsupported[parameter.name]}"
        return self._without_rules.coverage(parameter.name) or EXACT

    def _pass(self, wanted: list[OwnedParameter], kept: KeptGradients) -> list[OwnedParameter]:
        """Run the examples, for as many parameters as memory allows; return which."""
        group = wanted
        factors: list[_Factors] = [defaultdict(list) for _ in self._probes]
        is_first = True
        for at, probe in enumerate(self._probes):
            for rows in probe.slices():
                examples = GivenExamples(self._model, probe, rows, self._random_states)
                verdict = verdict_of(self._model, self._loss, examples)
                found = self._by_rule(at, examples, verdict, group)
                if is_first and isinstance(self._store, Gram):
                    number = sum(of.num_examples for of in self._probes)
                    group = that_fit(group, found, number, self._memory, self._unsupported)
                is_first = False
                self._take(found, group, factors[at], kept, rows.start)
                others = [p for p in group if p.name in verdict.problems]
                others = [p for p in others if p.name not in self._unsupported]
                for part in self._without_rules.parts(examples, verdict, others):
                    self._take(part, group, factors[at], kept, rows.start)
        for parameter in group:
            if parameter in factors[0] and parameter.name not in self._unsupported:
                kept.add_products(
                    parameter, *_products([joined(of.pop(parameter)) for of in factors])
                )
        return group

    def _take(
        self,
        found: dict[OwnedParameter, Factor],
        group: Sequence[OwnedParameter],
        factors: _Factors,
        kept: KeptGradients,
        start: int,
    ) -> None:
        """Keep the gradients of some examples, the first of which is `start`; let go of them."""
        for parameter in group:
            factor = found.pop(parameter, None)
            if factor is None:
                continue
            if isinstance(self._store, Gram):
                factors[parameter].append(factor)
            else:
                reduced = reduced_rows(self._store, parameter.name, factor)
                kept.add_rows(self._store, parameter, *reduced, start)

    def _by_rule(
        self, at: int, examples: GivenExamples, verdict: Verdict, group: Sequence[OwnedParameter]
    ) -> dict[OwnedParameter, Factor]:
        """Compute the gradients of some examples that rules give; note why they do not others."""
        untraced = [p for p in group if p.name not in verdict.traced]
        if untraced:
            verdict.problems |= self._routed(examples, untraced)
            verdict.traced |= {parameter.name for parameter in untraced}
        problems = verdict.problems
        found: dict[OwnedParameter, Factor] = {}
        remaining = [p for p in group if p.name not in problems]
        while remaining:
            batch = self._by_rules(at, examples, verdict, remaining)
            self._head = self._head if batch.head == FLOAT64 else batch.head
            if at == 0:
                self._saturated[examples.rows.start] = batch.are_saturated
            found |= {p: batch.factors[p.tensor] for p in remaining if p.tensor in batch.factors}
            remaining = self._check(verdict, batch, examples, remaining)
        # No gradient of an example is there to be found.
        self._unsupported |= {n: why for n, why in problems.items() if why.startswith(COUPLED)}
        self._without_rules.problems |= {
            p.name: problems[p.name] for p in group if p.name in problems
        }
        return {p: factor for p, factor in found.items() if p.name not in problems}

    def _routed(self, examples: GivenExamples, parameters: list[OwnedParameter]) -> Problems:
        """Return the parameters of whose rows it depends on the examples which are whose.

        The next batch of the same shape may have them in another order.
        """
        number = min(examples.num_examples, NUM_EXCHANGED + 1)
        if number < 2 or has_sharded_parameters(self._model):
            return {}
        args, kwargs = arguments_of(examples.first(number))
        tensors = [parameter.tensor for parameter in parameters]
        batch_dim = examples.probe.axes.batch_dim
        try:
            trace = trace_of(self._model, tensors, args, kwargs, number, batch_dim)
        except TraceError:
            return {}
        reason = "it depends on the examples which of its rows are whose"
        return {p.name: reason for p in parameters if not trace.places.get(p.tensor, True)}

    def _by_rules(
        self,
        at: int,
        examples: GivenExamples,
        verdict: Verdict,
        parameters: Sequence[OwnedParameter],
    ) -> BatchGradients:
        choices = {
            parameter.tensor: choice
            for parameter in parameters
            if (choice := verdict.choices.get(parameter.name))
        }
        return batch_gradients(
            self._model,
            self._loss,
            *examples.take(),
            examples.num_examples,
            [parameter.tensor for parameter in parameters],
            self._held,
            choices,
            self._output_axes[at],
            holds_loss=not verdict.checked,
        )

    def _check(
        self,
        verdict: Verdict,
        batch: BatchGradients,
        examples: GivenExamples,
        parameters: Sequence[OwnedParameter],
    ) -> list[OwnedParameter]:
        """Note problems; return the parameters whose examples may be at another place."""
        reasons = dict(batch.problems)
        verdict.in_functions |= {p.name for p in parameters if p.tensor in batch.in_functions}
        if batch.couples:
            reasons = dict.fromkeys((parameter.tensor for parameter in parameters), COUPLED)
        else:
            reasons |= self._differing_in(examples, verdict, batch, parameters)
        again = []
        for parameter in parameters:
            choice = verdict.choices.get(parameter.name, 0) + 1
            if parameter.tensor not in reasons:
                verdict.checked.add(parameter.name)
            elif parameter.tensor in batch.ambiguous and choice < len(ORDERS):
                verdict.choices[parameter.name] = choice
                again.append(parameter)
            else:
                verdict.problems[parameter.name] = reasons[parameter.tensor]
        return again

    def _differing_in(
        self,
        examples: GivenExamples,
        verdict: Verdict,
        batch: BatchGradients,
        parameters: Sequence[OwnedParameter],
    ) -> dict[nn.Parameter, str]:
        """Return which gradients by rules differ from those of examples alone.

        What examples weigh in a model's own loss is held in every batch, as values decide it.
        """
        given = [p for p in parameters if p.tensor in batch.factors]
        unchecked = [p for p in given if p.name not in verdict.checked]
        if self._loss is None and batch.shares is not None and bool((batch.shares != 1).any()):
            unchecked = given
        differ = self._differing(examples, batch, unchecked) if unchecked else {}
        if self._loss is not None or batch.shares is not None or not given:
            return differ
        decided = [reason for tensor, reason in differ.items() if tensor not in batch.ambiguous]
        if decided:
            # Part of the loss may couple the examples; it is not known which parameters it reaches.
            return dict.fromkeys((p.tensor for p in given), decided[0]) | differ
        start = examples.rows.start
        others = [p for p in given if p.tensor not in differ]
        if others and not differ:
            return weighing(self._model, examples.probe, start, batch, others, self._held)
        return differ

    def _differing(
        self, examples: GivenExamples, batch: BatchGradients, parameters: Sequence[OwnedParameter]
    ) -> dict[nn.Parameter, str]:
        start = examples.rows.start
        return differing(
            self._model, self._loss, examples.probe, start, batch, parameters, self._held
        )


def _products(factors: list[Factor]) -> tuple[Tensor, Tensor | None]:
    """Return the inner products of one set of gradients; or between two, and squared norms."""
    if len(factors) > 1:
        return factors[0].cross(factors[1]), factors[0].squared_norms()
    return factors[0].gram(), None


def _as_probe(inputs: Any, targets: Any, batch_size: int | None) -> Probe:
    if isinstance(inputs, Probe):
        if targets is not None or batch_size is not None:
            raise InvalidInputError("a Probe brings its own targets and batch size; give it alone")
        return inputs
    return PassingProbe(inputs, targets, batch_size=batch_size)


def _pair(others: tuple[Any, Any]) -> tuple[Any, Any]:
    if not isinstance(others, tuple) or len(others) != 2:
        raise InvalidInputError("`others` must be a Probe, or a pair (inputs, targets)")
    return others
