"""Trainings recorded on a modelled disk, in all the ways that matter to what is safe when."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest

from sonde.log import LogArray, LogWriter
from sonde.log.format.files import RUN_FILE, write_run_file
from sonde.log.sealing.seal import seal_run
from sonde.log.writing.appender import Sync

from .disk_model import Event, Tape
from .doomed import failing_write, record_of

NUM_RECORDS = 12
RUN = Path("runs", "seed0")
IDS = np.arange(5)
RESUMED = 100
"""The number of the first record of a second attempt."""

SealingTime = Literal["beside", "after", "never"]

known_record = cache(record_of)


@dataclass(frozen=True)
class Training:
    """What is recorded, and how.

    Attributes:
        sync: When the log is forced to the disk.
        segment_bytes: When a journal is full.
        sealing: Whether journals are sealed while it is written, once it is closed, or not.
        resume_step: Where a second attempt goes on, if there is one.
        fails: Every few writes one fails, half done.
        calls_sync: `LogWriter.sync` is called every few records.
    """

    sync: Sync
    segment_bytes: int
    sealing: SealingTime
    resume_step: int | None
    fails: bool
    calls_sync: bool

    def name(self) -> str:
        return "-".join(map(str, vars(self).values()))


_SHAPES: tuple[tuple[int, SealingTime, int | None, bool, bool], ...] = (
    (1_000, "beside", None, True, True),
    (2_500, "beside", None, False, False),
    (2_500, "beside", 9, False, True),
    (5_000, "after", 5, True, True),
    (8_000, "never", 7, False, True),
    (64 << 20, "after", None, True, False),
)
TRAININGS = [Training(sync, *shape) for sync in get_args(Sync) for shape in _SHAPES]


class SealingHere:
    """Stands in for the sealing process: seals in this one, when told to."""

    problem = None

    def __init__(self, run: Path, folder: Path) -> None:
        self._run = run
        self._folder = folder
        self._before = 0

    def start(self, before: int) -> None:
        self._before = before

    def catch_up(self) -> None:
        if self._before:
            seal_run(self._run, self._folder.name, self._before)

    def finish(self, timeout: float | None) -> None:
        self.catch_up()


def record_attempt(
    tape: Tape, run: Path, training: Training, attempt: int, numbers: range, step: int
) -> None:
    """Record `record_of` each number from a step on, and promise what the log promises."""
    writer = LogWriter(
        run,
        attempt=attempt,
        about={"resume_step": step},
        sync=training.sync,
        segment_bytes=training.segment_bytes,
        seal=training.sealing == "beside",
    )
    writer.add_table("probe", [LogArray("id", IDS, ("example",))])
    for number, at in zip(numbers, itertools.count(step), strict=False):
        assert writer.append("activations", "probe", at, known_record(number), {"n": number})
        if number % 3 != 1:  # Not after each: some are forced while others are appended.
            assert writer.flush(20)
            if training.sync == "record":
                tape.promise([number, number - 1] if number % 3 == 2 else [number])
        if number % 5 == 3 and training.calls_sync:
            writer.sync()
            tape.promise(range(numbers.start, number + 1))
        if number % 4 == 3 and isinstance(writer._sealing, SealingHere):
            writer._sealing.catch_up()
    writer.close()
    assert writer.problem is None


def record(training: Training, root: Path) -> list[Event]:
    """Record a training, and return what it did to the disk."""
    root.mkdir()
    run = root / RUN
    with pytest.MonkeyPatch.context() as monkeypatch:
        if training.fails:
            monkeypatch.setattr(os, "pwritev", failing_write(os.pwritev))
            monkeypatch.setattr("sonde.log.writing.appender._RETRIES_SECONDS", (0.0, 0.0, 0.0))
        tape = Tape(root, monkeypatch)
        monkeypatch.setattr("sonde.log.writing.writer.Sealing", SealingHere)
        run.mkdir(parents=True)
        write_run_file(run, {"name": "seed0"})
        tape.promise([RUN_FILE])
        record_attempt(tape, run, training, 0, range(NUM_RECORDS), 0)
        if training.resume_step is not None:
            numbers = range(RESUMED, RESUMED + NUM_RECORDS)
            record_attempt(tape, run, training, 1, numbers, training.resume_step)
        if training.sealing == "after":
            assert seal_run(run)
    return tape.events
