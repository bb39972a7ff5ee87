"""The command `sonde export`: a run as one compact file."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sonde.exceptions import InvalidInputError
from sonde.sizes import size_text

from .console import plural, say, working
from .options import RunPath

if TYPE_CHECKING:
    from sonde.log import Run


class Compressor(str, Enum):
    """How an exported run is compressed."""

    ZSTD = "zstd"
    GZIP = "gzip"
    NONE = "none"


def export(
    run: RunPath,
    out: Annotated[
        Path, typer.Argument(metavar="OUT.h5", help="File to write.", show_default=False)
    ],
    compression: Annotated[
        Compressor | None,
        typer.Option(
            help="zstd takes hdf5plugin; default: zstd where that is installed, else gzip.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only these layers; repeat it, or separate by commas."),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Only these steps, -1 is a measure's last; or a slice of steps by their number, "
            "start:stop:stride, without stop itself.",
        ),
    ] = None,
    measures: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only these measures; repeat it, or separate by commas."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.h5.")] = False,
) -> None:
    """Export a run as one compact HDF5 file, which is read like the run itself.

    Every command takes the file in place of a run directory, and any HDF5 tool opens it. It holds
    what a reader of the run sees: superseded records are left out, and so is what --layers, --steps
    and --measures do not name; arrays of no layer are kept.

    Examples:
        sonde export runs/seed0 seed0.h5
        sonde export runs/seed0 gzip.h5 --compression gzip
        sonde export runs/seed0 part.h5 --layers "conv*,fc" --steps 0,10,-1
        sonde export runs/seed0 part.h5 --steps 0:1000:20 --overwrite
    """
    from sonde.log import open_run
    from sonde.log.export import export_run
    from sonde.log.reading.compression import choose_compression

    chosen = choose_compression(None if compression is None else compression.value)
    opened = open_run(run)
    with working(f"exporting {run}") as start:
        export_run(
            opened,
            out,
            compression=chosen,
            layers=None if layers is None else _split(layers),
            steps=None if steps is None else _steps(steps),
            measures=None if measures is None else _split(measures),
            overwrite=overwrite,
            on_part=start,
        )
    written = open_run(out)
    num_records, num_bytes = _count(written)
    say(
        f"wrote {out}: {plural(num_records, 'record')}, {plural(len(written.layers), 'layer')}, "
        f"{size_text(out.stat().st_size)} (of {size_text(num_bytes)}, {chosen})"
    )


def _count(run: Run) -> tuple[int, int]:
    """Return the number of records of all ranks, and of the bytes in their arrays."""
    ranks = [run.rank(rank) for rank in run.ranks]
    logs = [
        view[name, source]
        for view in ranks
        for name in view.measures
        for source in view.sources(name)
    ]
    return sum(len(log.steps) for log in logs), sum(log.num_bytes for log in logs)


def _split(texts: list[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def _steps(text: str) -> list[int] | slice:
    try:
        if ":" in text:
            return slice(*(int(part) if part.strip() else None for part in text.split(":")))
        return [int(part) for part in _split([text])]
    except (ValueError, TypeError):
        raise InvalidInputError(
            f"`--steps` (={text}) must be whole numbers separated by commas, such as 0,100,-1, or "
            "a slice, such as 0:1000:100"
        ) from None
