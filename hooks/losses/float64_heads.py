"""Heads in float64: what makes a loss of a model's outputs, in the model or behind it.

softmax − one-hot, sigmoid − target and their kind round to 0 in float32 where a model is sure of an
example, so that its gradient keeps a part of its direction only. While the mode is entered,
functions that end a model (log-softmax, cross entropy, binary cross entropy) are computed in
float64 and cast back to the type of their input, and their backward pass is in float64, too. The
rest of the model stays as it is, and so do the types and, to their precision, the values.

A softmax, sigmoid or tanh may be anything, such as attention. It is computed as ever, and only what
turns out to be a model's output, or to go into a logarithm or a loss, is computed again in float64.
What a model makes by hand from `logsumexp` and a difference stays in the model's precision.

Where float64 is dear, cross entropy makes the true class's entry from the others in the type of the
logits, see `class_losses`; the other functions go through float64 block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sonde.hooks.model.taps import map_tensors

from .class_losses import ClassLoss, are_classes, class_loss_of_call
from .recomputed import recomputed

# Heads that take more than this in float64, 8 million scores, are computed in another way. Of 512 ×
# 50,000 scores, 98 MiB in float32, the loss and its gradient take 1.0 s and 990 MiB in float64 on a
# core, and 0.4 s and 400 MiB where the true class's entry is made from the others.
WIDE_BYTES = 64 << 20
FLOAT64 = "float64"

_NARROW = frozenset([torch.float32, torch.float16, torch.bfloat16])
_Function = Callable[..., Any]

_LOG_SOFTMAX: list[_Function] = [
    *(F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax),
]
_WITH_LOGITS: list[_Function] = [
    *(F.binary_cross_entropy_with_logits, torch.binary_cross_entropy_with_logits),
]
# In float64 whatever they are given.
_HEADS = frozenset([*_LOG_SOFTMAX, *_WITH_LOGITS, F.cross_entropy])
# In float64 again, if they are what follows.
_SATURATING = frozenset(
    [
        *(F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax, F.softmin),
        *(torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.special.expit),
        *(torch.tanh, Tensor.tanh, F.tanh),
    ]
)
_LOGARITHMS: list[_Function] = [
    getattr(owner, name) for owner in (torch, Tensor) for name in ("log", "log2", "log10", "log1p")
]
_ENDS = frozenset(
    [
        *_LOGARITHMS,
        *(torch.xlogy, Tensor.xlogy, torch.special.xlogy),
        *(F.binary_cross_entropy, F.nll_loss, F.kl_div, F.mse_loss, F.l1_loss, F.smooth_l1_loss),
        *(F.huber_loss, F.poisson_nll_loss),
    ]
)
# What of a value that is computed again is computed again, too: of other tensors, only indices.
_FOLLOWED = frozenset(
    [
        *(torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze, Tensor.view),
        *(torch.reshape, Tensor.reshape, torch.flatten, Tensor.flatten, Tensor.contiguous),
        *(torch.transpose, Tensor.transpose, torch.permute, Tensor.permute, Tensor.__getitem__),
        *(torch.gather, Tensor.gather, torch.select, Tensor.select, torch.narrow, Tensor.narrow),
        *(torch.clamp, Tensor.clamp, torch.clip, Tensor.clip, torch.neg, Tensor.neg),
        *(torch.add, Tensor.add, torch.sub, Tensor.sub, Tensor.__rsub__, torch.rsub),
        *(torch.mul, Tensor.mul, torch.div, Tensor.div),
    ]
)


@dataclass
class _Again:
    """A value, and how it is computed again in float64."""

    value: Tensor
    version: int
    source: Tensor
    source_version: int
    make: Callable[[], Tensor]
    made: Tensor | None = None

    def computed(self) -> Tensor | None:
        """Return it in float64; None if it, or what it was computed from, was changed in place."""
        if self.made is None:
            if (self.value._version, self.source._version) != (self.version, self.source_version):
                return None
            self.made = self.make()
        return self.made


class Float64Heads(TorchFunctionMode):
    """Computes heads in float64 while it is entered.

    Args:
        promotes: Cast what is not float64 to it wherever both meet, as a loss that is given float64
            outputs may have weights of its own.

    Attributes:
        refusal: Why a loss was given the outputs as they are; None if it takes float64.
        class_losses: Of each cross entropy, by the operation that made it: the options, the losses
            of the positions and their targets.
    """

    def __init__(self, *, promotes: bool = False) -> None:
        super().__init__()
        self._promotes = promotes
        self._again: dict[int, _Again] = {}
        self._num_bytes = 0
        self.refusal: str | None = None
        self.class_losses: dict[Any, tuple[ClassLoss, Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: _Function,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.call(func, args, {} if kwargs is None else dict(kwargs))

    def call(self, func: _Function, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a function, in float64 if it is a head; for a mode that sees all functions anyway.

        Args:
            func: The function.
            args: Its arguments by position.
            named: Those by name; they may be changed.
        """
        if func in _HEADS:
            return self._head(func, args, named)
        if func in _SATURATING:
            return self._saturating(func, args, named)
        if self._again and args:
            if func in _ENDS and any(self._known(x) for x in (*args, *named.values())):
                return self._in_double(func, args, named)
            if func in _FOLLOWED:
                return self._followed(func, args, named)
        if self._promotes and not getattr(func, "__name__", "_").endswith("_"):
            args, named = _promoted((args, named))
        return func(*args, **named)

    def widened(self, outputs: Any) -> Any:
        """Return a model's outputs in float64, however they are nested."""
        return map_tensors(outputs, self.wide)

    def wide(self, tensor: Tensor) -> Tensor:
        """Return a tensor in float64, from before what it saturated in; others as they are."""
        again = self.again(tensor)
        return again.double() if is_narrow(again) else again

    def again(self, tensor: Tensor) -> Tensor:
        """Return a tensor as it is computed again, if it is one of those; else as it is."""
        known = self._known(tensor)
        again = None if known is None else known.computed()
        return tensor if again is None else again

    def _known(self, value: Any) -> _Again | None:
        known = self._again.get(id(value))
        return known if known is not None and known.value is value else None

    def _note(self, value: Any, source: Tensor, make: Callable[[], Tensor]) -> None:
        """Remember how a value is computed again, and forget the oldest if that takes too much."""
        if not isinstance(value, Tensor):
            return
        self._again[id(value)] = _Again(value, value._version, source, source._version, make)
        self._num_bytes += source.nbytes
        while len(self._again) > 1 and self._num_bytes > WIDE_BYTES:
            self._num_bytes -= self._again.pop(next(iter(self._again))).source.nbytes

    def _head(self, func: _Function, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        given = args[0] if args else named.get("input")
        if not torch.is_grad_enabled() or not isinstance(given, Tensor) or "out" in named:
            return func(*args, **named)
        is_dear = is_narrow(given) and is_wide(given)
        if func is F.cross_entropy:
            target = args[1] if len(args) > 1 else named.get("target")
            options = class_loss_of_call(args, named)
            if options is not None and are_classes(given, target):
                assert isinstance(target, Tensor)
                logits = given if is_dear else self.wide(given)
                losses = options.of_positions(logits, target)
                value = options.reduced(losses, target).to(given.dtype)
                if value.grad_fn is not None:
                    self.class_losses[value.grad_fn] = (options, losses, target)
                return value
        elif is_dear and func in _WITH_LOGITS:
            return _with_logits(*args, **named)
        elif is_dear and args and not named.get("dtype") and given.ndim > 1:
            return _by_blocks(func, given, args[1:], named, given.dtype)
        return self._in_double(func, args, named)

    def _saturating(self, func: _Function, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        value = func(*args, **named)
        given = args[0] if args else named.get("input")
        if torch.is_grad_enabled() and isinstance(given, Tensor) and is_narrow(given):
            rest = {name: other for name, other in named.items() if name not in ("input", "dtype")}

            def make() -> Tensor:
                if is_wide(given) and given.ndim > 1:
                    return _by_blocks(func, given, args[1:], rest, torch.float64)
                again: Tensor = func(given.double(), *args[1:], **rest)
                return again

            self._note(value, given, make)
        return value

    def _followed(self, func: _Function, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        value = func(*args, **named)
        known = self._known(args[0])
        others = [x for x in (*args[1:], *named.values()) if isinstance(x, Tensor)]
        if known is not None and not any(other.is_floating_point() for other in others):
            before = args[0]

            def make() -> Tensor:
                again = known.computed()
                value: Tensor = func(before if again is None else again, *args[1:], **named)
                return value

            self._note(value, known.value, make)
        return value

    def _in_double(self, func: _Function, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a function in float64, and cast the result to the type that it would have."""
        given = args[0] if args else named["input"]
        dtype = named.get("dtype") or given.dtype
        if named.get("dtype") is not None:
            named["dtype"] = torch.float64
        args, named = _mapped((args, named), self.wide)
        result: Tensor = func(*args, **named)
        return result.to(dtype)


def is_narrow(tensor: Tensor) -> bool:
    """Tell whether a tensor has fewer digits than float64, on a device that has float64."""
    return tensor.dtype in _NARROW and tensor.device.type != "mps"


def is_wide(tensor: Tensor) -> bool:
    """Tell whether a head takes too much in float64."""
    return tensor.numel() * 8 > WIDE_BYTES


def _with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Return the binary cross entropy of logits, of which nothing cancels in any type."""
    positive = target if pos_weight is None else target * pos_weight
    losses = (1 - target) * F.softplus(input) + positive * F.softplus(-input)
    losses = losses if weight is None else losses * weight
    if reduction == "none" or reduce is False:
        return losses
    return losses.sum() if reduction == "sum" or size_average is False else losses.mean()


def _by_blocks(
    func: _Function,
    given: Tensor,
    args: tuple[Any, ...],
    named: dict[str, Any],
    dtype: torch.dtype,
) -> Tensor:
    """Compute rows of a function along one axis in float64, a few at a time, there and back."""
    dim = named.get("dim", args[0] if args else None)
    axis = 1 if dim is not None and dim % given.ndim == 0 else 0
    row_bytes = max(1, given.numel() * 8 // max(1, given.shape[axis]))

    def compute(block: Tensor) -> Tensor:
        result: Tensor = func(block.double(), *args, **named).to(dtype)
        return result

    blocks = given.split(max(1, WIDE_BYTES // row_bytes), axis)
    if torch._C._functorch.is_functorch_wrapped_tensor(given):
        return torch.cat([compute(block) for block in blocks], axis)
    return torch.cat([recomputed(compute, [block]) for block in blocks], axis)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return the arguments of a call with a function applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, function) for item in value)
    if type(value) is dict:
        return {name: _mapped(item, function) for name, item in value.items()}
    return value


def _promoted(given: Any) -> Any:
    """Return the arguments of a call, all in float64 if some are."""
    found: set[torch.dtype] = set()

    def look(tensor: Tensor) -> Tensor:
        found.add(tensor.dtype)
        return tensor

    _mapped(given, look)
    if torch.float64 not in found or found.isdisjoint(_NARROW):
        return given
    return _mapped(given, lambda x: x.double() if is_narrow(x) else x)
