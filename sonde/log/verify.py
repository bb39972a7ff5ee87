"""Verification: every byte of a run against its checksum."""

from __future__ import annotations

from pathlib import Path

from sonde.exceptions import DamageError
from sonde.log.format.damage import Damage
from sonde.log.format.files import read_run_file, segments, writer_folders
from sonde.log.reading.exported import verify_export
from sonde.log.reading.index import read_index
from sonde.log.reading.segment import Segment
from sonde.log.reading.segment_file import identify


def verify_run(run: Path) -> list[Damage]:
    """Check every checksum of a run.

    Args:
        run: The run directory, or a file that a run was exported to.

    Returns:
        What is damaged: bytes of journals; and each damaged segment, with the records in it that
        cannot be read. Empty if all is intact.

    Raises:
        RunNotFoundError: If the path is no run.
        FormatError: If a file is of a newer format.
        OSError: If a file cannot be read.
    """
    if run.is_file():
        return verify_export(run)
    read_run_file(run)
    found = [damage for writer in read_index(run) for damage in writer.damage]
    for _, _, folder in writer_folders(run):
        for _, _, path in segments(folder):
            try:
                file = identify(path)
                reasons = list(Segment(file).verify())
            except DamageError:
                continue  # The index has said so.
            reasons = [reason.removeprefix(f"{file.name}: ") for reason in dict.fromkeys(reasons)]
            found += [Damage(file.name, 0, file.num_bytes, reason) for reason in reasons]
    return found
