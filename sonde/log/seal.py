"""Sealing: turning closed journals into segments, in a process of its own.

`python -m sonde.log.seal RUN` seals every journal of a run that nobody writes any more. A segment
is written under a temporary name, forced to the disk and renamed; only then is its journal deleted.
If anything fails on the way, the journal stays and reads the same.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import BinaryIO

from sonde.exceptions import FormatError, SondeError

from .frames import Damage, Frame, scan_journal
from .hdf5 import write_segment
from .layout import (
    is_being_written,
    journals,
    read_run_file,
    segment_path,
    sync_folder,
    writer_folders,
)


def seal_run(run: Path, folder: str | None = None, before: int | None = None) -> list[Path]:
    """Seal the closed journals of a run.

    Args:
        run: The run directory.
        folder: Seal only this writer's journals.
        before: Seal only journals whose frames are numbered below this; without it, every journal
            of a writer that no longer lives.

    Returns:
        The segments that were written.

    Raises:
        RunNotFoundError: If the path is no run directory.
        FormatError: If a journal cannot be represented in a segment; the others are sealed.
        OSError: If a segment cannot be written; its journal stays.
    """
    read_run_file(run)
    written = []
    refused = []
    for _, _, writer in writer_folders(run):
        if folder is not None and writer.name != folder:
            continue
        if before is None and is_being_written(writer):
            continue
        for first, path in journals(writer):
            if before is None or first < before:
                try:
                    segment = seal_journal(path)
                except FormatError as error:
                    refused.append(error)
                    continue
                if segment is not None:
                    written.append(segment)
    if refused:
        raise refused[0]
    return written


def seal_journal(journal: Path) -> Path | None:
    """Seal one journal and delete it.

    Args:
        journal: A journal that nobody appends to.

    Returns:
        The segment, or None if the journal holds no frame or is gone.

    Raises:
        FormatError: If it cannot be represented in a segment.
        OSError: If the segment cannot be written; the journal stays.
    """
    try:
        file = journal.open("rb")
    except FileNotFoundError:
        return None
    with file:
        segment = _seal_file(journal, file)
    if segment is not None:
        sync_folder(journal.parent)
        journal.unlink(missing_ok=True)
    return segment


def _seal_file(journal: Path, file: BinaryIO) -> Path | None:
    scanned = list(scan_journal(file.fileno(), f"{journal.parent.name}/{journal.name}"))
    frames = [item for item in scanned if isinstance(item, Frame)]
    if not frames:
        return None
    damage = [vars(item) for item in scanned if isinstance(item, Damage)]
    segment = segment_path(journal.parent, frames[0].sequence, frames[-1].sequence + 1)
    temporary = segment.with_suffix(f".{os.getpid()}.tmp")
    try:
        write_segment(temporary, file, frames, damage)
        temporary.replace(segment)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return segment


def main() -> None:
    """Seal the run named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m sonde.log.seal", description=__doc__)
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--folder", help="seal only this writer's journals")
    parser.add_argument("--before", type=int, help="seal only frames numbered below this")
    arguments = parser.parse_args()
    try:
        for segment in seal_run(arguments.run, arguments.folder, arguments.before):
            print(segment)
    except (SondeError, OSError) as error:
        sys.exit(f"sonde: {error}")


if __name__ == "__main__":
    main()
