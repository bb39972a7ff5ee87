"""Export: a run as one compact HDF5 file, which is read like the run itself.

The file holds what a reader of the run sees: no superseded record, every rank as it recorded. It is
written under another name, forced to the disk and renamed, so that it is there whole or not at all.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import h5py

from sonde.exceptions import FormatError, InvalidInputError, RunExistsError, SondeWarning
from sonde.log.format.damage import Damage
from sonde.log.format.files import sync_folder
from sonde.log.reading.compression import Compression, choose_compression
from sonde.log.reading.export_file import EXPORT_VERSION, MARK, encode_trailer
from sonde.log.reading.segment_file import checksum_between
from sonde.log.sealing.output import Output

from .origin import Origin, Writer
from .plan import Places, Plan, plan_export
from .writer import ExportWriter, Facts

if TYPE_CHECKING:
    from sonde.log.run import Run


def export_run(
    run: Run,
    path: str | os.PathLike[str],
    *,
    compression: Compression | None = None,
    layers: str | Sequence[str] | None = None,
    steps: Sequence[int] | slice | None = None,
    measures: Sequence[str] | None = None,
    overwrite: bool = False,
    on_part: Callable[[str], object] | None = None,
) -> Path:
    """Write a run, or a part of it, as one HDF5 file that `open_run` reads like the run.

    An array that is damaged in the run is damaged in the file, too: a warning says how many there
    are, and reading one raises what the run says of it. Beside one array some tens of MiB are held
    in memory. A run that is still being recorded is exported as it is now.

    Args:
        run: The run.
        path: The file to write.
        compression: `zstd` takes the package hdf5plugin, here and where the file is read; `gzip`
            and `none` take nothing. None takes zstd where hdf5plugin is installed, else gzip.
        layers: Names or globs of layers; None takes all. Arrays of no layer are taken in any case.
        steps: Steps, negative ones counted from the end of each measure's; or a slice of steps by
            their number, as `slice(0, 1000, 100)`. None takes all.
        measures: Only these measures; None takes all.
        overwrite: Replace a file that is there.
        on_part: Called with the name of each part before it is written.

    Returns:
        The file.

    Raises:
        RunExistsError: If the file is there, unless `overwrite`.
        InvalidInputError: If the compression is not available, or the path is a folder.
        MeasureNotFoundError: If the run has no such measure.
        LayerNotFoundError: If a layer is none of the run's.
        StepNotFoundError: If no measure has a step.
        FormatError: If an array is larger than the memory.
        OSError: If the run cannot be read or the file not be written; nothing is left behind.
    """
    target = Path(path)
    if target.is_dir():
        raise InvalidInputError(f"{target} is a folder; expected the name of a file, as run.h5")
    if target.exists() and not overwrite:
        raise RunExistsError(f"{target} exists; replace it by --overwrite (overwrite=True)")
    chosen = choose_compression(compression)
    origin = Origin(run)
    plan = plan_export(run, origin, layers, steps, measures)
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        unread = _write(run, origin, plan, temporary, chosen, on_part or (lambda _: None))
        temporary.replace(target)
    except MemoryError:
        temporary.unlink(missing_ok=True)
        raise FormatError(f"{run.path} has an array that is larger than the memory") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)
    if unread:
        warnings.warn(
            f"{len(unread)} arrays of {run.path} are damaged, and so they are in {target}: "
            f"{unread[0][1]}",
            SondeWarning,
            stacklevel=2,
        )
    return target


def _write(
    run: Run,
    origin: Origin,
    plan: Plan,
    path: Path,
    compression: Compression,
    on_part: Callable[[str], object],
) -> list[tuple[Writer | None, str]]:
    """Write the file and force it to the disk; return what could not be read of the run."""
    with closing(Output(path)) as output:
        with h5py.File(output, "w", libver=("v108", "v108")) as file:
            # Small, and first in the file: what it is can be told even where its end is missing.
            file.attrs[MARK] = EXPORT_VERSION
            writer = ExportWriter(output, file, origin, compression, on_part)
            places = Places(origin, plan.groups)
            written = [writer.write_group(places.path_of(g), g) for g in plan.groups]
            tables, table_of = places.tables()
            metadata = {
                "format": EXPORT_VERSION,
                "compression": compression,
                "info": run.info,
                "groups": written,
                "tables": [writer.write_table(*table) for table in tables],
                "writers": [
                    {
                        **_describe_writer(origin, name, table_of, writer.unread),
                        "superseded": plan.superseded.get(name, []),
                    }
                    for name in origin.writers
                ],
            }
            offset, encoded = writer.finish(metadata)
        output.check()
        num_bytes = os.fstat(output.fd).st_size
        checksum = checksum_between(output.fd, num_bytes, writer.stretches())
        output.seek(num_bytes)
        output.write(memoryview(encode_trailer(offset, encoded, num_bytes, checksum)))
        output.check()
        os.fsync(output.fd)
    return writer.unread


def _describe_writer(
    origin: Origin,
    name: Writer,
    table_of: dict[tuple[Writer, str], int],
    unread: Sequence[tuple[Writer | None, str]],
) -> Facts:
    log = origin.writers[name]
    damage = [item.describe() for item in log.damage]
    for writer, reason in unread:
        if writer == name:
            path, _, what = reason.partition(": ")
            damage.append(Damage(path, 0, 0, what).describe())
    return {
        "attempt": log.attempt,
        "rank": log.rank,
        "about": log.about,
        "resume_step": log.resume_step,
        "has_recorded": bool(log.parts),
        "events": log.events,
        "damage": damage,
        "tables": {
            source: number for (writer, source), number in table_of.items() if writer == name
        },
    }
