"""The arguments and options that several commands share, and what they open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import working

if TYPE_CHECKING:
    from sonde.log import Family, Run

RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run directory, or exported file.", show_default=False)
]
RunPaths = Annotated[
    list[Path],
    typer.Argument(metavar="RUN", help="Run directories, or exported files.", show_default=False),
]
Source = Annotated[
    str | None,
    typer.Option(help="Source of the examples, where a measure has several.", show_default=False),
]
Rank = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Only what this rank recorded; default: all ranks.", show_default=False
    ),
]
FigurePath = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw it: .png, .pdf, .svg.", show_default=False)
]
CsvPath = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write it as CSV.", show_default=False)
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Only runs whose configuration has this value, or one of several: width=32,64.",
        show_default=False,
    ),
]
By = Annotated[
    str | None,
    typer.Option(
        metavar="KEY,KEY",
        help="Group runs by these configuration keys.",
        show_default=False,
    ),
]
Null = Annotated[
    int, typer.Option(metavar="N", help="Permute the examples N times, and judge by that.")
]
Intervals = Annotated[
    int, typer.Option(metavar="N", help="Make intervals from N halves of the examples.")
]
NcPath = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write all of it as netCDF, for xarray.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def split(texts: Sequence[str] | None) -> list[str] | None:
    """Split options that may hold several values at commas; None stays."""
    if texts is None:
        return None
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def numbers(option: str, text: str) -> list[int]:
    """Read whole numbers separated by commas.

    Raises:
        InvalidInputError: If they are none.
    """
    from sonde.exceptions import InvalidInputError

    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidInputError(
            f"`--{option}` (={text}) must be whole numbers separated by commas, such as 0,100,-1"
        ) from None


def open_one(path: Path, rank: int | None) -> Run:
    """Open a run, or what one of its ranks recorded."""
    from sonde.log import open_run

    run = open_run(path)
    return run if rank is None else run.rank(rank)


def open_all(paths: Sequence[Path], rank: int | None = None) -> dict[str, Run]:
    """Open runs, each once, by their name, or by their path where names repeat."""
    with working("opening", total=len(paths)) as start:
        opened = {}
        for path in dict.fromkeys(paths):
            start(str(path))
            opened[path] = open_one(path, rank)
    names = [run.name for run in opened.values()]
    is_unique = len(set(names)) == len(names)
    return {run.name if is_unique else str(path): run for path, run in opened.items()}


def open_family(paths: Sequence[Path], where: Sequence[str] | None = None) -> Family:
    """Open runs, folders of runs and globs as a family, and choose among them.

    Raises:
        InvalidInputError: If no run has a key of `where`, or none fits.
    """
    from sonde.exceptions import InvalidInputError
    from sonde.log import open_runs

    from .families import conditions

    with working("opening"):
        family = open_runs(paths)
    chosen = family.where(conditions(where)) if where else family
    if not len(chosen):
        raise InvalidInputError(
            f"`--where` (={', '.join(where or ())}) fits none of {len(family)} runs"
        )
    return chosen


def use_no_window() -> None:
    """Make matplotlib draw into files only, so that no display is needed."""
    import matplotlib

    matplotlib.use("Agg")
