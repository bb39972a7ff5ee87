"""The run directory that a recorder writes into: created, resumed or overwritten."""

from __future__ import annotations

import itertools
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sonde.exceptions import (
    MismatchError,
    RunExistsError,
    RunNotFoundError,
    SondeError,
    SondeWarning,
)
from sonde.log.format.files import (
    RUN_FILE,
    is_being_written,
    read_run_file,
    sync_folder,
    write_run_file,
    writer_folder,
    writer_folders,
)
from sonde.log.format.inputs import same_inputs

from . import closing

# As long as torch.distributed waits for a peer.
_WAIT_SECONDS = 600.0
_PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.05


@contextmanager
def created_run(
    path: Path, description: Mapping[str, Any], rank: int, *, resume: bool, overwrite: bool
) -> Iterator[int]:
    """Prepare a run directory as `create_run` does; an error within leaves nothing of it behind.

    Args:
        path: The run directory.
        description: What `run.json` will hold.
        rank: The rank of this process.
        resume: Resume a run that is already there.
        overwrite: Delete a run that is already there.

    Yields:
        The number of this attempt.

    Raises:
        SondeError: As `create_run` does.
        OSError: If the directory cannot be written.
    """
    was_there, had_run = path.exists(), (path / RUN_FILE).exists()
    attempt = None
    try:
        attempt = create_run(path, description, rank, resume=resume, overwrite=overwrite)
        yield attempt
    except BaseException:
        with suppress(OSError):
            if attempt is not None:
                shutil.rmtree(writer_folder(path, attempt, rank), ignore_errors=True)
                if rank == 0 and not (had_run and resume):
                    (path / RUN_FILE).unlink(missing_ok=True)
            if not was_there:
                path.rmdir()  # Unless another rank has written into it.
        raise


def free_path(path: Path, *, is_alone: bool, resume: bool, overwrite: bool) -> Path:
    """Return where to record: another directory where a recorder of this process uses this one.

    In a notebook the recorder of an earlier try is still there when its cell is run again.

    Args:
        path: The run directory that is asked for.
        is_alone: There is one rank only; several would have to agree.
        resume: Resume a run that is already there.
        overwrite: Delete a run that is already there.
    """
    is_used = any(other.path.resolve() == path.resolve() for other in closing.still_open())
    if resume or overwrite or not is_alone or not is_used:
        return path
    free = next(
        other
        for number in itertools.count(2)
        if not (other := path.with_name(f"{path.name}-{number}")).exists()
    )
    warnings.warn(
        f"sonde: another recorder of this process records into {path}; this one records into "
        f"{free}. To record in place of the other, give overwrite=True",
        SondeWarning,
        stacklevel=3,
    )
    return free


def create_run(
    path: Path, description: Mapping[str, Any], rank: int, *, resume: bool, overwrite: bool
) -> int:
    """Prepare a run directory for a recorder; rank 0 does it for all, and the others wait for it.

    Args:
        path: The run directory.
        description: What `run.json` will hold.
        rank: The rank of this process.
        resume: Resume a run that is already there.
        overwrite: Delete a run that is already there.

    Returns:
        The number of this attempt, counted from 0; the same on all ranks.

    Raises:
        RunExistsError: If there is a run and nothing says what to do with it, or another process
            writes it.
        RunNotFoundError: If this is another rank, and rank 0 does not start to record.
        MismatchError: If the run to resume was recorded with other examples or measures.
        OSError: If the directory cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    if rank:
        return _join_attempt(path, rank)
    exists = (path / RUN_FILE).exists()
    if exists:
        if not resume and not overwrite and not _holds_nothing(path):
            raise RunExistsError(
                f"{path} already holds a run; record into another directory, go on with it by "
                "resume=True, or delete it by overwrite=True"
            )
        _check_nobody_writes(path)
        if resume:
            _check_same(path, read_run_file(path), description)
        else:
            _delete_run(path)
    if not (exists and resume):
        write_run_file(path, dict(description))
    return max((attempt for attempt, _, _ in writer_folders(path)), default=-1) + 1


def _join_attempt(path: Path, rank: int) -> int:
    """Wait for the attempt that rank 0 records, and return its number.

    Raises:
        RunNotFoundError: If rank 0 does not start to record.
    """
    start = time.monotonic()
    has_warned = False
    while (waited := time.monotonic() - start) < _WAIT_SECONDS:
        folders = writer_folders(path)
        taken = {attempt for attempt, of_rank, _ in folders if of_rank == rank}
        for attempt, of_rank, folder in reversed(folders):
            if of_rank == 0 and attempt not in taken and is_being_written(folder):
                return attempt
        if waited > _PATIENCE_SECONDS and not has_warned:
            has_warned = True
            warnings.warn(
                f"sonde: rank {rank} waits for rank 0 to record into {path}",
                SondeWarning,
                stacklevel=4,
            )
        time.sleep(_POLL_SECONDS)
    raise RunNotFoundError(
        f"rank {rank} waited {_WAIT_SECONDS:.0f} seconds for rank 0 to record into {path}; make a "
        "recorder on rank 0 too, before anything that waits for the other ranks"
    )


def _check_nobody_writes(path: Path) -> None:
    """Close recorders of this process that write a run.

    Raises:
        RunExistsError: If another process writes it.
    """
    for other in closing.still_open():
        # In a notebook the recorder of an earlier try may still be there.
        if other.path.resolve() == path.resolve():
            other.close("superseded")
    if any(is_being_written(folder) for _, _, folder in writer_folders(path)):
        raise RunExistsError(
            f"{path} is being written by another process; stop that training, or record into "
            "another directory"
        )


def _holds_nothing(path: Path) -> bool:
    """Tell whether a run ended before anything was recorded, so that nothing is lost with it."""
    from sonde.log import open_run  # It takes h5py, which a recorder does without.

    try:
        run = open_run(path)
        is_live = any(is_being_written(folder) for _, _, folder in writer_folders(path))
        return not (is_live or run.steps() or run.damage or run.unfinished)
    except (SondeError, OSError):
        return False


def _delete_run(path: Path) -> None:
    (path / RUN_FILE).unlink()
    for _, _, folder in writer_folders(path):
        shutil.rmtree(folder)
    # Or a power loss might leave old records under the new description.
    sync_folder(path)


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what a run measures with what is to be measured now.

    Raises:
        MismatchError: If probes or measures differ.
    """
    for source, probe in now["probes"].items():
        known = before.get("probes", {}).get(source, {})
        for key in ("id_digest", "input_digest"):
            # Digests of batches of another size say nothing of the inputs.
            is_other = known.get(key) != probe[key]
            if is_other and (key == "id_digest" or same_inputs(known, probe) is False):
                raise MismatchError(
                    f"{path} was recorded with other examples as '{source}' ({key} "
                    f"{known.get(key)}, now {probe[key]}); give the same probe, or record into "
                    "another directory"
                )
    kinds = [
        [(m["measure"], m["source"], m.get("store"), m.get("digest")) for m in d["measures"]]
        for d in (before, now)
    ]
    if kinds[0] != kinds[1]:
        raise MismatchError(
            f"{path} was recorded with other measures ({kinds[0]}, now {kinds[1]}); give the same "
            "ones, or record into another directory"
        )
