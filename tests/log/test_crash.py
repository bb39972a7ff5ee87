"""Kills: what was announced as committed is read back, bit for bit and once, whatever died when."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sonde.log import open_run
from sonde.log.layout import lock_path, unlock
from sonde.log.seal import seal_run

from . import doomed
from .conftest import assert_intact, frames_of, journals_of, new_run, segments_of, write_records

NUM_KILLS = 25
NUM_WRITING_CALLS = 70  # More than a child makes, so that the last ones let it live.
NUM_SEALING_CALLS = 28  # Fewer than a child makes.
NUM_RECORDS = 10


def spawn(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, doomed.__file__, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def num_killed(*arguments: object) -> int:
    with spawn(*arguments) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
    assert process.returncode == 0
    return int(printed)


def states(root: Path, num_calls: int) -> Iterator[Path]:
    for call, fraction in itertools.product(range(num_calls), doomed.FRACTIONS):
        yield root / f"{call}-{fraction}"


def wait_for_lock(folder: Path) -> None:
    """Wait for a sealer that was forked just before the kill to let go of the writer's lock."""
    lock = lock_path(folder)
    assert lock is not None
    unlock(lock)


@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_records_announced_before_a_kill_are_all_there(tmp_path: Path, seed: int) -> None:
    run_path = new_run(tmp_path / "seed0")
    with spawn("append", run_path) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(random.Random(seed).uniform(0, 0.25))
        process.kill()
        announced = (first + process.stdout.read()).split(b"\n")
    assert process.returncode == -signal.SIGKILL
    numbers = range(int(announced[-2]) + 1)
    assert [int(number) for number in announced[:-1]] == list(numbers)
    # The child's own sealer may still be at work here.
    assert_intact(run_path, numbers, may_hold_more=True)
    wait_for_lock(run_path / "attempt0-rank0")
    seal_run(run_path)
    run = assert_intact(run_path, numbers, may_hold_more=True)
    # A journal that was killed before its first frame stays.
    assert [path for path in journals_of(run_path) if frames_of(path)] == []
    assert len(run.steps()) - len(numbers) <= 1
    assert all(damage.is_tail for damage in run.damage)
    assert run.state == "interrupted"


@pytest.fixture(scope="module")
def killed_writers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kill a writer before, amid and after each of its calls that reach the disk."""
    root = tmp_path_factory.mktemp("writers")
    assert 100 < num_killed("die-writing", root, NUM_WRITING_CALLS) < 3 * NUM_WRITING_CALLS
    return root


def check_killed_writer(run_path: Path) -> None:
    numbers = [int(line) for line in (run_path / "announced").read_bytes().split()]
    run = assert_intact(run_path, numbers, may_hold_more=True)
    assert len(run.steps()) - len(numbers) <= 1
    assert all(damage.is_tail for damage in run.damage)


def test_writer_killed_at_any_call_loses_nothing_announced(killed_writers: Path) -> None:
    for run_path in states(killed_writers, NUM_WRITING_CALLS):
        check_killed_writer(run_path)
    finished = open_run(run_path)
    assert finished.state == "finished"
    assert finished.steps() == list(range(NUM_RECORDS))
    assert len(journals_of(run_path)) > 2


def test_log_of_a_killed_writer_can_be_sealed(killed_writers: Path) -> None:
    # A sample is enough: how a journal ends does not depend on what else the writer did.
    for run_path in list(states(killed_writers, NUM_WRITING_CALLS))[1::5]:
        before = open_run(run_path)
        seal_run(run_path)
        check_killed_writer(run_path)
        # What remains as a journal holds no whole frame.
        assert len(open_run(run_path).damage) == len(before.damage)
        assert open_run(run_path).steps() == before.steps()


def test_attempt_killed_at_its_start_hides_nothing_of_the_one_before(tmp_path: Path) -> None:
    run_path = new_run(tmp_path / "seed0")
    write_records(run_path, range(5))
    (run_path / "attempt1-rank0").mkdir()
    assert_intact(run_path, range(5))
    (run_path / "attempt1-rank0" / "000000000000.journal").touch()
    assert_intact(run_path, range(5))


@pytest.fixture(scope="module")
def killed_sealers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kill a sealer before and after each call that creates, forces, renames or deletes."""
    root = tmp_path_factory.mktemp("sealers")
    write_records(new_run(root / "whole"), range(4), segment_bytes=1300)
    assert len(journals_of(root / "whole")) == 3
    assert num_killed("die-sealing", root, NUM_SEALING_CALLS) == 3 * NUM_SEALING_CALLS
    return root


def test_sealer_killed_at_any_call_loses_and_doubles_nothing(killed_sealers: Path) -> None:
    for run_path in states(killed_sealers, NUM_SEALING_CALLS):
        run = assert_intact(run_path, range(4))
        assert (run.damage, run.state) == ([], "finished")


def test_killed_sealing_can_be_repeated(killed_sealers: Path) -> None:
    for run_path in states(killed_sealers, NUM_SEALING_CALLS):
        seal_run(run_path)
        run = assert_intact(run_path, range(4))
        assert (run.damage, run.state) == ([], "finished")
        assert journals_of(run_path) == []
        assert len(segments_of(run_path)) == 3
