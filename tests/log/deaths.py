"""Where a process that writes or seals a log is made to die, and how it is made to."""

from __future__ import annotations

import itertools
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import h5py

from sonde.log.writing.appender import Sync

Act = Literal["write", "write beside a sealer", "seal beside a writer", "seal"]
When = Literal["before", "amid", "after"]

BYTES = "bytes"
CENSUS = "census"


@dataclass(frozen=True)
class Death:
    """Where a process dies.

    Attributes:
        act: What it does.
        sync: When the log is forced to the disk.
        call: At which kind of call. `bytes` is a write of any kind, also one of libhdf5, that makes
            a file larger than `number` bytes: it dies with so many of them written. `census` is
            none: it lives, and leaves a file that says how often it made each call.
        number: At which of these calls, counted from 0.
        when: Before that call, amid or after it. Only a write has a middle.
    """

    act: Act
    sync: Sync
    call: str
    number: int = 0
    when: When = "before"


def each_death(act: Act, sync: Sync, census: Counter[str]) -> list[Death]:
    """Return every death of a process that makes each call so often."""
    return [
        Death(act, sync, call, number, when)
        for call, count in sorted(census.items())
        for number in range(count)
        for when in MOMENTS[call == "write"]
    ]


MOMENTS: tuple[tuple[When, ...], tuple[When, ...]] = (
    ("before", "after"),
    ("before", "amid", "after"),
)


def arm(death: Death) -> Counter[str]:
    """Let this process die as is said, and count the calls it makes.

    An fsync does nothing here: what a process wrote outlives it, without being forced to the disk.
    """
    if death.call == BYTES:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (death.number, death.number))
    census: Counter[str] = Counter()
    countdown = itertools.count(death.number, -1)

    def watch(
        home: Any,  # a module or class
        name: str,
        call: str,
        counts: Callable[..., bool] = lambda *_, **__: True,
    ) -> None:
        original = getattr(home, name)

        @wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:  # whatever the original takes and returns
            if not counts(*args, **kwargs):
                return original(*args, **kwargs)
            census[call] += 1
            if call != death.call or next(countdown) != 0:
                return original(*args, **kwargs)
            if death.when == "amid":
                _write_half(original, *args)
            if death.when == "after":
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(home, name, watched)

    os.fsync = lambda fd: None
    watch(os, "pwritev", "write")
    watch(os, "fsync", "force")
    watch(os, "ftruncate", "truncate")
    watch(os, "open", "create", lambda path, flags, *_, **__: bool(flags & os.O_CREAT))
    watch(Path, "open", "create", lambda path, mode="r", *_, **__: mode[0] in "wx")
    watch(Path, "mkdir", "create")
    watch(Path, "replace", "rename")
    watch(Path, "unlink", "delete")
    watch(h5py.File, "__init__", "create", lambda self, name, mode="r", **_: mode == "x")
    watch(h5py.File, "close", "close")
    return census


def _write_half(
    write: Callable[[int, list[bytes], int], int], fd: int, buffers: list[memoryview], offset: int
) -> None:
    whole = b"".join(buffers)
    write(fd, [whole[: len(whole) // 2]], offset)
