"""How a recording ended: the reason in the log, and what a run is called after it."""

from __future__ import annotations

from collections.abc import Iterable

# Reasons of a recording that ended as it was meant to.
_CLEAN = ("closed", "exit", "superseded")
# Someone stopped the training by hand.
_STOPPED = ("KeyboardInterrupt",)


def why_ended(error: BaseException | None) -> str:
    """Return the reason, for the log, why a recording ends with an exception, or without one."""
    is_clean = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
    return "closed" if is_clean else type(error).__name__


def state_after(reasons: Iterable[str | None]) -> str:
    """Return the state of a run after what ended the recording on each rank.

    Args:
        reasons: As `why_ended` has them; None where the log has no end, as its process was killed.

    Returns:
        `finished`; `interrupted`; or `ended by ValueError`, by the first such rank.

    Example:
        >>> state_after(["closed"]), state_after(["closed", "ValueError"]), state_after([None])
        ('finished', 'ended by ValueError', 'interrupted')
    """
    found = list(reasons)
    for reason in found:
        if reason is not None and reason not in (*_CLEAN, *_STOPPED):
            return f"ended by {reason}"
    is_finished = found and all(reason in _CLEAN for reason in found)
    return "finished" if is_finished else "interrupted"
