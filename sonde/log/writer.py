"""The writing side of a log: a bounded queue, an appender thread, and journals that get sealed.

The training thread copies arrays into a pooled buffer and returns; one background thread appends
them to the journal. A record is committed once that append is done. Nothing here raises into the
training: what cannot be written is dropped, counted, told once through `LogWriter.problem`, and
stated in the log by a `gap` frame as soon as the log can be written again.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sonde.exceptions import InvalidInputError, RunExistsError

from .frames import LogArray, encode_index, fill_payload, lay_out
from .journal import Journal
from .layout import (
    journals,
    lock_folder,
    sync_file,
    sync_folder,
    unlock_folder,
    writer_folder,
)
from .sealing import Sealing

Sync = Literal["seal", "record", "none"]

_RETRIES_SECONDS = (0.0, 0.05, 0.25)
_NOTE_FIELDS = frozenset(("kind", "sequence", "arrays"))


@dataclass
class _Pending:
    """A frame on its way to the journal."""

    kind: str
    step: int
    index: bytes
    payload: npt.NDArray[np.uint8]


@dataclass
class _Lost:
    """Records dropped since the last one that was stored."""

    num_records: int = 0
    num_bytes: int = 0
    first_step: int = -1
    last_step: int = -1
    reasons: set[str] = field(default_factory=set)
    needs_journal: bool = False  # The open one was deleted, or lacks a table.

    def add(self, pending_bytes: int, step: int, reason: str) -> None:
        self.num_records += 1
        self.num_bytes += pending_bytes
        self.first_step = step if self.first_step < 0 else min(self.first_step, step)
        self.last_step = max(self.last_step, step)
        self.reasons.add(reason)


class LogWriter:
    """Writes one attempt of one rank into a run directory.

    Args:
        run: The run directory.
        attempt: Counts the times the training was started; 0 is the first.
        rank: The process of the training that writes.
        about: What the journals say of the attempt (environment, resume step, world size).
        sync: When data is forced to the disk: `seal` when a segment is sealed and at `sync()`,
            `record` after every record, `none` never.
        queue_bytes: How many bytes may wait to be written.
        wait_seconds: How long `append` waits for room in the queue before it drops a record.
        block: Wait for room without limit instead.
        segment_bytes: A journal that has reached this size is closed and sealed.
        seal: Seal journals in another process; without it they stay as they are.

    Raises:
        InvalidInputError: If an argument is out of range.
        RunExistsError: If this attempt of this rank was already written.
        OSError: If the folder cannot be created or written.
    """

    def __init__(
        self,
        run: Path,
        *,
        attempt: int = 0,
        rank: int = 0,
        about: Mapping[str, Any] | None = None,
        sync: Sync = "seal",
        queue_bytes: int = 256 << 20,
        wait_seconds: float = 5.0,
        block: bool = False,
        segment_bytes: int = 64 << 20,
        seal: bool = True,
    ) -> None:
        if sync not in ("seal", "record", "none"):
            raise InvalidInputError(f"`sync` (={sync!r}) must be 'seal', 'record' or 'none'")
        if queue_bytes < 1 or segment_bytes < 1:
            raise InvalidInputError(
                f"`queue_bytes` (={queue_bytes}) and `segment_bytes` (={segment_bytes}) "
                "must be >= 1"
            )
        self.folder = writer_folder(run, attempt, rank)
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            raise RunExistsError(f"{self.folder} was already written by another recorder") from None
        self.problem: str | None = None
        self._lock = lock_folder(self.folder)
        self._attempt = {"attempt": attempt, "rank": rank, "pid": os.getpid(), **(about or {})}
        self._tables: dict[str, _Pending] = {}
        self._sync = sync
        self._queue_bytes = queue_bytes
        self._wait_seconds = wait_seconds
        self._block = block
        self._segment_bytes = segment_bytes
        self._sealing = Sealing(run, self.folder) if seal else None
        self._token = secrets.randbits(64)
        self._pid = os.getpid()
        self._pool: list[npt.NDArray[np.uint8]] = []
        self._queue: deque[_Pending] = deque()
        self._queued_bytes = 0
        self._lost = _Lost()
        self._is_closing = False
        self._condition = threading.Condition()
        try:
            self._journal = self._open_journal(0)
        except OSError:
            self._unlock()
            with suppress(OSError):
                self.folder.rmdir()
            raise
        self._thread = threading.Thread(target=self._append_all, name="sonde-log", daemon=True)
        self._thread.start()

    def append(
        self,
        measure: str,
        source: str,
        step: int,
        arrays: Sequence[LogArray],
        attributes: Mapping[str, Any] | None = None,
    ) -> bool:
        """Copy one record and queue it for writing.

        Args:
            measure: What was measured.
            source: Where its examples come from.
            step: Completed optimizer steps.
            arrays: The arrays; they may be changed again as soon as this returns.
            attributes: What else the record says of itself, as JSON values.

        Returns:
            False if the record was dropped, because the queue is full or the writer is closed.

        Raises:
            InvalidInputError: If an array cannot be stored.
        """
        body = {
            "measure": measure,
            "source": source,
            "time": round(time.time(), 3),
            "attributes": dict(attributes or {}),
        }
        return self._enqueue("record", step, body, arrays)

    def add_table(
        self, name: str, arrays: Sequence[LogArray], attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Write arrays that do not depend on the step; every journal repeats them at its head.

        Args:
            name: The source the table describes.
            arrays: The arrays.
            attributes: What else the table says of itself, as JSON values.

        Raises:
            InvalidInputError: If an array cannot be stored.
        """
        body = {"name": name, "attributes": dict(attributes or {})}
        table = self._pack("table", -1, body, arrays)
        if self._is_foreign():
            return
        with self._condition:
            if self._put(table):
                self._tables[name] = table

    def note(self, event: str, step: int, **details: object) -> None:
        """Write an event into the log: something missing, switched off or found.

        Raises:
            InvalidInputError: If a detail has a name that the log itself uses.
        """
        clash = sorted(_NOTE_FIELDS & details.keys())
        if clash:
            raise InvalidInputError(
                f"note '{event}' has a detail named '{clash[0]}', which the log uses itself; "
                "choose another name"
            )
        self._enqueue("note", step, {"event": event, **details}, [])

    def resume_at(self, step: int) -> None:
        """Say at which step this attempt goes on: earlier ones count up to before it."""
        if self._is_foreign():
            return
        self._attempt = {**self._attempt, "resume_step": step}
        with self._condition:
            self._put(self._pack("attempt", -1, self._attempt, []))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything queued is written, or dropped.

        Returns:
            False if `timeout` seconds did not suffice.
        """
        if self._is_foreign():
            return True
        with self._condition:
            return self._condition.wait_for(lambda: self._queued_bytes == 0, timeout)

    def sync(self) -> None:
        """Wait until everything recorded so far would survive a power loss."""
        if self._is_foreign() or self._is_closing:
            return
        self.flush()
        self._force_to_disk()

    def close(self, reason: str = "closed", timeout: float | None = None) -> None:
        """Write what is queued, end the log, and seal it; safe to call more than once.

        Args:
            reason: Why the recording ended.
            timeout: How many seconds to wait for the queue and for the sealing; None is no limit.
        """
        if self._is_foreign():
            return
        with self._condition:
            if not self._is_closing:
                self._put(self._pack("end", -1, {"reason": reason, "time": time.time()}, []))
                self._is_closing = True
                self._condition.notify_all()
        # A second call, from a signal handler say, waits for the queue too.
        self._thread.join(timeout)
        if self._thread.is_alive():
            return
        if self._sealing is not None:
            self._sealing.finish(timeout)
            self.problem = self.problem or self._sealing.problem
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            unlock_folder(self._lock)
            self._lock = None

    def _is_foreign(self) -> bool:
        # A forked child (a DataLoader worker) owns neither the thread nor the file position.
        return os.getpid() != self._pid

    def _enqueue(
        self, kind: str, step: int, body: dict[str, Any], arrays: Sequence[LogArray]
    ) -> bool:
        layout = lay_out(arrays)
        if self._is_foreign():
            return False
        num_bytes = layout.num_bytes
        with self._condition:
            if self._is_closing:
                return False
            timeout = None if self._block else self._wait_seconds
            if not self._condition.wait_for(lambda: self._has_room(num_bytes), timeout):
                self._lost.add(num_bytes, step, "the queue was full")
                self.problem = (
                    f"records are dropped: {self._queued_bytes} bytes wait to be written and the "
                    f"disk did not keep up for {self._wait_seconds} seconds; raise `queue_bytes`, "
                    "record less, or set `block=True` to wait instead"
                )
                return False
            try:
                payload = self._take_buffer(num_bytes)
            except MemoryError:
                self._lost.add(num_bytes, step, "the memory was full")
                self.problem = f"records are dropped: there is no memory for {num_bytes} bytes"
                return False
        fill_payload(payload, layout, arrays)
        pending = _Pending(kind, step, encode_index(kind, body, layout), payload)
        with self._condition:
            return self._put(pending)

    def _pack(
        self, kind: str, step: int, body: dict[str, Any], arrays: Sequence[LogArray]
    ) -> _Pending:
        layout = lay_out(arrays)
        payload = np.empty(layout.num_bytes, np.uint8)
        fill_payload(payload, layout, arrays)
        return _Pending(kind, step, encode_index(kind, body, layout), payload)

    def _has_room(self, num_bytes: int) -> bool:
        # An empty queue takes any record, so one larger than the bound is not lost for ever.
        return self._queued_bytes == 0 or self._queued_bytes + num_bytes <= self._queue_bytes

    def _put(self, pending: _Pending) -> bool:
        if self._is_closing:
            return False
        self._queue.append(pending)
        self._queued_bytes += len(pending.index) + pending.payload.nbytes
        self._condition.notify_all()
        return True

    def _take_buffer(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        for position, buffer in enumerate(self._pool):
            if num_bytes <= buffer.nbytes <= 2 * num_bytes:
                return self._pool.pop(position)[:num_bytes]
        return np.empty(num_bytes, np.uint8)

    def _give_back(self, payload: npt.NDArray[np.uint8]) -> None:
        whole = payload if payload.base is None else payload.base
        pooled_bytes = sum(buffer.nbytes for buffer in self._pool)
        if isinstance(whole, np.ndarray) and pooled_bytes + whole.nbytes <= self._queue_bytes // 4:
            self._pool.append(whole)

    def _append_all(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: bool(self._queue) or self._is_closing)
                if not self._queue:
                    break
                pending = self._queue[0]
            try:
                self._store(pending)
            except Exception as error:  # A dead appender would block every flush for ever.
                self._drop(pending, f"{type(error).__name__}: {error}")
            with self._condition:
                self._queue.popleft()
                self._queued_bytes -= len(pending.index) + pending.payload.nbytes
                if pending.kind == "record":
                    self._give_back(pending.payload)
                self._condition.notify_all()
        if self._sync != "none":
            self._force_to_disk()
        self._journal.close()
        if self._sealing is not None:
            self._sealing.start(self._journal.next_sequence)

    def _store(self, pending: _Pending) -> None:
        problem = ""
        # While the disk refuses everything, one try per record is enough.
        for pause in _RETRIES_SECONDS if not self._lost.num_records else _RETRIES_SECONDS[:1]:
            time.sleep(pause)
            try:
                if self._lost.needs_journal:
                    self._open_next_journal()
                    self._lost.needs_journal = False
                self._report_lost()
                self._journal.append(pending.index, pending.payload, pending.step)
            except OSError as error:
                problem = f"{self._journal.path}: {error}"
                if isinstance(error, FileNotFoundError):
                    self._lost.needs_journal = True
                    self.problem = f"{error}; its records are lost, a new journal takes the next"
                continue
            if self._sync == "record":
                self._force_to_disk(newest_only=True)
            if self._journal.num_bytes >= self._segment_bytes and pending.kind == "record":
                self._rotate()
            return
        self._drop(pending, problem)

    def _drop(self, pending: _Pending, problem: str) -> None:
        with self._condition:
            self._lost.add(pending.payload.nbytes, pending.step, problem)
            self._lost.needs_journal |= pending.kind == "table"
            self.problem = (
                f"the log cannot be written ({problem}); records are dropped until it can, "
                "what was recorded before is intact"
            )

    def _report_lost(self) -> None:
        with self._condition:
            lost = self._lost
            if not lost.num_records:
                return
            gap = {
                "num_records": lost.num_records,
                "num_bytes": lost.num_bytes,
                "last_step": lost.last_step,
                "reasons": sorted(lost.reasons),
            }
        index = encode_index("gap", gap, lay_out([]))
        self._journal.append(index, np.empty(0, np.uint8), lost.first_step)
        with self._condition:
            self._lost = _Lost()

    def _open_journal(self, first_sequence: int) -> Journal:
        journal = Journal(self.folder, first_sequence, self._token)
        attempt = self._pack("attempt", -1, self._attempt, [])
        try:
            for head in (attempt, *self._tables.values()):
                journal.append(head.index, head.payload, head.step)
        except OSError:
            journal.close()
            journal.path.unlink(missing_ok=True)
            raise
        return journal

    def _rotate(self) -> None:
        # When no file can be created, the full journal takes the next record too.
        with suppress(OSError):
            self._open_next_journal()

    def _open_next_journal(self) -> None:
        full = self._journal
        self._journal = self._open_journal(full.next_sequence)
        full.close()
        if self._sync == "record":
            self._force_to_disk()
        if self._sealing is not None:
            self._sealing.start(full.next_sequence)

    def _force_to_disk(self, *, newest_only: bool = False) -> None:
        # A full journal that still waits for its sealing counts too.
        try:
            for _, path in journals(self.folder)[-1 if newest_only else 0 :]:
                sync_file(path)
            sync_folder(self.folder)
        except OSError as error:
            self.problem = f"{self.folder} could not be forced to the disk: {error}"
