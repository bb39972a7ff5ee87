"""Damage: what a reader reports instead of returning it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Damage:
    """Bytes of a log file that hold no valid record.

    Attributes:
        path: The file, relative to the run directory.
        offset: Where the damage starts, in bytes.
        num_bytes: How many bytes could not be read.
        reason: What is wrong.
        is_tail: True at the very end of a journal, where a record that was still being written when
            its process was killed looks the same as damage.
        is_cut_off: True where the file ends within a record: its process was killed before the
            record was committed, or the file was cut afterwards.
    """

    path: str
    offset: int
    num_bytes: int
    reason: str
    is_tail: bool = False
    is_cut_off: bool = False

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Damage:
        """Return what `describe` has described."""
        names = ("path", "offset", "num_bytes", "reason", "is_tail")
        return cls(**{name: facts[name] for name in names})

    def describe(self) -> dict[str, Any]:
        """Return it as JSON values; what is only cut off is not kept for later readers."""
        return {name: value for name, value in vars(self).items() if name != "is_cut_off"}

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} ({self.num_bytes} bytes at byte {self.offset})"
