"""Failures: say why a measure could not be taken, and whose hook it was that raised."""

from __future__ import annotations

import itertools
import traceback
from types import FrameType

from torch import nn

_HOOK_CALLERS = ("torch.nn.modules.module", "torch.utils.hooks", "torch.autograd.graph")
"""The modules of PyTorch that call hooks; the first one calls a module's forward, too."""


def reason_for(error: Exception) -> str:
    """Return what was raised, by whose hook if it was one, and what to do then.

    Args:
        error: The exception, with its traceback.

    Returns:
        The type of the error and its message; then the hook.
    """
    reason = f"{type(error).__name__}: {error}"
    hook = _raising_hook(error)
    if hook is None:
        return reason
    library = str(hook.f_globals.get("__name__")).partition(".")[0]
    owner = "the training script" if library == "__main__" else library
    return (
        f"{reason}, raised by {hook.f_code.co_name}, a hook that {owner} put on the model. sonde "
        "runs the model with its own hooks; remove this one, or disable it while sonde measures"
    )


def _raising_hook(error: Exception) -> FrameType | None:
    """Return the innermost call that PyTorch made of a hook that is neither sonde's nor its own."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    calls = list(itertools.pairwise(frames))
    return next((call for caller, call in reversed(calls) if _is_hook(caller, call)), None)


def _is_hook(caller: FrameType, call: FrameType) -> bool:
    if caller.f_globals.get("__name__") not in _HOOK_CALLERS:
        return False
    library = str(call.f_globals.get("__name__", "")).partition(".")[0]
    if library in ("sonde", "torch"):
        return False
    module = caller.f_locals.get("self")
    forward = module.forward if isinstance(module, nn.Module) else None
    return getattr(forward, "__code__", None) is not call.f_code
