"""Uses of parameters: which operations of a forward pass take them, and what these need to know.

While the mode is entered, every function of torch that is called from Python is seen, with its
arguments: a linear layer, a weight that is used by a function, an embedding of positions. What is
computed from parameters alone, such as a view or a parametrized weight, is followed. The first
operation that brings a parameter together with the examples is a use of it; a rule for the function
says how the gradient with respect to the output makes the per-example gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from sonde.hooks.gradients.rules.functions import RULES
from sonde.hooks.gradients.rules.places import ORDERS, Layout, Place, UnsupportedError, reason_of
from sonde.hooks.gradients.rules.replayed import replayed
from sonde.hooks.gradients.rules.user import ModuleRule, rule_for, uses_of
from sonde.hooks.losses.float64_heads import Float64Heads
from sonde.hooks.model import own_work
from sonde.hooks.model.taps import add_hook
from sonde.hooks.model.walks import modules_of

from .autograd_functions import running_function
from .operations import Operation, Use
from .stand_ins import HeldParameters

# Attention asks first whether anyone overrides it, and would be handed over as a whole. The same
# code, told that nobody does, shows its projections.
_ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)

_NESTED = (tuple, list, dict)

# What takes rows in an order that values tell.
_REORDERING = frozenset(
    [
        Tensor.__getitem__,
        *(torch.index_select, Tensor.index_select, torch.gather, Tensor.gather),
        *(torch.take_along_dim, Tensor.take_along_dim, torch.masked_select, Tensor.masked_select),
        *(torch.sort, Tensor.sort, torch.topk, Tensor.topk),
    ]
)


class ParameterUses(TorchFunctionMode):
    """Finds the uses of a model's parameters while it is entered.

    Args:
        model: The model.
        wanted: The parameters whose uses are reported.
        on_operation: Called with each operation that uses one of them, and its outputs. It must not
            raise.
        num_examples: The number of examples of a forward pass.
        held: What stands for the parameters of the model.
        choices: Which of `layouts.ORDERS` decides where the examples are, by parameter; else 0.
        places: Where they have been seen to be, by parameter; None where nobody has looked.
        needs_graph: Report only operations that gradients can come back to.
        level: How deep within work of ours the pass runs: 0 for one of the training; by default as
            deep as this is made. What runs deeper, such as hooks of ours, is not seen.
        heads: Calls the functions, such as those that end a model, in float64; two modes within
            each other would take twice as long.

    Attributes:
        ambiguous: The parameters for which sizes do not tell where the examples are.
        undecided: Those of them where two axes have their number, such as steps and examples.
        unordered: Those where each example has several rows, together or in turn.
        problems: Why uses could not be reported, by parameter.
        without_gradients: The parameters that were used where no graph is made.
        in_functions: Those that were used in the forward pass of an autograd function, and which.
        couplings: What makes the gradients of an example depend on the others.
        hidden: An autograd function that uses parameters it is not given as inputs, and may add to
            their `.grad` in its backward pass.
        num_reorderings: How often rows of examples were taken in an order that values tell.
        error: What went wrong, which never raises into the forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Iterable[nn.Parameter],
        on_operation: Callable[[Operation, Sequence[Tensor]], None],
        num_examples: int,
        held: HeldParameters,
        choices: Mapping[nn.Parameter, int] | None = None,
        places: Mapping[nn.Parameter, Collection[Place]] | None = None,
        *,
        needs_graph: bool = True,
        level: int | None = None,
        heads: Float64Heads | None = None,
    ) -> None:
        super().__init__()
        self._heads = heads
        self._level = own_work.depth() if level is None else level
        self._held = held
        self._model = model
        self._wanted = frozenset(wanted)
        self._on_operation = on_operation
        self.num_examples = num_examples
        self._choices = {} if choices is None else choices
        self._places = places
        self._needs_graph = needs_graph
        self.ambiguous: set[nn.Parameter] = set()
        self.undecided: set[nn.Parameter] = set()
        self.unordered: set[nn.Parameter] = set()
        self.problems: dict[nn.Parameter, str] = {}
        self.without_gradients: set[nn.Parameter] = set()
        self.in_functions: dict[nn.Parameter, str] = {}
        self.hidden: str | None = None
        self.couplings: list[str] = []
        self.num_reorderings = 0
        self.error: Exception | None = None
        self._roots: dict[int, Mapping[nn.Parameter, nn.Parameter]] = {}
        self._constants: set[int] = set()
        # An identity is only that of one tensor while it lives.
        self._kept: list[Tensor] = []
        self._depth = 0
        self._unsorted: Tensor | None = None
        self._is_time_first = False
        self._stack = ExitStack()

    def __enter__(self) -> ParameterUses:
        self._roots, self._constants, self._kept, self._depth = {}, set(), [], 0
        for module in modules_of(self._model):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and id(tensor) not in self._roots:
                    self._keep(tensor)
            rule = rule_for(module)
            if rule is not None:
                self._tap(module, rule)
            elif isinstance(module, nn.RNNBase):
                self._stack.callback(add_hook(module, self._note_order, is_before=True))
        super().__enter__()  # type: ignore[no-untyped-call] # torch's own has no types
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call] # torch's own has no types
        self._stack.close()
        self._roots, self._constants, self._kept = {}, set(), []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = {} if kwargs is None else dict(kwargs)
        if self._depth or self.error is not None or own_work.depth() != self._level:
            return self._called(func, args, named)
        if func is F.multi_head_attention_forward:
            return self._look_inside(args, named)
        given = self._given_before(func, args, named)
        output = self._called(func, args, named)
        if isinstance(output, (Tensor, *_NESTED)) and not isinstance(output, torch.Size):
            try:
                self._look(func, given, named, output)
            except Exception as error:
                self.error = error
        elif func is Tensor.__setitem__:
            self._note_entries(args)
        return output

    def _called(self, func: Callable[..., Any], args: Any, named: dict[str, Any]) -> Any:
        return func(*args, **named) if self._heads is None else self._heads.call(func, args, named)

    def _look_inside(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run attention and see its operations, which have (time, examples, features)."""
        is_batched = isinstance(args[0], Tensor) and args[0].ndim == 3
        self._is_time_first = is_batched
        super().__enter__()  # type: ignore[no-untyped-call] # torch's own has no types
        try:
            return _ATTENTION(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call] # the same
            self._is_time_first = False

    def _given_before(
        self, func: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """Return the arguments as they are before the operation, which may change the first one."""
        name = getattr(func, "__name__", "")
        is_in_place = name.endswith("_") and not name.endswith("__")
        if not is_in_place or not args or not isinstance(args[0], Tensor):
            return args
        if not any(id(t) in self._roots for t in _tensors((args[1:], named))):
            return args
        return (args[0].detach().clone(), *args[1:])

    def _look(
        self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        tensors = _tensors((args, kwargs))
        roots, constants = self._roots, self._constants
        if func in _REORDERING and self._reorders(func, tensors):
            self.num_reorderings += 1
        unknown = [t for t in tensors if id(t) not in roots and id(t) not in constants]
        new = [t for t in unknown if isinstance(t, nn.Parameter)]
        if len(unknown) == len(tensors) > 0 and not new:
            return  # It is of examples alone.
        outputs = [out for out in _tensors(output) if not _is_transformed(out)]
        if not outputs:
            return
        # A module was given these meanwhile, as gathered ones. What only asks for their size may
        # come before the module has them.
        for tensor in new:
            self._keep(tensor)
        tracked = [t for t in tensors if id(t) in roots]
        is_of_examples = len(unknown) > len(new)
        if not is_of_examples:
            parameters = {p: held for t in tracked for p, held in self._roots[id(t)].items()}
            # What an autograd function makes requires gradients only when it returns.
            is_inside = not torch.is_grad_enabled() and running_function() is not None
            for out in outputs:
                self._keep(out, parameters, is_inside=is_inside)
        elif tracked and (torch.is_grad_enabled() or not self._needs_graph):
            self._report(func, args, kwargs, outputs, tensors)
        elif tracked:
            used = [p for t in tracked for p in self._roots[id(t)]]
            function = running_function()
            if function is not None:
                self.in_functions.update(dict.fromkeys(used, function.name))
                held = [p for t in tracked for p in self._roots[id(t)].values()]
                if not all(function.is_given(p) for p in held):
                    self.hidden = function.name
            self.without_gradients.update(used)

    def _note_entries(self, args: tuple[Any, ...]) -> None:
        """Follow parameters that are written into a tensor, such as a matrix made of a vector."""
        tensors = _tensors(args)
        parameters = {p: held for t in tensors for p, held in self._roots.get(id(t), {}).items()}
        if not parameters or not args[0].requires_grad:
            return
        if all(id(t) in self._roots or id(t) in self._constants for t in tensors):
            self._constants.discard(id(args[0]))
            self._keep(args[0], parameters)
            return
        for parameter in parameters:
            self.problems.setdefault(parameter, "it is written into entries of another tensor")

    def _reorders(self, func: Callable[..., Any], tensors: list[Tensor]) -> bool:
        """Tell whether an operation takes rows of examples in an order that values tell."""
        taken = tensors[0]
        is_of_examples = id(taken) not in self._roots and id(taken) not in self._constants
        # What only masks, no gradient goes through.
        is_row = taken.dtype != torch.bool
        return is_of_examples and is_row and (func is not Tensor.__getitem__ or len(tensors) > 1)

    def _keep(
        self,
        tensor: Tensor,
        parameters: Mapping[nn.Parameter, nn.Parameter] | None = None,
        *,
        is_inside: bool = False,
    ) -> None:
        """Remember what a tensor is computed from."""
        self._kept.append(tensor)
        needs_graph = self._needs_graph and not is_inside
        if not tensor.requires_grad and (needs_graph or not parameters):
            self._constants.add(id(tensor))
        elif parameters is None and isinstance(tensor, nn.Parameter):
            self._roots[id(tensor)] = {self._held.owner_of(tensor): tensor}
        else:
            self._roots[id(tensor)] = parameters or {}

    def _report(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: list[Tensor],
        tensors: list[Tensor],
    ) -> None:
        """Report an operation that brings some of these tensors together with examples."""
        others = [t for t in tensors if id(t) not in self._roots]
        wanted = {
            id(t): t
            for t in tensors
            if id(t) in self._roots
            and (t.requires_grad or not self._needs_graph)
            and not self._wanted.isdisjoint(self._roots[id(t)])
        }
        if not wanted or (self._needs_graph and not any(out.requires_grad for out in outputs)):
            return
        name = getattr(func, "__name__", str(func))
        rule = RULES.get(func)
        is_placed = rule is None or rule.is_placed
        try:
            layout = Layout(
                self.num_examples,
                outputs[0].shape,
                self.couplings,
                self._unsorted,
                self._is_time_first,
                are_apart=len({out.grad_fn for out in outputs}) > 1,
            )
            uses: list[Use] = []
            for choice, of_choice in self._by_choice(name, layout, wanted, is_placed=is_placed):
                chosen = replace(layout, choice=choice) if choice else layout
                uses += self._uses(func, args, kwargs, chosen, of_choice)
        except Exception as error:  # Whatever a rule makes of a call, it is the reason.
            reason = f"{name}: {error}"
            if not isinstance(error, UnsupportedError):
                reason = f"{name} fails: {reason_of(error)}"
            for tensor in wanted.values():
                for parameter in self._roots[id(tensor)]:
                    self.problems.setdefault(parameter, reason)
            return
        if not uses:
            return
        versions = [(t, t._version) for t in others if t.is_floating_point()]
        is_in_place = name.endswith("_")
        shapes = [out.shape for out in outputs]
        inputs = [] if is_in_place else versions
        places = layout.places if is_placed else None
        self._on_operation(Operation(name, shapes, uses, inputs, places), outputs)

    def _by_choice(
        self, name: str, layout: Layout, wanted: Mapping[int, Tensor], *, is_placed: bool
    ) -> Iterator[tuple[int, dict[int, Tensor]]]:
        """Yield the tensors for which the examples are taken to be at the same place."""
        if len(layout.places) > 1:
            parameters = {p for key in wanted for p in self._roots[key]}
            self.ambiguous |= parameters
            if is_placed and {Place.FIRST, Place.SECOND} <= set(layout.places):
                self.undecided |= parameters
            if is_placed and Place.OUTER in layout.places:
                self.unordered |= parameters
        tensors: dict[int, dict[int, Tensor]] = {}
        for key, tensor in wanted.items():
            choice: int | None = 0
            if self._choices:
                choice = max(self._choices.get(parameter, 0) for parameter in self._roots[key])
            if self._places is not None and is_placed and layout.places:
                choice = self._seen_choice(name, layout, self._roots[key].keys() & self._wanted)
            if choice is not None:
                tensors.setdefault(choice, {})[key] = tensor
        yield from tensors.items()

    def _seen_choice(
        self, name: str, layout: Layout, parameters: Collection[nn.Parameter]
    ) -> int | None:
        """Return the order whose first place is where the examples were seen to be."""
        assert self._places is not None  # Or there is nothing to choose by.
        # What was not used by a few examples, in eval mode, may be an expert's, of a row each by
        # chance; experts see no maps or sequences.
        unseen = [Place.FIRST] if layout.places == [Place.FIRST] and len(layout.shape) > 2 else []
        seen = [self._places.get(parameter, unseen) for parameter in parameters]
        fitting = [place for place in layout.places if all(place in places for places in seen)]
        if len(fitting) == 1:
            return next(at for at, order in enumerate(ORDERS) if order[0] is fitting[0])
        reason = f"{name}: it is not known which rows of its output {list(layout.shape)} are whose"
        for parameter in parameters:
            self.problems.setdefault(parameter, reason)
        return None

    def _uses(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        layout: Layout,
        wanted: Mapping[int, Tensor],
    ) -> Iterator[Use]:
        rule = RULES.get(func)
        found: set[int] = set()
        if rule is not None:
            try:
                weights = rule(layout, *args, **kwargs)
            except UnsupportedError:
                if rule.is_last_word:
                    raise
                weights = []
            for weight in weights:
                if id(weight.tensor) in wanted:
                    found.add(id(weight.tensor))
                    parameters = self._roots[id(weight.tensor)]
                    yield Use(weight.tensor, parameters, weight.factor, weight.row_axis)
        for key, tensor in wanted.items():
            if key not in found:
                weight = replayed(layout, func, args, kwargs, tensor)
                yield Use(tensor, self._roots[key], weight.factor, weight.row_axis)

    def _is_apart(self) -> bool:
        """Tell whether a hook is called in another pass than this one, such as an evaluation."""
        return own_work.depth() != self._level + 1

    def _tap(self, module: nn.Module, rule: ModuleRule) -> None:
        """Take the calls of a module whose type has a rule of its own."""

        def enter(*_: Any) -> None:
            if self._is_apart():
                return
            self._depth += 1
            for parameter in module.parameters():
                self._held.owner_of(parameter)  # After the call a sharded one is let go of.

        def leave(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            if self._is_apart():
                return
            self._depth -= 1
            if self._depth or self.error is not None:
                return
            given = args[0] if args else next(iter(kwargs.values()), None)
            try:
                self._report_module(module, rule, given, output)
            except Exception as error:
                self.error = error

        self._stack.callback(add_hook(module, enter, is_before=True))
        self._stack.callback(add_hook(module, leave, is_last=True))

    def _report_module(self, module: nn.Module, rule: ModuleRule, given: Any, output: Any) -> None:
        owners = {p: self._held.owner_of(p) for p in module.parameters() if p.requires_grad}
        parameters = [owner for owner in owners.values() if owner in self._wanted]
        held = {owner: self._held.held_for(owner) for owner in parameters}
        if not parameters or (self._needs_graph and not torch.is_grad_enabled()):
            return
        if not isinstance(given, Tensor) or not isinstance(output, Tensor):
            for parameter in parameters:
                reason = f"the input or output of {type(module).__name__} is not a tensor"
                self.problems.setdefault(parameter, reason)
            return
        uses = [
            Use(held[owner], {owner: held[owner]}, factor)
            for parameter, factor in uses_of(module, rule, given.detach(), self.num_examples)
            if (owner := owners.get(parameter)) in held
        ]
        name = type(module).__name__
        operation = Operation(name, [output.shape], uses, [(given, given._version)])
        self._on_operation(operation, [output])

    def _note_order(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note how the examples of a packed sequence were sorted."""
        if self._is_apart():
            return
        given = args[0] if args else kwargs.get("input")
        self._unsorted = given.unsorted_indices if isinstance(given, PackedSequence) else None


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors of an argument, however they are nested, in their order."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, _NESTED):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, _NESTED):
                found += _tensors(item)
    return found


def _is_transformed(tensor: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)
