"""The journal's bytes: their layout, and what a reader makes of damaged ones."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sonde.exceptions import FormatError, InvalidInputError
from sonde.log import Damage, LogArray, LogWriter, open_run
from sonde.log.frames import (
    Frame,
    check_arrays,
    encode_index,
    fill_payload,
    lay_out,
    link_name,
    scan_journal,
    stream_name,
)
from sonde.log.journal import Journal

from .conftest import (
    assert_intact,
    frame_bounds,
    frames_of,
    journal_of,
    new_run,
    overwrite,
    write_records,
)

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


def test_journal_has_the_documented_bytes(tmp_path: Path) -> None:
    arrays = [
        LogArray("loss", np.array([1.5, 2.5], np.float32), ("axis",), "fc"),
        LogArray("ok", np.array([True, False, True]), ("axis",)),
    ]
    layout = lay_out(arrays)
    payload = np.empty(layout.num_bytes, np.uint8)
    fill_payload(payload, layout, arrays)
    journal = Journal(tmp_path, 7, token=0xABCD)
    journal.append(
        encode_index("record", {"measure": "m"}, layout), layout, [payload.data], step=12
    )
    journal.close()

    head = b"SONDEJNL" + struct.pack("<IIQQI", 1, 0, 0xABCD, 7, 0)
    index = (
        b'{"kind":"record","measure":"m"}\n'
        b'[["fc","loss","float32",[2],["axis"],0],[null,"ok","bool",[3],["axis"],8]]'
    )
    index += b" " * (-len(index) % 8)
    values = struct.pack("<2f", 1.5, 2.5)
    flags = bytes([1, 0, 1, 0, 0, 0, 0, 0])
    fixed = b"\x93SONDE\r\n" + struct.pack("<IIQQQqI", len(index), 2, 0xABCD, 16, 7, 12, 0)
    rest = index + struct.pack("<II", zlib.crc32(values), zlib.crc32(flags))
    frame = fixed + struct.pack("<I", zlib.crc32(fixed + rest)) + rest + values + flags
    expected = head + struct.pack("<I", zlib.crc32(head)) + frame
    assert (tmp_path / "000000000007.journal").read_bytes() == expected


def test_arrays_start_at_multiples_of_eight_bytes() -> None:
    arrays = [LogArray(str(size), np.zeros(size, np.uint8), ("n",)) for size in (1, 0, 8, 9, 3)]
    layout = lay_out(arrays)
    assert [entry.offset for entry in layout.entries] == [0, 8, 8, 16, 32]
    assert layout.num_bytes == 40


def test_payload_holds_nothing_of_the_buffer_it_reuses() -> None:
    arrays = [LogArray("a", np.ones(3, np.uint8), ("n",)), LogArray("b", np.ones(1), ("n",))]
    layout = lay_out(arrays)
    payload = np.full(layout.num_bytes, 255, np.uint8)
    fill_payload(payload, layout, arrays)
    assert payload.tobytes() == b"\1\1\1" + bytes(5) + struct.pack("<d", 1)


@pytest.mark.parametrize("transform", [lambda a: a, lambda a: a.T, lambda a: a.astype(">f8")])
def test_payload_is_the_same_however_the_arrays_lie_in_memory(
    transform: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
) -> None:
    values = np.arange(12.0).reshape(3, 4)
    given = transform(values)
    arrays = [LogArray("a", given, ("n", "m")), LogArray("b", given, ("n", "m"))]
    layout = lay_out(arrays)
    payload = np.full(layout.num_bytes, 255, np.uint8)
    fill_payload(payload, layout, arrays)
    expected = np.ascontiguousarray(given).astype("<f8").tobytes()
    assert payload.tobytes() == 2 * expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layer1.0.conv", "layer1.0.conv"),
        ("", "%"),
        (".", "%2E"),
        ("..", "%2E%2E"),
        ("a/b:c%d", "a%2Fb%3Ac%25d"),
        ("\0\n", "%00%0A"),
        ("größe", "größe"),
    ],
)
def test_link_name_escapes_what_hdf5_cannot_hold(name: str, expected: str) -> None:
    assert link_name(name) == expected


def test_stream_names_of_different_streams_differ() -> None:
    parts = ["", ".", "a", "a:b", "b", ":", "%", "%3A", "a/b"]
    keys = [(layer, field) for layer in (None, *parts) for field in parts]
    assert len({stream_name(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            [LogArray("z", np.zeros(1, complex), ("n",), "fc")],
            r"array 'fc:z' has dtype complex128, which the log cannot store; convert it to one of: "
            r"bfloat16, bool, float16,",
        ),
        (
            [LogArray("z", np.zeros((2, 3)), ("n",))],
            r"array 'z' has shape \(2, 3\) but dims \('n',\); expected one name per axis",
        ),
        (
            [LogArray("z", np.zeros(1), ("n",), "fc")] * 2,
            r"array 'fc:z' is given twice in one record",
        ),
        (
            [LogArray("z", np.zeros(1), ("n",), dtype="bfloat16")],
            r"array 'z' is to be stored as bfloat16 but has dtype float64; expected uint16",
        ),
        (
            [LogArray("z", np.zeros(1), ("n",), dtype="float32")],
            r"array 'z' is to be stored as float32 but has dtype float64; expected float32",
        ),
    ],
)
def test_array_the_log_cannot_hold_is_refused(arrays: list[LogArray], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_arrays(arrays)


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
    assert [damage.is_tail for damage in run.damage] == [True]


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


def test_journal_of_a_newer_format_is_refused(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as newer:
        newer.setattr("sonde.log.frames.FORMAT_VERSION", 2)
        write_records(run_path, [0])
    with pytest.raises(
        FormatError, match=r"journal has log format 2; this sonde reads up to 1\. Install a newer"
    ):
        open_run(run_path)


def test_a_frame_that_was_cut_out_whole_is_reported(journal: Path) -> None:
    content = journal.read_bytes()
    start, end = frame_bounds(journal)[3]
    journal.write_bytes(content[:start] + content[end:])
    (missing,) = assert_intact(journal.parent.parent, [0, *range(2, NUM_RECORDS)]).damage
    assert missing.reason.startswith("frames 3 to 3 are missing before record 4")
