"""Processes that are killed while they write or seal a log, and the records they write.

Run as a module, so that a child needs no pytest: `append RUN SYNC` appends until it is killed, and
`die` forks a child for each death it is told of, and says how that ended.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sonde.log import LogArray, LogWriter
from sonde.log.format.files import write_run_file
from tests.limits import LIMIT_SECONDS

if TYPE_CHECKING:
    from .deaths import Death

PWritev = Callable[[int, Sequence[Any], int], int]

NUM_RECORDS = 14
SEGMENT_BYTES = 2_000


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what hangs."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds} seconds")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def record_of(number: int) -> list[LogArray]:
    """Return what record `number` holds: the same in every process."""
    rng = np.random.default_rng(number)
    bits = rng.integers(0, 2**16, (4, 3), np.uint16)
    arrays = [
        LogArray("gram", rng.normal(size=(5, 5)).astype(np.float32), ("example", "other"), "conv1"),
        LogArray("full", bits, ("example", "feature"), "head", "bfloat16"),
        LogArray("ids", np.arange(number % 4), ("element",)),
        LogArray("loss", np.array(rng.normal()), ()),
    ]
    if number % 3 == 0:
        arrays.append(LogArray("full", rng.normal(size=(5, 0)), ("example", "none"), "rare"))
    return arrays


def append_record(writer: LogWriter, number: int) -> bool:
    """Append `record_of` a number at the step of that number; tell whether it was taken."""
    return writer.append("activations", "probe", number, record_of(number))


def failing_write(write: PWritev) -> PWritev:
    """Return a write of which every fifth of the log fails, after half of it."""
    turns = itertools.cycle((False, False, False, False, True))

    def pwritev(fd: int, buffers: Sequence[Any], offset: int) -> int:
        if threading.current_thread().name == "sonde-log" and next(turns):
            whole = b"".join(buffers)
            write(fd, [whole[: len(whole) // 2]], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, buffers, offset)

    return pwritev


def append_until_killed(run: Path, sync: Any) -> None:
    """Append records for ever; print the number of each once it is committed."""
    write_run_file(run, {})
    writer = LogWriter(run, sync=sync, segment_bytes=12_000)
    for number in itertools.count():
        assert append_record(writer, number)
        writer.flush()
        os.write(1, b"%d\n" % number)
        time.sleep(0.002)  # A step of a training.


class Sealer:
    """The sealing process of a writer, forked and not started, which is quick.

    It stands in for the `Popen` object of `Sealing`, its standard input included, and answers each
    line once it has done what it says.
    """

    def __init__(self, run: Path, death: Death | None) -> None:
        lines, self._lines = os.pipe()
        self._answers, answers = os.pipe()
        self._num_asked = 0
        self.returncode: int | None = None
        self.stdin = self
        self.stderr = io.BytesIO()
        self._pid = fork(lambda: self._seal(run, lines, answers, death))
        os.close(lines)
        os.close(answers)

    def _seal(self, run: Path, lines: int, answers: int, death: Death | None) -> None:
        from sonde.log.sealing.seal import seal_run
        from sonde.log.writing.sealer_process import END

        from .deaths import arm

        os.close(self._lines)
        census = arm(death) if death is not None else {}
        for line in os.fdopen(lines):
            if int(line) == END:
                break
            seal_run(run, "attempt0-rank0", int(line))
            os.write(answers, b".")
        if death is not None:
            (run / "census").write_text(json.dumps(census))

    def write(self, line: bytes) -> None:
        """Ask for something."""
        os.write(self._lines, line)
        self._num_asked += 1

    def flush(self) -> None:
        """Do nothing: every line was written."""

    def close(self) -> None:
        """Ask for nothing more."""
        os.close(self._lines)

    def catch_up(self) -> None:
        """Wait until all that was asked for is done, or nothing will be."""
        while self._num_asked and os.read(self._answers, 1):
            self._num_asked -= 1

    def poll(self) -> int | None:
        """Say how it has ended, if it has."""
        return self._wait(os.WNOHANG)

    def wait(self, timeout: float | None) -> None:
        """Wait until it has ended."""
        self._wait(0)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self._pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def write(run: Path, death: Death) -> None:
    """Write records over several journals, beside a sealer or alone."""
    from sonde.log.writing import appender
    from sonde.log.writing.sealer_process import Sealing

    from .deaths import arm

    announced = os.open(run / "announced", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    is_sealed = death.act != "write"
    dying_sealer = death if death.act == "seal beside a writer" else None
    # Two, as a writer replaces one that has died.
    sealers = [Sealer(run, d) for d in (dying_sealer, None) if is_sealed]
    waiting: Iterator[Any] = iter(sealers)  # They stand in for Popen.
    Sealing._new_process = lambda self: next(waiting)  # type: ignore[method-assign]  # for this process
    appender._RETRIES_SECONDS = (0.0, 0.0, 0.0)
    os.pwritev = failing_write(os.pwritev)  # type: ignore[assignment]  # takes what is passed
    census = arm(death) if dying_sealer is None else None
    write_run_file(run, {})
    writer = LogWriter(run, sync=death.sync, segment_bytes=SEGMENT_BYTES, seal=is_sealed)
    writer.add_table("probe", [LogArray("id", np.arange(5), ("example",))])
    for number in range(NUM_RECORDS):
        assert append_record(writer, number)
        writer.flush()
        os.write(announced, b"%d\n" % number)
        if number % 5 == 4:
            writer.sync()
            for sealer in sealers:
                sealer.catch_up()
    writer.close()
    if census is not None:
        (run / "census").write_text(json.dumps(census))


def seal(run: Path, death: Death) -> None:
    """Seal a copy of the run `whole` beside it."""
    from sonde.log.sealing.seal import seal_run

    from .deaths import arm

    shutil.copytree(run.parent / "whole", run, dirs_exist_ok=True)
    census = arm(death)
    seal_run(run)
    (run / "census").write_text(json.dumps(census))


_errors = 2  # The file descriptor that children report errors to; it is closed once all have ended.


def fork(act: Callable[[], None]) -> int:
    """Do something in a child, under a limit of time."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(LIMIT_SECONDS)
    try:
        act()
    except BaseException as error:
        os.write(_errors, f"{error!r}\n".encode())
        os._exit(1)
    os._exit(0)


def die(run: Path, death: Death) -> dict[str, Any]:
    """Let a child die, wait until it and its sealers have ended, and say how it did."""
    global _errors
    reading, _errors = os.pipe()
    run.mkdir()
    pid = fork(lambda: (seal if death.act == "seal" else write)(run, death))
    os.close(_errors)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(reading) as errors:
        return {"status": status, "errors": errors.read()}


if __name__ == "__main__":
    if sys.argv[1] == "append":
        append_until_killed(Path(sys.argv[2]), sys.argv[3])
    else:
        import_module("sonde.log.sealing.seal")  # Loads h5py once, not in every child.
        from .deaths import Death

        for line in sys.stdin:
            run_path, *death = json.loads(line)
            print(json.dumps(die(Path(run_path), Death(*death))), flush=True)
