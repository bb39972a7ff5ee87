"""Damage: what a reader reports instead of returning it."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    path: str
    offset: int
    num_bytes: int
    reason: str
    is_tail: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} ({self.num_bytes} bytes at byte {self.offset})"
