"""Power losses: what was announced as safe is read back, and nothing else than what was written.

Trainings are recorded on a modelled disk (`disk_model`), which then loses power after each thing
that was done to it, in many ways. What is asserted is the promise of the log:

- Opening works as soon as the run was described; nothing that is read is wrong, and nothing twice.
- What was announced is there: with `sync="record"` every record whose `flush` returned, else every
  record before the last `sync`; and every record of a segment whose name is safe.
- Of what came later, a record may be there although one before it is not. Then that is reported.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from sonde.exceptions import RunNotFoundError
from sonde.log import Run, open_run
from sonde.log.format.files import RUN_FILE, sync_folder
from sonde.log.reading.segment import Segment
from sonde.log.reading.segment_file import identify
from sonde.log.sealing.seal import seal_run

from .conftest import assert_holds, assert_identical, assert_intact, copies, write_records
from .disk_model import Disk, Event, State, Tape, materialise
from .doomed import time_limit
from .files import frame_bounds, frames_of, journal_of, journals_of, segment_of, segments_of
from .trainings import IDS, RESUMED, RUN, TRAININGS, Training, known_record, record

_SEGMENT = re.compile(r"\d{12}-\d{12}\.h5")


@cache
def sealed_records(content: bytes, scratch: Path) -> frozenset[int]:
    """Return the numbers of the records in a segment."""
    path = scratch / f"{zlib.crc32(content)}.h5"
    path.write_bytes(content)
    groups = Segment(identify(path)).groups
    return frozenset(about["n"] for group in groups for about in group.attributes)


def promised(disk: Disk, scratch: Path) -> set[int]:
    """Return the numbers of all records that are promised to be there."""
    numbers = {number for number in disk.promised if isinstance(number, int)}
    for name, content in disk.safe_files():
        if _SEGMENT.fullmatch(name):
            numbers |= sealed_records(content, scratch)
    return numbers


def read_numbers(run: Run) -> dict[int, int]:
    """Check every array of a run, and return the step of each record by its number."""
    if "activations" not in run.measures:
        return {}
    log = run["activations"]
    numbers = {}
    for step in log.steps:
        number = log.attributes(step)["n"]
        read = {(layer, name): log.array(name, step, layer) for layer, name in log.describe(step)}
        assert_holds(known_record(number), read)
        numbers[number] = step
    return numbers


def check(run_path: Path, wanted: set[int], training: Training) -> set[int]:
    """Check what is left of a run; return the numbers of its records."""
    run = open_run(run_path)
    assert run.info["name"] == "seed0"
    steps = read_numbers(run)
    there = set(steps)
    assert set(copies(run_path).values()) <= {1}
    first = {number for number in there if number < RESUMED}
    second = there - first
    assert all(steps[number] == number for number in first)
    if second:
        assert training.resume_step is not None
        assert all(steps[number] == training.resume_step + number - RESUMED for number in second)
        # The second attempt supersedes the first from its first step on.
        assert max(first, default=-1) < min(steps[number] for number in second)
        wanted = {n for n in wanted if n >= RESUMED or n < training.resume_step}
    assert wanted <= there
    if wanted:
        assert_identical(run["activations"].table("id"), IDS)
    assert run.damage or (is_prefix(first, 0) and is_prefix(second, RESUMED))
    return there


def is_prefix(numbers: set[int], start: int) -> bool:
    return numbers == set(range(start, start + len(numbers)))


def check_sealed(run_path: Path, there: set[int], wanted: set[int], training: Training) -> None:
    """Seal what is left of a run, and check that this changes nothing."""
    seal_run(run_path)
    assert check(run_path, wanted, training) == there
    assert [path for path in journals_of(run_path) if frames_of(path)] == []


def power_losses(
    events: Sequence[Event], num_states: int, rng: random.Random
) -> Iterator[tuple[Disk, State]]:
    """Yield states a disk may be in, spread over all that was done to it, and the disk then."""
    disk = Disk()
    points = Counter(rng.randrange(len(events)) for _ in range(num_states))
    for position, event in enumerate(events):
        disk.apply(event)
        for _ in range(points[position]):
            yield disk, disk.lose_power(rng, rng.choice((512, 4096, 4096)))


def survive_power_losses(training: Training, num_states: int, root: Path) -> int:
    """Lose power in many ways, and return in how many of them the run was there."""
    rng = random.Random(zlib.crc32(repr(training).encode()))
    events = record(training, root / "recorded")
    (root / "segments").mkdir()
    state_path = root / "state"
    num_opened = 0
    for disk, state in power_losses(events, num_states, rng):
        materialise(state, state_path)
        with time_limit(20):
            if RUN / RUN_FILE in state:
                num_opened += 1
                wanted = promised(disk, root / "segments")
                there = check(state_path / RUN, wanted, training)
                if rng.random() < 0.1:
                    check_sealed(state_path / RUN, there, wanted, training)
            else:
                assert RUN_FILE not in disk.promised
                with pytest.raises(RunNotFoundError):
                    open_run(state_path / RUN)
        shutil.rmtree(state_path)
    return num_opened


@pytest.mark.parametrize("training", TRAININGS, ids=Training.name)
def test_power_loss_costs_nothing_that_was_announced(
    training: Training, memory_path: Path, is_full: bool, counts: Counter[str]
) -> None:
    num_states = 700 if is_full else 60
    num_opened = survive_power_losses(training, num_states, memory_path)
    assert num_opened > num_states // 3
    counts[f"losses of power, sync={training.sync}"] += num_states


def test_whole_segment_is_kept_when_its_journal_has_lost_a_record(run_path: Path) -> None:
    # Nobody forces a journal to the disk that is sealed, and its deletion may be lost too.
    write_records(run_path, range(5))
    journal = journal_of(run_path)
    whole = journal.read_bytes()
    start, end = frame_bounds(journal)[4]
    seal_run(run_path)
    journal.write_bytes(whole[:start] + bytes(end - start) + whole[end:])
    seal_run(run_path)
    assert_intact(run_path, range(5))
    assert journals_of(run_path) == []


def test_journal_that_was_cut_short_adds_no_second_segment(run_path: Path) -> None:
    write_records(run_path, range(5))
    journal = journal_of(run_path)
    start = journal.read_bytes()[: frame_bounds(journal)[3][1]]
    seal_run(run_path)
    journal.write_bytes(start)
    seal_run(run_path)
    assert_intact(run_path, range(5))
    assert len(segments_of(run_path)) == 1


def test_journal_replaces_a_segment_that_is_damaged(run_path: Path) -> None:
    write_records(run_path, range(5))
    journal = journal_of(run_path)
    whole = journal.read_bytes()
    seal_run(run_path)
    segment = segment_of(run_path)
    segment.write_bytes(segment.read_bytes()[:-100])
    journal.write_bytes(whole)
    seal_run(run_path)
    assert assert_intact(run_path, range(5)).damage == []


def test_file_left_by_a_sealer_of_the_same_process_number_is_replaced(run_path: Path) -> None:
    # In a container that is started again, processes have the numbers they had before.
    write_records(run_path, range(5))
    left = journal_of(run_path).with_name(f"{0:012d}-{7:012d}.{os.getpid()}.tmp")
    left.touch()
    seal_run(run_path)
    assert_intact(run_path, range(5))
    assert not left.exists()


def test_model_keeps_what_was_forced_and_loses_anything_else(memory_path: Path) -> None:
    root = memory_path / "root"
    root.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        tape = Tape(root, monkeypatch)
        for name in ("forced", "nameless", "loose"):
            with (root / name).open("xb") as file:
                file.write(b"a" * 1024)
                file.flush()
                if name != "loose":
                    os.fsync(file.fileno())
            if name == "forced":
                sync_folder(root)
        (root / "loose").replace(root / "renamed")
        (root / "forced").unlink()
    disk = Disk()
    for event in tape.events:
        disk.apply(event)
    states = [disk.lose_power(random.Random(seed), 512) for seed in range(500)]
    assert {state.get(Path("forced")) for state in states} == {b"a" * 1024, None}
    assert {state.get(Path("nameless")) for state in states} == {b"a" * 1024, None}
    torn = {b"a" * 512 + bytes(512), bytes(512) + b"a" * 512, bytes(1024), b"a" * 1024}
    for name in ("loose", "renamed"):
        assert torn | {b"", None} < {state.get(Path(name)) for state in states}
    assert any({Path("loose"), Path("renamed")} <= set(state) for state in states)
    del disk._folders[0].pending[-1]
    assert all(disk.lose_power(random.Random(seed), 512)[Path("forced")] for seed in range(50))
