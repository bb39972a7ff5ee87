"""Reading a segment back before its journal, the only other copy, is deleted.

A write that failed may have gone unnoticed, and a checksum that was taken of the file afterwards
fits whatever is in it. So what counts is what stands in the journal: every frame has to be found in
the segment, and every array to have the checksum that it had when it was recorded.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sonde.exceptions import DamageError
from sonde.log.format.frames import Frame, describe
from sonde.log.reading.segment import Segment
from sonde.log.reading.segment_file import identify
from sonde.log.reading.segment_records import SegmentRecords


def differing_frame(path: Path, frames: Sequence[Frame]) -> str | None:
    """Return what a segment does not hold as a journal does; None if it holds all of it.

    Args:
        path: The segment.
        frames: The frames of the journal.

    Raises:
        OSError: If it cannot be read.
    """
    try:
        segment = Segment(identify(path))
        return next(_differences(segment, frames), None)
    except DamageError as error:
        return str(error)


def _differences(segment: Segment, frames: Sequence[Frame]) -> Iterator[str]:
    # The metadata has a checksum of its own, which was made before it was written.
    found = {item["sequence"]: item["step"] for item in segment.frames}
    records = {frame.sequence: frame for frame in frames if frame.kind == "record"}
    tables = {frame.body["name"]: frame for frame in frames if frame.kind == "table"}
    for frame in frames:
        if frame.kind not in ("record", "table") and found.get(frame.sequence) != frame.step:
            yield f"{describe(frame)} is missing"
    tabled: dict[str, dict[str, Any]] = {table["name"]: table for table in segment.tables}
    for name, frame in tables.items():
        for entry in tabled.get(name, {"arrays": []})["arrays"]:
            segment.table(entry)  # It raises what is wrong with it.
        if len(tabled.get(name, {"arrays": []})["arrays"]) != len(frame.arrays):
            yield f"{describe(frame)} is missing"
    with segment.file.path.open("rb") as file:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    for group in segment.groups:
        yield from _differing_records(group, records, whole)
    yield from (f"{describe(frame)} is missing" for frame in records.values())


def _differing_records(
    group: SegmentRecords, records: dict[int, Frame], whole: memoryview
) -> Iterator[str]:
    """Yield the records of a group that differ; take those that are there out of `records`."""
    of_group = [records.pop(sequence, None) for sequence in group.sequences]
    for frame, step in zip(of_group, group.steps, strict=True):
        if frame is not None and frame.step != step:
            yield f"{describe(frame)} has step {step}"
    present = [(row, frame) for row, frame in enumerate(of_group) if frame is not None]
    expected = {row: frame.checksums.tolist() for row, frame in present}
    num_found = dict.fromkeys(expected, 0)
    for key, stream in group.streams.items():
        actual = group.checksums(stream, whole)
        for row, frame in present:
            column = frame.layout.columns.get(key)
            if column is None:
                continue
            num_found[row] += 1
            if actual[row] != expected[row][column]:
                yield f"{stream.label} of {describe(frame)} does not match its checksum"
    for row, frame in present:
        if num_found[row] != len(expected[row]):
            yield f"{describe(frame)} lacks arrays"
