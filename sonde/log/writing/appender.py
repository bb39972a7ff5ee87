"""The disk's side of a log writer: journals that frames are appended to, retries, and losses.

Nothing here raises into the training: what cannot be written is dropped, counted, told once through
`Appender.problem`, and stated in the log by a `gap` frame as soon as the log can be written again.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sonde.log.format.files import journals, sync_folder
from sonde.log.format.frames import encode_index
from sonde.log.format.payload import Layout, lay_out

from .folder import WriterFolder
from .forcing import Forcing
from .journal import Journal
from .lost import Lost, explain
from .sealer_process import Sealing

Sync = Literal["seal", "record", "none"]

_RETRIES_SECONDS = (0.0, 0.05, 0.25)
# A segment costs by the stream, too; a few large records wait for others to share that.
_FULL_BYTES = 64 << 20
_FEW_FRAMES = 16
_FEW_FULL_BYTES = 256 << 20


@dataclass
class Pending:
    """A frame on its way to the journal.

    Attributes:
        kind: One of the frame kinds.
        step: The step it speaks of, or -1.
        index: Its index, encoded.
        layout: Where its arrays lie in the payload.
        payload: The bytes of its arrays, in one piece or one by one.
        buffer: What was lent to hold them, if anything was.
        head: A frame that every later journal repeats has a name here; a later one replaces it.
    """

    kind: str
    step: int
    index: bytes
    layout: Layout
    payload: Sequence[memoryview]
    buffer: npt.NDArray[np.uint8] | None = None
    head: str | None = None

    @property
    def num_bytes(self) -> int:
        """The memory it takes, in bytes."""
        return len(self.index) + self.layout.num_bytes


class Appender:
    """Appends the frames of one writer; `store` and `finish` are called by one thread.

    Args:
        folder: The writer's folder.
        attempt: The frame every journal begins with.
        sync: When data is forced to the disk.
        segment_bytes: A journal that has reached this size is closed and sealed; by default 64 MiB,
            or 256 MiB while it holds fewer than 16 frames.
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
        segment_bytes: int | None,
        sealing: Sealing | None,
    ) -> None:
        self.forcing = Forcing(folder, every_record=sync == "record")
        self._problem: str | None = None
        self._folder = WriterFolder(folder)
        self._heads = {"": attempt}
        self._sync = sync
        self._segment_bytes = segment_bytes
        self._sealing = sealing
        self._token = secrets.randbits(64)
        self._lock = threading.Lock()
        self._lost = Lost()
        self._is_degraded = False  # The last frame could not be stored.
        self._needs_journal = False  # The open one was deleted, or lacks one of the heads.
        self._is_deleted = False  # The open one was.
        self._has_leftover = False  # There may be one that was given up before it was begun.
        try:
            self._journal = self._open_journal(0)
        except OSError:
            self.forcing.close()
            self._folder.close()
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
                Lost(int(is_record), int(not is_record), num_bytes, step, step, {reason})
            )
            self._problem = problem

    def store(self, pending: Pending) -> None:
        """Append a frame, or drop it once no retry helps."""
        if pending.head is not None:
            self._heads[pending.head] = pending
        error: Exception | None
        try:
            error = self._try_to_append(pending)
        except Exception as unexpected:  # A dead appender would block every flush for ever.
            error = unexpected
        self._is_degraded = error is not None
        if error is not None:
            self._drop(pending, error)
        elif pending.kind == "record" and self._is_full():
            # When no file can be created, the full journal takes the next record too.
            with suppress(OSError, MemoryError):
                self._open_next_journal()

    def finish(self) -> None:
        """Close the journal, and have it sealed."""
        self.forcing.close()
        if self._sync != "none" and self._folder.path.exists():
            self.forcing.force()
        with suppress(OSError):
            self._remove_leftovers()
        self._close(self._journal)
        self._folder.close()
        if self._sealing is not None:
            self._sealing.start(self._journal.next_sequence)

    def _try_to_append(self, pending: Pending) -> OSError | None:
        """Append a frame; return what is wrong if every try failed."""
        failure = None
        # While the disk refuses everything, one try per record is enough.
        for pause in _RETRIES_SECONDS[: 1 if self._is_degraded else None]:
            time.sleep(pause)
            try:
                if self._needs_journal:
                    self._open_next_journal()
                    self._needs_journal = False
                self._report_lost()
                self._append_to(self._journal, pending)
                return None
            except OSError as error:
                failure = error
                if isinstance(error, FileNotFoundError) and not self._needs_journal:
                    self._needs_journal = self._is_deleted = True
        return failure

    def _append_to(self, journal: Journal, pending: Pending) -> None:
        journal.append(pending.index, pending.layout, pending.payload, pending.step)
        self.forcing.appended(journal.path)

    def _is_full(self) -> bool:
        limit = self._segment_bytes
        if limit is None:
            has_few = self._journal.num_frames < _FEW_FRAMES
            limit = _FEW_FULL_BYTES if has_few else _FULL_BYTES
        return self._journal.num_bytes >= limit

    def _drop(self, pending: Pending, error: Exception) -> None:
        if not isinstance(error, OSError):
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        elif error.errno is None or error.filename is not None:  # It names the place itself.
            reason = str(error)
        else:
            reason = f"{self._folder.path if self._needs_journal else self._journal.path}: {error}"
        before = "what was recorded before is intact"
        if self._is_deleted:
            before = f"what was recorded before was deleted with {self._journal.path}"
        problem = explain(reason, error, before)
        self.lose(pending.kind, pending.step, pending.layout.num_bytes, reason, problem)
        self._needs_journal |= pending.head is not None

    def _report_lost(self) -> None:
        with self._lock:
            lost, self._lost = self._lost, Lost()
        if not lost.reasons:
            return
        try:
            self._append_to(self._journal, pack("gap", lost.first_step, lost.describe()))
        except BaseException:
            with self._lock:
                self._lost.add(lost)
            raise

    def _open_journal(self, first_sequence: int) -> Journal:
        journal = None
        try:
            journal = Journal(self._folder.path, first_sequence, self._token)
            for head in self._heads.values():
                self._append_to(journal, head)
        except BaseException:
            self._has_leftover = True
            if journal is not None:
                with suppress(OSError):
                    journal.close()
                journal.path.unlink(missing_ok=True)
            raise
        return journal

    def _open_next_journal(self) -> None:
        full = self._journal
        if self._folder.restore():
            self._is_deleted = True
            if self._sync != "none":
                sync_folder(self._folder.path.parent)
        self._remove_leftovers()
        self._journal = self._open_journal(full.next_sequence)
        if self._is_deleted:
            self._is_deleted = False
            self._problem = f"{full.path} was deleted; its records are lost, a new journal goes on"
        self._close(full)
        if self._sealing is not None:
            self._sealing.start(full.next_sequence)

    def _remove_leftovers(self) -> None:
        """Delete journals behind the open one, which hold nothing but heads."""
        if self._has_leftover:
            for _, path in journals(self._folder.path):
                if path.name > self._journal.path.name:
                    path.unlink(missing_ok=True)
            self._has_leftover = False

    def _close(self, journal: Journal) -> None:
        try:
            journal.close()
        except OSError as error:
            # A file system over a network may tell only now that it has no room.
            self._problem = f"{journal.path} may lack what was written to it last: {error}"


def pack(kind: str, step: int, body: Mapping[str, Any], head: str | None = None) -> Pending:
    """Make a frame without arrays."""
    layout = lay_out([])
    index = encode_index(kind, dict(body), layout)
    return Pending(kind, step, index, layout, [], head=head)
