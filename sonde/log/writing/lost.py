"""What a log has lost: the count of it, and how the user is told."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Any

_ADVICE = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space, your quota there is used up",
    errno.EFBIG: "raise the limit of the file size (ulimit -f)",
    errno.EACCES: "make it writable",
    errno.EROFS: "make it writable",
    errno.EIO: "see whether the disk is well",
    None: "make a new recorder to record on",  # The run directory is gone.
}


@dataclass
class Lost:
    """What was dropped since the last frame that was stored."""

    num_records: int = 0
    num_notes: int = 0
    num_bytes: int = 0
    first_step: int = -1
    last_step: int = -1
    reasons: set[str] = field(default_factory=set)

    def add(self, other: Lost) -> None:
        """Count what else was dropped."""
        self.num_records += other.num_records
        self.num_notes += other.num_notes
        self.num_bytes += other.num_bytes
        steps = [step for step in (self.first_step, other.first_step) if step >= 0]
        self.first_step = min(steps, default=-1)
        self.last_step = max(self.last_step, other.last_step)
        self.reasons |= other.reasons

    def describe(self) -> dict[str, Any]:
        """Return what a `gap` frame says of it."""
        return {
            "num_records": self.num_records,
            "num_notes": self.num_notes,
            "num_bytes": self.num_bytes,
            "last_step": self.last_step,
            "reasons": sorted(self.reasons),
        }


def explain(reason: str, error: Exception, before: str) -> str:
    """Say that a log cannot be written, and what to do.

    Args:
        reason: What is wrong.
        error: The error it comes from.
        before: What became of that which was recorded before.
    """
    advice = _ADVICE.get(error.errno) if isinstance(error, OSError) else None
    helps = f": {advice}" if advice else ""
    return (
        f"the log cannot be written ({reason}){helps}; records are dropped until it can, {before}"
    )
