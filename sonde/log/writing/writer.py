"""The writing side of a log: a bounded queue, and the thread that empties it.

The training thread copies arrays into a pooled buffer and returns; one background thread appends
them to the journal. A record is committed once that append is done, and with `sync="record"` once
it is forced to the disk. Nothing here raises into the training.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import InvalidInputError, RunExistsError
from sonde.log.format.files import lock_path, unlock, writer_folder
from sonde.log.format.frames import encode_index
from sonde.log.format.payload import LogArray, fill_payload, lay_out, view_payload

from .appender import Appender, Pending, Sync, pack
from .sealer_process import Sealing

_NOTE_FIELDS = frozenset(("kind", "sequence"))


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
        segment_bytes: A journal that has reached this size is closed and sealed; by default 64 MiB,
            or 256 MiB while it holds fewer than 16 frames.
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
        segment_bytes: int | None = None,
        seal: bool = True,
    ) -> None:
        if sync not in ("seal", "record", "none"):
            raise InvalidInputError(f"`sync` (={sync!r}) must be 'seal', 'record' or 'none'")
        for name, value in (("queue_bytes", queue_bytes), ("segment_bytes", segment_bytes)):
            if value is not None and value < 1:
                raise InvalidInputError(f"`{name}` (={value}) must be >= 1")
        self.folder = writer_folder(run, attempt, rank)
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            raise RunExistsError(f"{self.folder} was already written by another recorder") from None
        # The folder is new: at most a reader holds it, for the instant of `is_being_written`.
        self._lock = lock_path(self.folder)
        self._attempt = {"attempt": attempt, "rank": rank, "pid": os.getpid(), **(about or {})}
        self._queue_bytes = queue_bytes
        self._wait_seconds = None if block else wait_seconds
        self._sealing = Sealing(run, self.folder) if seal else None
        self._pid = os.getpid()
        # By size, so that one is found at once, however many a stall of the disk has left here.
        self._pool: dict[int, list[npt.NDArray[np.uint8]]] = {}
        self._pooled_bytes = 0
        self._queue: deque[Pending] = deque()
        self._queued_bytes = 0
        self._is_closing = False
        self._condition = threading.Condition()
        try:
            self._appender = Appender(
                self.folder,
                pack("attempt", -1, self._attempt, head=""),
                sync=sync,
                segment_bytes=segment_bytes,
                sealing=self._sealing,
            )
        except OSError:
            self._unlock()
            with suppress(OSError):
                self.folder.rmdir()
            raise
        self._thread = threading.Thread(target=self._append_all, name="sonde-log", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """What is wrong with the log, if anything, for the user."""
        sealing = self._sealing.problem if self._sealing is not None else None
        return self._appender.problem or sealing

    def append(
        self,
        measure: str,
        source: str,
        step: int,
        arrays: Sequence[LogArray],
        attributes: Mapping[str, Any] | None = None,
    ) -> bool:
        """Queue one record for writing, and copy what it does not own.

        Args:
            measure: What was measured.
            source: Where its examples come from.
            step: Completed optimizer steps.
            arrays: The arrays; those that are not `is_owned` may be changed again as soon as this
                returns.
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
        if self._is_foreign():
            return False
        try:
            layout = lay_out(arrays)
            index = encode_index("record", body, layout)
            if not self._wait_for_room(step, layout.num_bytes):
                return False
            buffer = None
            payload = view_payload(layout, arrays)
            if payload is None:
                buffer = self._take_buffer(layout.num_bytes)
                fill_payload(buffer, layout, arrays)
                payload = [buffer.data]
        except MemoryError:
            num_bytes = sum(array.values.nbytes for array in arrays)
            self._lose_for_memory("record", step, num_bytes)
            return False
        return self._put(Pending("record", step, index, layout, payload, buffer))

    def add_table(
        self, name: str, arrays: Sequence[LogArray], attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Write arrays that do not depend on the step; every journal repeats them at its head.

        Args:
            name: The source the table describes.
            arrays: The arrays.
            attributes: What else the table says of itself, as JSON values.

        Raises:
            InvalidInputError: If an array cannot be stored, or belongs to a layer.
        """
        of_layer = next((array.layer for array in arrays if array.layer is not None), None)
        if of_layer is not None:
            raise InvalidInputError(
                f"table '{name}' has an array of layer '{of_layer}'; a table describes a source, "
                "so give its arrays without a layer"
            )
        body = {"name": name, "attributes": dict(attributes or {})}
        layout = lay_out(arrays)
        payload = np.empty(layout.num_bytes, np.uint8)
        fill_payload(payload, layout, arrays)
        index = encode_index("table", body, layout)
        self._put(Pending("table", -1, index, layout, [payload.data], head=f"table {name}"))

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
        self._put(pack("note", step, {"event": event, **details}))

    def resume_at(self, step: int) -> None:
        """Say at which step this attempt goes on: earlier ones count up to before it.

        This is forced to the disk: if it were lost, and what follows were not, the wrong records of
        earlier attempts would count.
        """
        self._put(pack("attempt", -1, {**self._attempt, "resume_step": step}, head=""))
        self.sync()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything queued is committed, or dropped.

        Returns:
            False if `timeout` seconds did not suffice.
        """
        if self._is_foreign():
            return True
        with self._condition:
            is_written = self._condition.wait_for(lambda: not self._queue, timeout)
        return is_written and self._appender.forcing.wait(timeout)

    def sync(self) -> None:
        """Wait until everything recorded so far would survive a power loss."""
        if self._is_foreign() or self._is_closing:
            return
        self.flush()
        self._appender.forcing.force()

    def close(self, reason: str = "closed", timeout: float | None = None) -> None:
        """Write what is queued, end the log, and seal it; safe to call more than once.

        Args:
            reason: Why the recording ended.
            timeout: How many seconds to wait for the queue and for the sealing; None is no limit.
        """
        if self._is_foreign():
            return
        with self._condition:
            self._put(pack("end", -1, {"reason": reason, "time": time.time()}))
            self._is_closing = True
            self._condition.notify_all()
        # A second call, from a signal handler say, waits for the queue too.
        self._thread.join(timeout)
        if self._thread.is_alive():
            return
        if self._sealing is not None:
            self._sealing.finish(timeout)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None

    def _is_foreign(self) -> bool:
        # A forked child (a DataLoader worker) owns neither the thread nor the file position.
        return os.getpid() != self._pid

    def _wait_for_room(self, step: int, num_bytes: int) -> bool:
        """Return once the queue has room for a record; False if it has to be dropped."""
        with self._condition:
            if self._is_closing:
                return False
            if not self._condition.wait_for(lambda: self._has_room(num_bytes), self._wait_seconds):
                problem = (
                    f"records are dropped: {self._queued_bytes} bytes wait to be written and the "
                    f"disk did not keep up for {self._wait_seconds} seconds; raise `queue_bytes`, "
                    "record less, or set `block=True` to wait instead"
                )
                self._appender.lose("record", step, num_bytes, "the queue was full", problem)
                return False
            return True

    def _lose_for_memory(self, kind: str, step: int, num_bytes: int) -> None:
        problem = f"records are dropped: there is no memory for {num_bytes} bytes"
        self._appender.lose(kind, step, num_bytes, "the memory was full", problem)

    def _has_room(self, num_bytes: int) -> bool:
        # An empty queue takes any record, so one larger than the bound is not lost for ever.
        return not self._queue or self._queued_bytes + num_bytes <= self._queue_bytes

    def _put(self, pending: Pending) -> bool:
        if self._is_foreign():
            return False
        with self._condition:
            if self._is_closing:
                return False
            # In this order, as a Ctrl-C may come between the two.
            self._queued_bytes += pending.num_bytes
            self._queue.append(pending)
            self._condition.notify_all()
        return True

    def _take_buffer(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        size = _rounded_up(num_bytes)
        with self._condition:
            if self._pool.get(size):
                self._pooled_bytes -= size
                return self._pool[size].pop()[:num_bytes]
        return np.empty(size, np.uint8)[:num_bytes]

    def _give_back(self, buffer: npt.NDArray[np.uint8]) -> None:
        whole = buffer if buffer.base is None else buffer.base
        if not isinstance(whole, np.ndarray) or not whole.nbytes:
            return
        if self._pooled_bytes + whole.nbytes <= self._queue_bytes // 4:
            self._pooled_bytes += whole.nbytes
            self._pool.setdefault(whole.nbytes, []).append(whole)

    def _append_all(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: bool(self._queue) or self._is_closing)
                if not self._queue:
                    break
                pending = self._queue[0]
            self._appender.store(pending)
            with self._condition:
                self._queue.popleft()
                self._queued_bytes -= pending.num_bytes
                if pending.buffer is not None:
                    self._give_back(pending.buffer)
                self._condition.notify_all()
        self._appender.finish()


def _rounded_up(num_bytes: int) -> int:
    """Round a size up by an eighth at most, so that records of nearly one size share buffers."""
    unit = 1 << max(0, num_bytes.bit_length() - 4)
    return -(-num_bytes // unit) * unit
