"""Contestants measured in turn, so that a noisy machine hits all of them alike."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

PLAIN = "plain"

Work: TypeAlias = Callable[[], Any]
"""What is measured."""

Case: TypeAlias = Callable[[], AbstractContextManager[Work]]
"""Sets up what is measured; the work it yields is done once for each measurement."""


@dataclass(frozen=True)
class Costs:
    """Seconds of each case by round, and why the others have none."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str, to: str = PLAIN) -> float:
        """Return the median of the ratios to another case within a round."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(cost / other for cost, other in pairs)

    def milliseconds(self, name: str) -> float:
        """Return the median of a case."""
        return 1e3 * statistics.median(self.seconds[name])


def keep_freed_memory() -> None:
    """Let the C library (glibc) keep memory that is freed, instead of giving it back.

    Raises:
        OSError: If it refuses.
    """
    # M_TRIM_THRESHOLD and M_MMAP_MAX of mallopt(3).
    for parameter, value in ((-1, 2**31 - 1), (-4, 0)):
        if not ctypes.CDLL(None).mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) failed")


def cpu_seconds(work: Work) -> float:
    """Return the CPU time of all threads of this process while it works."""
    start = time.process_time()
    work()
    return time.process_time() - start


def cuda_seconds(work: Work) -> float:
    """Return the time between two events of the CUDA stream, around the work."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Callable[[Work], float]:
    """Return what measures time on a device."""
    return cuda_seconds if device.type == "cuda" else cpu_seconds


def measure(
    cases: Mapping[str, Case], rounds: int, seconds: Callable[[Work], float] = cpu_seconds
) -> Costs:
    """Measure all cases in turn, after each has worked once, in an order that rotates."""
    costs = Costs()
    works: dict[str, Work] = {}
    with ExitStack() as stack:
        for name, case in cases.items():
            try:
                with ExitStack() as setup:
                    work = setup.enter_context(case())
                    work()
                    stack.push(setup.pop_all())
            except Exception as error:  # Whatever a peer raises is why it has no row.
                if name == PLAIN or name.startswith("sonde"):
                    raise
                costs.failures[name] = reason_of(error)
            else:
                works[name] = work
                costs.seconds[name] = []
        names = list(works)
        for number in range(rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                costs.seconds[name].append(seconds(works[name]))
            print(f"\r{', '.join(names)}: round {number + 1} of {rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return costs


def reason_of(error: Exception) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
