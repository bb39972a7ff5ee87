"""Verification: every byte of a run against its checksum."""

from __future__ import annotations

from pathlib import Path

from sonde.exceptions import DamageError

from .frames import Damage
from .layout import read_run_file, segments, writer_folders
from .reader import read_index
from .segment import Segment, check_segment, identify


def verify_run(run: Path) -> list[Damage]:
    """Check every checksum of a run.

    Args:
        run: The run directory.

    Returns:
        What is damaged: bytes of journals; and each damaged segment, with the records in it that
        cannot be read. Empty if all is intact.

    Raises:
        RunNotFoundError: If the path is no run directory.
        FormatError: If a file is of a newer format.
        OSError: If a file cannot be read.
    """
    read_run_file(run)
    found = [damage for writer in read_index(run) for damage in writer.damage]
    known = {damage.path for damage in found}
    for _, _, folder in writer_folders(run):
        for _, _, path in segments(folder):
            problem = check_segment(path)
            if problem is not None and identify(path).name not in known:
                found += _damaged_records(path, problem)
    return found


def _damaged_records(path: Path, problem: str) -> list[Damage]:
    """Name the records of a damaged segment that cannot be read."""
    file = identify(path)
    segment = Segment(file)
    reasons = []
    for records in segment.groups:
        for stream in records.group.streams:
            for row in range(len(records.group.records)):
                try:
                    if records.presence[row, stream.column]:
                        records.read(stream, [row])
                except DamageError as error:
                    reasons.append(str(error))
    for table in segment.tables:
        for entry in table["arrays"]:
            try:
                segment.table(entry)
            except DamageError as error:
                reasons.append(str(error))
    if not reasons:
        reasons = [f"{problem}, but every record in it does"]
    return [
        Damage(file.name, 0, file.num_bytes, reason.removeprefix(f"{file.name}: "))
        for reason in dict.fromkeys(reasons)
    ]
