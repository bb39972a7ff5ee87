"""The files of a run directory: names, the lock of a writer, the run's own description."""

from __future__ import annotations

import json
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from zlib_ng.zlib_ng import crc32

from sonde.exceptions import DamageError, FormatError, RunNotFoundError
from sonde.sizes import size_text

from .checked import check_info, get, is_shallow, parse, whole
from .frames import FORMAT_VERSION
from .positioned import NO_WAITING, open_regular, read_at

RUN_FILE = "run.json"
_CHECKSUM = "crc32"

_NUMBER = r"(0|[1-9][0-9]{0,8})"  # One way to write each, or two folders would be one writer's.
_WRITER = re.compile(f"attempt{_NUMBER}-rank{_NUMBER}")
_JOURNAL = re.compile(r"([0-9]{12})\.journal")
_SEGMENT = re.compile(r"([0-9]{12})-([0-9]{12})\.h5")

_MAX_RUN_FILE_BYTES = 64 << 20


def writer_folder(run: Path, attempt: int, rank: int) -> Path:
    """Return the folder that one rank writes in one attempt."""
    return run / f"attempt{attempt}-rank{rank}"


def writer_folders(run: Path) -> list[tuple[int, int, Path]]:
    """Return (attempt, rank, folder) of every writer, in order."""
    found = []
    for path in run.iterdir():
        match = _WRITER.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found)


def journals(folder: Path) -> list[tuple[int, Path]]:
    """Return (first sequence, path) of every journal in a writer's folder, in order."""
    matches = ((_JOURNAL.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def segments(folder: Path) -> list[tuple[int, int, Path]]:
    """Return (first sequence, end, path) of every segment in a writer's folder, in order."""
    matches = ((_SEGMENT.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), int(match[2]), path) for match, path in matches if match)


def segment_path(folder: Path, first_sequence: int, end: int) -> Path:
    """Return the name of the segment with the frames from `first_sequence` to before `end`."""
    return folder / f"{first_sequence:012d}-{end:012d}.h5"


def lock_path(path: Path) -> int | None:
    """Wait for the lock of a file or folder, and hold it for as long as this process lives.

    A writer locks its folder, so that others see that it lives; a sealer locks the journal it
    seals.

    Returns:
        The file descriptor that holds the lock, or None where it is gone or cannot be locked.
    """
    try:
        import fcntl

        fd = os.open(path, os.O_RDONLY | NO_WAITING)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError:
        os.close(fd)
        return None
    return fd


def unlock(fd: int) -> None:
    """Release a lock, also where a forked child still holds a copy of its file descriptor."""
    import fcntl

    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def is_being_written(folder: Path) -> bool:
    """Tell whether the writer of a folder still lives."""
    try:
        import fcntl

        fd = os.open(folder, os.O_RDONLY | NO_WAITING)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Force a file to the disk, unless it is gone."""
    try:
        fd = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, where the system can."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders.
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folders_above(folder: Path) -> None:
    """Force the name of a folder to the disk, and those of the folders it is in, as far as one can.

    A new folder is lost with any folder above it that was made just before. What lies above the
    root of its file system is older than it, and not looked at.
    """
    folder = folder.resolve()
    device = folder.stat().st_dev
    for above in folder.parents:
        if above.stat().st_dev != device:
            return
        with suppress(OSError):  # Not every file system can; what belongs to others is older.
            sync_folder(above)


def write_run_file(run: Path, description: dict[str, Any]) -> None:
    """Write the description of a run, whole or not at all; the format version comes first.

    Once it is there, so is the run directory, also after a power loss.

    Raises:
        OSError: If it cannot be written.
    """
    described = {"format": FORMAT_VERSION, **description}
    text = json.dumps({**described, _CHECKSUM: _checksum(described)}, indent=1)
    # A name that nobody can guess, and never a link that somebody has planted there.
    temporary = run / f".{RUN_FILE}.{secrets.token_hex(8)}"
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    fd = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(run / RUN_FILE)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(run)
    sync_folders_above(run)


def read_run_file(run: Path) -> dict[str, Any]:
    """Read the description of a run.

    Raises:
        RunNotFoundError: If the path is no run directory.
        FormatError: If the description cannot be read or is of a newer format.
    """
    try:
        description = parse(_read_whole(run / RUN_FILE))
        version = get(description, "format", whole())
    except (FileNotFoundError, NotADirectoryError):
        raise RunNotFoundError(_explain_no_run(run)) from None
    except DamageError as error:
        raise FormatError(f"{run / RUN_FILE} is damaged: {error}") from error
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{run} has log format {version}; this sonde reads up to {FORMAT_VERSION}. "
            "Install a newer sonde."
        )
    try:
        _check_description(description)
    except DamageError as error:
        raise FormatError(f"{run / RUN_FILE} is damaged: {error}") from error
    return dict(description)


def _check_description(description: dict[str, Any]) -> None:
    """Check the description of a run, and take out its checksum.

    Raises:
        DamageError: If it does not match its checksum, or says what readers cannot use.
    """
    checksum = description.pop(_CHECKSUM, None)
    if not is_shallow(description):
        raise DamageError("its JSON is nested too deeply")
    if checksum != _checksum(description):
        raise DamageError("it does not match its checksum")
    check_info(description)


def _read_whole(path: Path) -> bytes:
    """Read a small file.

    Raises:
        DamageError: If it is no ordinary file, or far too large.
        OSError: If it cannot be read.
    """
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > _MAX_RUN_FILE_BYTES:
            raise DamageError(f"it has {size_text(size)}, far more than any description of a run")
        return read_at(fd, size, 0)
    finally:
        os.close(fd)


def _checksum(description: dict[str, Any]) -> int:
    """Return the checksum of a description, however it is laid out."""
    return crc32(json.dumps(description, sort_keys=True).encode())


def find_runs(root: Path) -> list[Path]:
    """Return every run directory at or below a folder, sorted by name.

    A folder that cannot be listed may be one, too: opening it says why it cannot be read.
    """
    if os.path.lexists(root / RUN_FILE):
        return [root]
    found: list[Path] = []

    def keep_unreadable(error: OSError) -> None:
        if error.filename != str(root):
            found.append(Path(error.filename))

    for folder, folders, files in os.walk(root, onerror=keep_unreadable):
        if RUN_FILE in files or RUN_FILE in folders:
            found.append(Path(folder))
            folders[:] = [name for name in folders if not _WRITER.fullmatch(name)]
    return sorted(found)


def _explain_no_run(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist; expected a run directory (a folder with {RUN_FILE})"
    if not path.is_dir():
        return f"{path} is a file; expected a run directory (a folder with {RUN_FILE})"
    below = [str(run) for run in find_runs(path)][:10]
    if below:
        return f"{path} is no run directory, but holds some: {', '.join(below)}"
    return f"{path} is no run directory: it has no {RUN_FILE}"
