"""Where `sonde run` records if nothing says it: a folder of its own, the same for all ranks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from sonde.exceptions import RunNotFoundError
from sonde.log.format.files import RUN_FILE, is_being_written, read_run_file, writer_folder

_WAIT_SECONDS = 600.0
_POLL_SECONDS = 0.05


def reserve(path: Path) -> Path:
    """Make a folder that is not there yet: `path`, `path-2`, `path-3`, …; return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return next(candidate for candidate in _candidates(path) if _is_made(candidate))


def launch_key(environ: Mapping[str, str]) -> str:
    """Return what the ranks of one launch have in common, as far as torchrun says it."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return ":".join(environ.get(name, "") for name in names)


def waited_for(path: Path, key: str) -> Path:
    """Return the folder that rank 0 of this launch records into, once it does.

    Args:
        path: The first of the folders it may be.
        key: The launch, as `launch_key` has it.

    Raises:
        RunNotFoundError: If it does not start to record.
    """
    end = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < end:
        for candidate in itertools.takewhile(Path.exists, _candidates(path)):
            if _is_of(candidate, key):
                return candidate
        time.sleep(_POLL_SECONDS)
    raise RunNotFoundError(
        f"rank 0 did not start to record into {path}; name the run directory by --out"
    )


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def _is_of(path: Path, key: str) -> bool:
    """Tell whether rank 0 of a launch writes a run now, in its first attempt."""
    folder = writer_folder(path, 0, 0)
    if not (path / RUN_FILE).exists() or not folder.exists() or not is_being_written(folder):
        return False
    return bool((read_run_file(path).get("config") or {}).get("launch") == key)


def _is_made(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True
