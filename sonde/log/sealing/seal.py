"""Sealing: turning closed journals into segments, in a process of its own.

`python -m sonde.log.sealing.seal RUN` seals every journal of a run that nobody writes any more. A
segment is written under a temporary name, forced to the disk, read back, compared with its journal,
and renamed; only then is the journal deleted. If anything fails on the way, the journal stays and
reads the same.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sonde.exceptions import DamageError, FormatError, SondeError
from sonde.log.format.damage import Damage
from sonde.log.format.files import (
    is_being_written,
    journals,
    lock_path,
    read_run_file,
    segment_path,
    segments,
    sync_folder,
    unlock,
    writer_folders,
)
from sonde.log.format.frames import Frame
from sonde.log.format.positioned import open_regular
from sonde.log.reading.scan import scan_journal
from sonde.log.reading.segment import Segment
from sonde.log.reading.segment_file import identify
from sonde.log.writing.sealer_process import END
from sonde.visible import visible

from .read_back import differing_frame
from .segment_writer import write_segment


def seal_run(run: Path, folder: str | None = None, before: int | None = None) -> list[Path]:
    """Seal the closed journals of a run.

    Args:
        run: The run directory.
        folder: Seal only this writer's journals.
        before: Seal only journals whose frames are numbered below this; without it, every journal
            of a writer that no longer lives.

    Returns:
        The segments that took the place of journals.

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
                    segment = seal_journal(path, verify=before is None)
                except FormatError as error:
                    refused.append(error)
                    continue
                if segment is not None:
                    written.append(segment)
    if refused:
        raise refused[0]
    return written


def seal_journal(journal: Path, *, verify: bool = True) -> Path | None:
    """Seal one journal and delete it.

    Args:
        journal: A journal that nobody appends to.
        verify: Check its arrays first, and leave out the damaged ones. A writer that lives knows
            that they were written; then their checksums go with them, to be checked when read.

    Returns:
        The segment, which may have been there before, or None if the journal holds no frame or is
        gone.

    Raises:
        FormatError: If it cannot be represented in a segment.
        OSError: If the segment cannot be written; the journal stays.
    """
    lock = lock_path(journal)  # Another sealer may be at it.
    try:
        with os.fdopen(open_regular(journal), "rb") as file, _refusing(journal):
            segment = _seal_file(journal, file, verify=verify)
        if segment is not None:
            sync_folder(journal.parent.parent)  # Where the writer never forced its folder's name.
            sync_folder(journal.parent)
            journal.unlink(missing_ok=True)
        return segment
    except FileNotFoundError:
        return None
    except DamageError as error:
        raise FormatError(f"{journal} cannot be sealed: {error}") from error
    finally:
        if lock is not None:
            unlock(lock)


@contextmanager
def _refusing(journal: Path) -> Iterator[None]:
    """Refuse a journal with what libhdf5 has no room for, such as a name of a million letters.

    Raises:
        FormatError: In place of what libhdf5 raises.
        SondeError: If it was one already.
    """
    try:
        yield
    except SondeError:
        raise
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise FormatError(
            f"{journal} cannot be sealed, and stays as it is: {visible(error)}"
        ) from error


def _seal_file(journal: Path, file: BinaryIO, *, verify: bool) -> Path | None:
    name = f"{journal.parent.name}/{journal.name}"
    scanned = list(scan_journal(file.fileno(), name, verify=verify))
    frames = [item for item in scanned if isinstance(item, Frame)]
    first = int(journal.stem)
    for left in journal.parent.glob(f"{first:012d}-*.tmp"):
        left.unlink(missing_ok=True)  # Of a sealer that was killed, perhaps of the same number.
    end = frames[-1].sequence + 1 if frames else first
    sealed = _sealed_before(journal.parent, first, end, frames)
    if sealed is not None:
        return sealed
    is_last = journals(journal.parent)[-1][1] == journal
    damage = [
        item.describe()
        for item in scanned
        if isinstance(item, Damage) and not (item.is_cut_off and is_last)
    ]
    if not frames:
        if not damage:
            journal.unlink(missing_ok=True)  # Its process was killed before it had written a frame.
        return None
    segment = segment_path(journal.parent, first, end)
    temporary = segment.with_suffix(f".{os.getpid()}.tmp")
    if shutil.disk_usage(journal.parent).free < os.fstat(file.fileno()).st_size:
        # Where the disk fills up under it, libhdf5 may take the process along.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(segment))
    try:
        write_segment(temporary, file, frames, first, damage)
        difference = differing_frame(temporary, frames)
        if difference is not None and not verify:
            # Or it is the journal that is damaged, which nobody has looked at.
            temporary.unlink()
            return _seal_file(journal, file, verify=True)
        if difference is not None:
            reason = f"the segment was not written as it should be: {difference}"
            raise OSError(errno.EIO, reason, str(journal))
        temporary.replace(segment)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return segment


def _sealed_before(folder: Path, first: int, end: int, frames: Sequence[Frame]) -> Path | None:
    """Return the whole segment of a journal whose sealer did not come to delete it, if any.

    After a power loss it may hold more than the journal, which nobody had to force to the disk.
    """
    for start, stop, path in segments(folder):
        if start == first and stop >= end:
            try:
                is_intact = next(Segment(identify(path)).verify(), None) is None
            except DamageError:
                continue
            if is_intact and differing_frame(path, frames) is None:
                return path
    return None


def main() -> None:
    """Seal the run named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m sonde.log.sealing.seal", description=__doc__)
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument(
        "--follow",
        metavar="FOLDER",
        help="seal this writer's journals whose frames are numbered below each number read from "
        "the standard input",
    )
    arguments = parser.parse_args()
    _leave_no_core()
    try:
        if arguments.follow is None:
            for segment in seal_run(arguments.run):
                print(segment)
        for line in sys.stdin if arguments.follow is not None else ():
            before = int(line)
            if before == END:
                break
            seal_run(arguments.run, arguments.follow, before)
    except (SondeError, OSError, RuntimeError) as error:  # libhdf5 raises the last one.
        sys.exit(f"sonde: {error}")


def _leave_no_core() -> None:
    """Let a sealer that a library ends leave no file in the run; its journal is still there."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit.
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
