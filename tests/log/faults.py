"""Calls of the system that fail while a log is written or sealed, and how they are made to."""

from __future__ import annotations

import errno
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import h5py
import pytest

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EINTR)


@dataclass(frozen=True)
class Fault:
    """Which calls fail, and how.

    Attributes:
        number: The first of them, counted from 0 over all calls, or over those of `only`.
        times: How many fail from there on; None is all.
        error: What they fail with; None is a write that is short, and says so.
        written: How much of such a write reaches the file: this fraction, and at least a byte.
        only: The one kind of call that fails, if it is not every kind.
    """

    number: int
    times: int | None = None
    error: int | None = errno.EIO
    written: float = 0.0
    only: str | None = None


def each_fault(num_calls: int, times: int | None) -> Iterator[Fault]:
    """Yield a fault at every call, of every error; a write that fails has done a part, or all."""
    written = itertools.cycle((0.0, 0.5, 1.0))
    for number, error in itertools.product(range(num_calls), ERRORS):
        yield Fault(number, times, error, next(written))


class Disk:
    """Lets calls that reach the disk fail, and counts them.

    Args:
        fault: What fails, if anything.
        monkeypatch: Takes the calls over, and gives them back.

    Attributes:
        made: How often each kind of call was made.
        failed: How often each kind has failed.
    """

    def __init__(self, fault: Fault | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self._fault = fault
        self._num_counted = 0
        self._is_watching = True
        self._created: set[int] = set()
        homes: list[tuple[Any, str]] = [  # modules and classes
            *((os, name) for name in ("pwritev", "fsync", "ftruncate", "fstat", "open", "close")),
            *((Path, name) for name in ("mkdir", "replace", "unlink")),
            *((h5py.File, name) for name in ("__init__", "close")),
        ]
        for home, name in homes:
            call = f"h5py {name}" if home is h5py.File else name
            monkeypatch.setattr(home, name, self._taken_over(call, getattr(home, name)))

    @property
    def works(self) -> bool:
        """Whether nothing fails any more."""
        fault = self._fault
        if fault is None:
            return True
        return fault.times is not None and self._num_counted >= fault.number + fault.times

    def repair(self) -> None:
        """Let everything work from now on."""
        self._fault = None

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Let everything work meanwhile, and count nothing."""
        self._is_watching = False
        yield
        self._is_watching = True

    def _taken_over(self, call: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def taken_over(*args: Any, **kwargs: Any) -> Any:  # whatever the original takes, returns
            fault = self._fault_of(call, *args)
            if fault is None:
                result = original(*args, **kwargs)
            elif call == "pwritev":
                result = _write_part(original, fault.written, *args)
            elif call.endswith("close"):
                result = original(*args)  # It is closed all the same.
            self._keep_track(call, args, None if fault else result)
            if fault is None or fault.error is None:
                return result
            raise OSError(fault.error, os.strerror(fault.error))

        return taken_over

    def _fault_of(self, call: str, *args: Any) -> Fault | None:  # whatever the original takes
        """Count a call if it reaches the disk, and return the fault if it is to fail."""
        creates = call == "open" and args[1] & os.O_CREAT
        is_of_log = args[0] in self._created if call == "close" else call != "open" or creates
        if not self._is_watching or not is_of_log:
            return None
        self.made[call] += 1
        fault = self._fault
        if fault is None or fault.only not in (None, call):
            return None
        number = self._num_counted
        self._num_counted += 1
        position = number - fault.number
        if position < 0 or (fault.times is not None and position >= fault.times):
            return None
        self.failed[call] += 1
        return fault

    def _keep_track(self, call: str, args: Sequence[Any], result: Any) -> None:  # as above
        if call == "open" and args[1] & os.O_CREAT and result is not None:
            self._created.add(result)
        elif call == "close":
            self._created.discard(args[0])


def _write_part(
    write: Callable[[int, list[bytes], int], int],
    fraction: float,
    fd: int,
    buffers: list[memoryview],
    offset: int,
) -> int:
    whole = b"".join(buffers)
    return write(fd, [whole[: max(1, int(len(whole) * fraction))]], offset)
