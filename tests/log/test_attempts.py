"""Attempts: which records of an earlier one a later one supersedes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sonde.log import LogArray, LogWriter, Run, open_run
from sonde.log.sealing.seal import seal_run

from .conftest import assert_identical, write_records
from .doomed import record_of


@pytest.mark.parametrize("are_sealed", [False, True])
def test_resumed_attempt_hides_what_it_supersedes(run_path: Path, are_sealed: bool) -> None:
    for attempt, (steps, about) in enumerate(
        [
            (range(0, 100, 10), {}),
            (range(50, 80, 10), {"resume_step": 50}),
            (range(65, 90, 5), {"resume_step": 65}),
        ]
    ):
        writer = LogWriter(run_path, attempt=attempt, about=about, seal=False)
        for step in steps:
            writer.append("m", "s", step, [LogArray("attempt", np.array(attempt), ())])
        writer.close()
    if are_sealed:
        seal_run(run_path)
    log = open_run(run_path).m
    assert dict(zip(log.steps, log.stack("attempt").tolist(), strict=True)) == {
        **dict.fromkeys(range(0, 50, 10), 0),
        **dict.fromkeys(range(50, 65, 10), 1),
        **dict.fromkeys(range(65, 90, 5), 2),
    }


def test_attempt_that_started_afresh_hides_everything_before(run_path: Path) -> None:
    write_records(run_path, range(5))
    write_records(run_path, [1])
    assert open_run(run_path).steps() == [1]
    assert open_run(run_path).attempts[1]["attempt"] == 1


def test_attempt_that_lost_its_resume_step_hides_from_its_first_record_on(run_path: Path) -> None:
    write_records(run_path, range(7))
    write_records(run_path, range(5, 9), resume_step=None)
    run = assert_intact_except_copies(run_path, range(9))
    assert [about.get("resume_step", 0) for about in run.attempts] == [0, None]


def test_attempt_whose_resume_step_is_damaged_hides_from_its_first_record_on(
    run_path: Path,
) -> None:
    write_records(run_path, range(5))
    write_records(run_path, range(3, 7), resume_step=3)
    journal = run_path / "attempt1-rank0" / "000000000000.journal"
    content = bytearray(journal.read_bytes())
    content[100] ^= 1
    journal.write_bytes(content)
    run = assert_intact_except_copies(run_path, range(7))
    assert len(run.damage) == 1


def assert_intact_except_copies(path: Path, numbers: range) -> Run:
    run = open_run(path)
    assert run.steps() == list(numbers)
    for number in numbers:
        assert_identical(run.activations.array("loss", number), record_of(number)[3].values)
    return run


def test_attempts_are_ordered_by_number(run_path: Path) -> None:
    for attempt in (2, 10, 9):
        LogWriter(run_path, attempt=attempt, about={"host": str(attempt)}, seal=False).close()
    assert [about["host"] for about in open_run(run_path).attempts] == ["2", "9", "10"]
