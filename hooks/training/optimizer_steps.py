"""Optimizer steps: which calls of an optimizer's `step` are updates of the weights.

One update may come as several calls. A subclass calls its parent's `step`, and torch calls the
hooks in both; a wrapper calls the optimizer that it holds. And some wrappers never have their own
`step` called, such as SAM with `first_step` and `second_step`. So hooks are put on an optimizer and
on those that it holds, and the outermost call counts. A fused optimizer is called for updates, too,
that a GradScaler had it skip: its `found_inf` says so, on the device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sonde.exceptions import InvalidInputError

from .hand_steps import HandSteps

# What torch makes of every `step`: it calls the hooks. Known by its code, whatever it wraps.
_CALLS_HOOKS = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__


class StepCalls:
    """Tells the outermost of several calls of `step` that run one within the other."""

    def __init__(self) -> None:
        self._depth = 0

    def enter(self, *optimizers: torch.optim.Optimizer) -> bool:
        """Note that a call begins; return whether it is the outermost one.

        Args:
            optimizers: Those whose calls are noted; without any, all.
        """
        # A call that raised is still noted as if it ran: the stack knows better.
        self._depth = max(1, _num_running(optimizers)) if self._depth else 1
        return self._depth == 1

    def leave(self, *optimizers: torch.optim.Optimizer) -> bool:
        """Note that a call ends; return whether it is the outermost one.

        Args:
            optimizers: The same.
        """
        if not self._depth:  # It had begun before calls were noted.
            return _num_running(optimizers) == 1
        self._depth -= 1
        return self._depth == 0


def _num_running(optimizers: tuple[torch.optim.Optimizer, ...]) -> int:
    """Return how many calls of `step` of these optimizers, or of all, this thread is in."""
    frame = sys._getframe()
    num_running = 0
    while frame is not None:
        if frame.f_code is _CALLS_HOOKS:
            owner = frame.f_locals.get("self")
            num_running += not optimizers or any(owner is one for one in optimizers)
        frame = frame.f_back  # type: ignore[assignment] # None is the end of the stack
    return num_running


def is_updating(optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Tell whether this thread is within `step` of one of these optimizers."""
    return _num_running(tuple(optimizers)) > 0


class AttachedOptimizer:
    """An optimizer whose updates are counted.

    Args:
        optimizer: The optimizer.
        model: The model that it trains.
        before: Called before each update with whether its gradients are complete: a closure
            computes some within the step.
        after: Called after each update.

    Raises:
        InvalidInputError: If it is no optimizer that calls hooks.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        before: Callable[[bool], None],
        after: Callable[[], None],
    ) -> None:
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self._weights = HandSteps(model)
        self._calls = StepCalls()
        self._has_stepped = False
        self._before = before
        self._after = after
        self._optimizers = (optimizer, *_held_by(optimizer))
        self._handles = [
            handle
            for one in self._optimizers
            for handle in (
                one.register_step_pre_hook(self._on_step),
                one.register_step_post_hook(self._on_stepped),
            )
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    @property
    def found_inf(self) -> Tensor | None:
        """Not 0 where the update that runs is one to be skipped; None for most optimizers.

        While it runs only, a GradScaler lends it to an optimizer that looks after it by itself.
        """
        for optimizer in self._optimizers:
            found: Tensor | None = getattr(optimizer, "found_inf", None)
            if found is not None:
                return found
        return None

    def why_no_step(self) -> str | None:
        """Say what is wrong where weights have changed, but no step was counted."""
        if self._has_stepped or not self._weights.has_stepped():
            return None
        kind = type(self.optimizer).__name__
        return (
            f"no step was counted, although weights have changed: step() of the {kind} that is "
            f"attached was never called. {_ADVICE}"
        )

    def _on_step(self, _: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._calls.enter(*self._optimizers):
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            self._before(closure is None)

    def _on_stepped(self, *_: object) -> None:
        if self._calls.leave(*self._optimizers):
            self._has_stepped = True
            self._after()


_ADVICE = (
    "Attach the optimizer whose step() is called, or call recorder.step() after each update instead"
)


def weights_seen(optimizers: Sequence[torch.optim.Optimizer]) -> str | None:
    """Say which weights a probe sees, where an optimizer swaps them; None where none does.

    A schedule-free optimizer (Defazio et al., 2024, 2405.15682) has a mode: in `train()` the model
    holds the weights that gradients are taken at, in `eval()` their average. To swap them is not
    exact in float32, and would change the training; so it is left to the user.
    """
    for optimizer in optimizers:
        modes = {group["train_mode"] for group in optimizer.param_groups if "train_mode" in group}
        if modes:
            which = "training" if True in modes else "evaluation"
            return f"of {which}, by the mode of {type(optimizer).__name__}"
    return None


def check_optimizer(optimizer: object) -> None:
    """Refuse what does not call hooks when it steps.

    Raises:
        InvalidInputError: If it does not.
    """
    is_one = isinstance(optimizer, torch.optim.Optimizer)
    if is_one and _calls_hooks(optimizer):
        return
    kind = type(optimizer).__name__
    got = f"`optimizer` is a {kind}"
    expected = "expected a torch.optim.Optimizer"
    if is_one:
        got += ", which has no hooks, as it does not call __init__ of torch.optim.Optimizer"
        expected = "expected an optimizer that has"
    held = next(
        (
            f"attach the {type(value).__name__} that it holds, `optimizer.{name}`"
            for name, value in getattr(optimizer, "__dict__", {}).items()
            if isinstance(value, torch.optim.Optimizer) and _calls_hooks(value)
        ),
        "attach the optimizer that it wraps, if there is one",
    )
    raise InvalidInputError(
        f"{got}; {expected}. So {held}, or call recorder.step() after each step"
    )


def _calls_hooks(optimizer: object) -> bool:
    return "_optimizer_step_pre_hooks" in getattr(optimizer, "__dict__", {})


def _held_by(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers that one holds by name and that train some of its parameters."""
    own = _parameters_of(optimizer)
    return [
        value
        for value in vars(optimizer).values()
        if isinstance(value, torch.optim.Optimizer)
        and value is not optimizer
        and _calls_hooks(value)
        and not own.isdisjoint(_parameters_of(value))
    ]


def _parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


class SkippedUpdates:
    """Counts updates that were skipped, without waiting for the device in each step."""

    def __init__(self) -> None:
        self._pending: Tensor | None = None

    def add(self, found_inf: Tensor) -> None:
        """Add one update, which was skipped where this is not 0."""
        is_skipped = found_inf.detach().clamp(max=1)
        self._pending = is_skipped if self._pending is None else self._pending + is_skipped

    def take(self) -> int:
        """Return how many were skipped since the last time this was asked."""
        num_skipped = 0 if self._pending is None else round(float(self._pending))
        self._pending = None
        return num_skipped
