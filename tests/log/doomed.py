"""Processes that are killed while they write or seal a log, and the records they write.

Run as a script, so that a child needs neither pytest nor the tests package:
`append RUN` appends until it is killed; `die-writing ROOT N` and `die-sealing ROOT N` fork a child
for each of N × 3 states, which kills itself at one system call: before, amid or after it.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from sonde.log import LogArray, LogWriter
from sonde.log.layout import write_run_file

FRACTIONS = (0.0, 0.5, 1.0)


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


def append_until_killed(run: Path) -> None:
    """Append records for ever; print the number of each once it is committed."""
    write_run_file(run, {})
    writer = LogWriter(run, segment_bytes=12_000)
    for number in itertools.count():
        assert writer.append("activations", "probe", number, record_of(number))
        writer.flush()
        os.write(1, b"%d\n" % number)


def write_then_die(run: Path, call: int, fraction: float) -> None:
    """Write ten records over three journals, and die at one call that reaches the disk."""
    announced = os.open(run / "announced", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    write_run_file(run, {})
    countdown = itertools.count(call, -1)
    write = os.pwritev

    def pwritev(fd: int, buffers: list[memoryview[Any]], offset: int) -> int:
        if next(countdown) == 0:
            whole = b"".join(buffers)
            write(fd, [whole[: int(len(whole) * fraction)]], offset)
            _die()
        return write(fd, buffers, offset)

    os.pwritev = pwritev  # type: ignore[assignment]  # takes what the appender passes, no more
    # What a process wrote outlives it without being forced to the disk, which takes long.
    os.fsync = _dying(lambda fd: None, countdown, fraction)
    writer = LogWriter(run, sync="record", segment_bytes=2_000, seal=False)
    writer.add_table("probe", [LogArray("id", np.arange(5), ("example",))])
    for number in range(10):
        assert writer.append("activations", "probe", number, record_of(number))
        writer.flush()
        os.write(announced, b"%d\n" % number)
    writer.close()


def seal_then_die(run: Path, call: int, fraction: float) -> None:
    """Seal a copy of the run `whole` beside it, and die at one call that reaches the disk."""
    import h5py

    from sonde.log.seal import seal_run

    shutil.copytree(run.parent / "whole", run, dirs_exist_ok=True)
    countdown = itertools.count(call, -1)
    for home, name in (
        (h5py.File, "close"),
        (os, "pwritev"),
        (os, "fsync"),
        (Path, "replace"),
        (Path, "unlink"),
    ):
        setattr(home, name, _dying(getattr(home, name), countdown, fraction))
    seal_run(run)


def _dying(
    original: Callable[..., Any], countdown: itertools.count[int], fraction: float
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:  # whatever the original takes and returns
        is_last = next(countdown) == 0
        if is_last and fraction < 1:
            _die()
        result = original(*args, **kwargs)
        if is_last:
            _die()
        return result

    return call


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fork_each(root: Path, num_calls: int, act: Callable[[Path, int, float], None]) -> None:
    """Fork a child for each state; print how many of them died at their call."""
    num_killed = 0
    for call, fraction in itertools.product(range(num_calls), FRACTIONS):
        run = root / f"{call}-{fraction}"
        run.mkdir()
        pid = os.fork()
        if pid == 0:
            try:
                act(run, call, fraction)
            except BaseException as error:
                os.write(2, f"{run.name}: {error!r}\n".encode())
                os._exit(1)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        num_killed += os.WIFSIGNALED(status)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            sys.exit(f"{run.name} failed")
    print(num_killed)


if __name__ == "__main__":
    if sys.argv[1] == "append":
        append_until_killed(Path(sys.argv[2]))
    else:
        import_module("sonde.log.seal")  # Loads h5py once, not in every child.
        actions = {"die-writing": write_then_die, "die-sealing": seal_then_die}
        fork_each(Path(sys.argv[2]), int(sys.argv[3]), actions[sys.argv[1]])
