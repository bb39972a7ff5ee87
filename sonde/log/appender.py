"""The disk's side of a log writer: journals that frames are appended to, retries, and losses.

Nothing here raises into the training: what cannot be written is dropped, counted, told once through
`Appender.problem`, and stated in the log by a `gap` frame as soon as the log can be written again.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .forcing import Forcing
from .frames import Layout, encode_index, lay_out
from .journal import Journal
from .sealing import Sealing

Sync = Literal["seal", "record", "none"]

_RETRIES_SECONDS = (0.0, 0.05, 0.25)


@dataclass
class Pending:
    """A frame on its way to the journal.

    Attributes:
        kind: One of the frame kinds.
        step: The step it speaks of, or -1.
        index: Its index, encoded.
        layout: Where its arrays lie in the payload.
        payload: The bytes of its arrays.
        head: A frame that every later journal repeats has a name here; a later one replaces it.
    """

    kind: str
    step: int
    index: bytes
    layout: Layout
    payload: npt.NDArray[np.uint8]
    head: str | None = None

    @property
    def num_bytes(self) -> int:
        """The memory it takes, in bytes."""
        return len(self.index) + self.payload.nbytes


@dataclass
class _Lost:
    """What was dropped since the last frame that was stored."""

    num_records: int = 0
    num_notes: int = 0
    num_bytes: int = 0
    first_step: int = -1
    last_step: int = -1
    reasons: set[str] = field(default_factory=set)

    def add(self, other: _Lost) -> None:
        self.num_records += other.num_records
        self.num_notes += other.num_notes
        self.num_bytes += other.num_bytes
        steps = [step for step in (self.first_step, other.first_step) if step >= 0]
        self.first_step = min(steps, default=-1)
        self.last_step = max(self.last_step, other.last_step)
        self.reasons |= other.reasons

    def describe(self) -> dict[str, Any]:
        return {
            "num_records": self.num_records,
            "num_notes": self.num_notes,
            "num_bytes": self.num_bytes,
            "last_step": self.last_step,
            "reasons": sorted(self.reasons),
        }


class Appender:
    """Appends the frames of one writer; `store` and `finish` are called by one thread.

    Args:
        folder: The writer's folder.
        attempt: The frame every journal begins with.
        sync: When data is forced to the disk.
        segment_bytes: A journal that has reached this size is closed and sealed.
        sealing: Seals closed journals; None leaves them as they are.

    Raises:
        OSError: If the first journal cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        attempt: Pending,
        *,
        sync: Sync,
        segment_bytes: int,
        sealing: Sealing | None,
    ) -> None:
        self.forcing = Forcing(folder, every_record=sync == "record")
        self._problem: str | None = None
        self._folder = folder
        self._heads = {"": attempt}
        self._sync = sync
        self._segment_bytes = segment_bytes
        self._sealing = sealing
        self._token = secrets.randbits(64)
        self._lock = threading.Lock()
        self._lost = _Lost()
        self._is_degraded = False  # The last frame could not be stored.
        self._needs_journal = False  # The open one was deleted, or lacks one of the heads.
        try:
            self._journal = self._open_journal(0)
        except OSError:
            self.forcing.close()
            raise

    @property
    def problem(self) -> str | None:
        """What is wrong with the log, for the user."""
        return self._problem or self.forcing.problem

    def lose(self, kind: str, step: int, num_bytes: int, reason: str, problem: str) -> None:
        """Count a frame that was dropped; any thread may say so."""
        is_record = kind == "record"
        with self._lock:
            self._lost.add(
                _Lost(int(is_record), int(not is_record), num_bytes, step, step, {reason})
            )
            self._problem = problem

    def store(self, pending: Pending) -> None:
        """Append a frame, or drop it once no retry helps."""
        if pending.head is not None:
            self._heads[pending.head] = pending
        try:
            problem = self._try_to_append(pending)
        except Exception as error:  # A dead appender would block every flush for ever.
            problem = f"{type(error).__name__}: {error}"
        self._is_degraded = problem is not None
        if problem is not None:
            self._drop(pending, problem)

    def finish(self) -> None:
        """Close the journal, and have it sealed."""
        self.forcing.close()
        if self._sync != "none":
            self.forcing.force()
        self._journal.close()
        if self._sealing is not None:
            self._sealing.start(self._journal.next_sequence)

    def _try_to_append(self, pending: Pending) -> str | None:
        """Append a frame; return what is wrong if every try failed."""
        problem = ""
        # While the disk refuses everything, one try per record is enough.
        for pause in _RETRIES_SECONDS[: 1 if self._is_degraded else None]:
            time.sleep(pause)
            try:
                if self._needs_journal:
                    self._open_next_journal()
                    self._needs_journal = False
                self._report_lost()
                self._append_to(self._journal, pending)
            except OSError as error:
                problem = f"{self._journal.path}: {error}"
                if isinstance(error, FileNotFoundError):
                    self._needs_journal = True
                    self._problem = f"{error}; its records are lost, a new journal takes the next"
                continue
            if self._journal.num_bytes >= self._segment_bytes and pending.kind == "record":
                # When no file can be created, the full journal takes the next record too.
                with suppress(OSError):
                    self._open_next_journal()
            return None
        return problem

    def _append_to(self, journal: Journal, pending: Pending) -> None:
        journal.append(pending.index, pending.layout, pending.payload, pending.step)
        self.forcing.appended(journal.path)

    def _drop(self, pending: Pending, problem: str) -> None:
        self.lose(
            pending.kind,
            pending.step,
            pending.payload.nbytes,
            problem,
            f"the log cannot be written ({problem}); records are dropped until it can, what was "
            "recorded before is intact",
        )
        self._needs_journal |= pending.head is not None

    def _report_lost(self) -> None:
        with self._lock:
            lost, self._lost = self._lost, _Lost()
        if not lost.reasons:
            return
        try:
            self._append_to(self._journal, pack("gap", lost.first_step, lost.describe()))
        except BaseException:
            with self._lock:
                self._lost.add(lost)
            raise

    def _open_journal(self, first_sequence: int) -> Journal:
        journal = Journal(self._folder, first_sequence, self._token)
        try:
            for head in self._heads.values():
                self._append_to(journal, head)
        except OSError:
            journal.close()
            journal.path.unlink(missing_ok=True)
            raise
        return journal

    def _open_next_journal(self) -> None:
        full = self._journal
        self._journal = self._open_journal(full.next_sequence)
        full.close()
        if self._sealing is not None:
            self._sealing.start(full.next_sequence)


def pack(kind: str, step: int, body: Mapping[str, Any], head: str | None = None) -> Pending:
    """Make a frame without arrays."""
    layout = lay_out([])
    index = encode_index(kind, dict(body), layout)
    return Pending(kind, step, index, layout, np.empty(0, np.uint8), head)
