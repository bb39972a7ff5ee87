"""Scanning a journal: what a reader makes of a damaged one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from sonde.log import Damage, LogArray, LogWriter, open_run
from sonde.log.format.frames import Frame, encode_index
from sonde.log.format.payload import lay_out
from sonde.log.reading.scan import scan_journal
from sonde.log.writing.journal import Journal

from .conftest import assert_intact, new_run, write_records
from .files import frame_bounds, frames_of, journal_of, journals_of, overwrite

NUM_RECORDS = 6


@pytest.fixture
def journal(run_path: Path) -> Path:
    write_records(run_path, range(NUM_RECORDS))
    return journal_of(run_path)


def scan(path: Path) -> list[Frame | Damage]:
    with path.open("rb") as file:
        return list(scan_journal(file.fileno(), "j"))


def damage_of(path: Path) -> list[Damage]:
    return [item for item in scan(path) if isinstance(item, Damage)]


def test_every_flipped_byte_of_a_tiny_journal_is_reported(tmp_path: Path) -> None:
    folder = new_run(tmp_path / "tiny") / "attempt0-rank0"
    folder.mkdir()
    writer = Journal(folder, 0, token=1)
    for step in range(3):
        values = np.full(8, step, np.uint8)
        layout = lay_out([LogArray("a", values, ("n",))])
        index = encode_index("record", {"measure": "m", "source": "s"}, layout)
        writer.append(index, layout, [values.data], step)
    writer.close()
    content = writer.path.read_bytes()
    for position in range(len(content)):
        for mask in (1, 0x80, 0xFF):
            flipped = bytearray(content)
            flipped[position] ^= mask
            writer.path.write_bytes(flipped)
            steps = [frame.step for frame in frames_of(writer.path)]
            # The file header costs no record.
            hit = (position - 40) * 3 // (len(content) - 40) if position >= 40 else None
            assert steps == [step for step in range(3) if step != hit]
            (damage,) = damage_of(writer.path)
            assert damage.offset <= position < damage.offset + damage.num_bytes


def test_truncated_journal_reads_as_a_clean_prefix(run_path: Path) -> None:
    write_records(run_path, range(2))
    journal = journal_of(run_path)
    ends = [end for _, end in frame_bounds(journal)]
    steps = [frame.step for frame in frames_of(journal)]
    for length in reversed(range(journal.stat().st_size)):
        os.truncate(journal, length)
        items = scan(journal)
        found = [item.step for item in items if isinstance(item, Frame)]
        assert found == steps[: sum(end <= length for end in ends)]
        tails = [item.is_tail for item in items if isinstance(item, Damage)]
        assert tails == ([] if length in (40, *ends) else [True])


@pytest.mark.parametrize("record", range(NUM_RECORDS))
def test_journal_cut_inside_a_record_holds_those_before(journal: Path, record: int) -> None:
    start, end = [
        bound
        for bound, frame in zip(frame_bounds(journal), frames_of(journal), strict=True)
        if frame.kind == "record"
    ][record]
    os.truncate(journal, (start + end) // 2)
    run = assert_intact(journal.parent.parent, range(record))
    assert run.damage == []  # It looks as if its process had been killed.
    assert [damage.is_tail for damage in run.unfinished] == [True]


def test_frame_of_another_journal_is_named_as_such(journal: Path, tmp_path: Path) -> None:
    other = new_run(tmp_path / "other")
    write_records(other, [20])
    bounds = frame_bounds(journal_of(other))
    content = journal.read_bytes()
    journal.write_bytes(content + journal_of(other).read_bytes()[slice(*bounds[2])])
    assert [str(damage) for damage in damage_of(journal)] == [
        "j: record 2 (activations, step 20) belongs to another journal "
        f"({bounds[2][1] - bounds[2][0]} bytes at byte {len(content)})"
    ]


def test_repeated_frame_is_reported_as_out_of_order(journal: Path) -> None:
    content = journal.read_bytes()
    journal.write_bytes(content + content[slice(*frame_bounds(journal)[3])])
    assert [damage.reason for damage in damage_of(journal)] == [
        "record 3 (activations, step 1) is out of order"
    ]


def test_journal_inside_an_array_is_not_read_as_records(run_path: Path) -> None:
    write_records(run_path, range(3))
    inner = journal_of(run_path).read_bytes()
    writer = LogWriter(run_path, attempt=1, about={"resume_step": 3}, seal=False)
    writer.append("files", "probe", 3, [LogArray("bytes", np.frombuffer(inner, "u1"), ("byte",))])
    writer.append("files", "probe", 4, [])
    writer.close()
    journal = run_path / "attempt1-rank0" / "000000000000.journal"
    content = bytearray(journal.read_bytes())
    content[frame_bounds(journal)[1][0]] ^= 1
    overwrite(journal, bytes(content), 1)
    assert open_run(run_path).steps("files") == [4]
    assert_intact(run_path, range(3))


def test_a_frame_that_was_cut_out_whole_is_reported(journal: Path) -> None:
    content = journal.read_bytes()
    start, end = frame_bounds(journal)[3]
    journal.write_bytes(content[:start] + content[end:])
    (missing,) = assert_intact(journal.parent.parent, [0, *range(2, NUM_RECORDS)]).damage
    assert missing.reason.startswith("frames 3 to 3 are missing before record 4")


def test_small_records_are_not_read_over_and_over(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LogWriter(run_path, seal=False)
    for step in range(2000):
        writer.append("scalars", "training", step, [LogArray("loss", np.array(0.5), ())])
    writer.close()
    (journal,) = journals_of(run_path)
    read, num_read = os.pread, [0]

    def counted(fd: int, num_bytes: int, offset: int) -> bytes:
        data = read(fd, num_bytes, offset)
        num_read[0] += len(data)
        return data

    monkeypatch.setattr(os, "pread", counted)
    assert len(open_run(run_path).scalars.steps) == 2000
    assert num_read[0] < 2 * journal.stat().st_size
