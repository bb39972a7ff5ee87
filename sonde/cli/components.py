"""The command `sonde components`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import results
from .console import console, plural, table, working
from .options import (
    By,
    CsvPath,
    FigurePath,
    Json,
    NcPath,
    RunPaths,
    Source,
    Where,
    open_family,
    split,
)

if TYPE_CHECKING:
    import xarray as xr


def components(
    runs: RunPaths,
    step: Annotated[int, typer.Option(help="Recorded step; -1 is the last.")] = -1,
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only these layers; repeat it, or separate by commas."),
    ] = None,
    source: Source = None,
    number: Annotated[int, typer.Option(metavar="N", help="How many leading components.")] = 5,
    dominant: Annotated[int, typer.Option(metavar="N", help="How many dominant examples.")] = 10,
    between: Annotated[
        bool, typer.Option("--between", help="Compare the pairs of different runs, as of seeds.")
    ] = False,
    by: By = None,
    where: Where = None,
    figure: FigurePath = None,
    csv: CsvPath = None,
    nc: NcPath = None,
    as_json: Json = False,
) -> None:
    """Show the principal components of layers over the examples.

    Per layer: the share of variance of the first component, how many components share the variance
    (participation ratio), how much the first is that of the next layer (alignment, 1: the same),
    and the examples that dominate it. Of several runs means, and the alignment of each layer with
    itself in other runs with --between.

    Examples:
        sonde components runs/seed0
        sonde components runs/seed0 --number 3 --dominant 5 --figure components.png
        sonde components runs --between --csv components.csv
        sonde components runs --by width --nc components.nc
    """
    from sonde import analysis

    results.check_figure(figure)
    is_family = len(runs) > 1 or by is not None or bool(where) or between
    with working("finding components"):
        opened = open_family(runs, where)
        is_family = is_family or len(opened) > 1
        found = analysis.components(
            opened if is_family else opened[0],
            num_components=number,
            num_dominant=dominant,
            by=split([by]) if by is not None else None,
            between=between,
            step=step,
            layers=split(layers),
            source=source,
        )
    name = f"mean of {plural(len(opened), 'run')}" if is_family else str(runs[0])
    if as_json:
        results.print_json(found)
    else:
        _print(found, f"components of {name}, '{found.attrs['source']}'")
    if csv is not None:
        _write(csv, found)
    if nc is not None:
        results.write_nc(nc, found)
    if figure is not None:
        results.write_figure(figure, analysis.plots.components(found))


def _parts(found: xr.Dataset) -> list[tuple[list[str], xr.Dataset]]:
    """Return the groups of runs, or the only one, with the values of their keys."""
    keys = [str(key) for key in found.attrs.get("by", [])]
    if not keys:
        return [([], found)]
    flat = found.stack(row=keys, create_index=False)
    count = "num_pairs" if "num_pairs" in found else "num_runs"
    parts = [flat.isel(row=index) for index in range(flat.sizes["row"])]
    return [([str(at[key].item()) for key in keys], at) for at in parts if int(at[count])]


def _rows(found: xr.Dataset) -> list[list[str]]:
    """Return a row per layer: share, ratio, alignment, and dominant examples where known."""
    names = found["layer"].values.tolist()
    is_between = "num_pairs" in found
    rows = []
    for at, name in enumerate(names):
        beside = at if is_between else at + 1
        aligned = float("nan")
        if beside < found.sizes["other_layer"]:
            aligned = float(found["alignment"].isel(layer=at, other_layer=beside))
        row = [
            str(name),
            results.number_text(float(found["variance_share"][at, 0])),
            f"{float(found['participation_ratio'][at]):.1f}",
            results.number_text(aligned),
        ]
        if "dominant" in found:
            ids = found["dominant"][at].values.tolist()
            row.append(", ".join(str(one) for one in ids) if ids[0] >= 0 else "–")
        rows.append(row)
    return rows


def _columns(found: xr.Dataset) -> list[str]:
    aligned = "alignment with other runs" if "num_pairs" in found else "alignment with the next"
    columns = ["layer", "first component", "participation ratio", aligned]
    return [*columns, "dominant examples"] if "dominant" in found else columns


def _print(found: xr.Dataset, title: str) -> None:
    out = console()
    out.print(title)
    keys = [str(key) for key in found.attrs.get("by", [])]
    rows = [[*values, *row] for values, part in _parts(found) for row in _rows(part)]
    columns = [*keys, *_columns(found)]
    right = [*keys, *_columns(found)[1:4]]
    out.print(table(columns, rows, right=right))


def _write(path: Path, found: xr.Dataset) -> None:
    keys = [str(key) for key in found.attrs.get("by", [])]
    rows = []
    for values, part in _parts(found):
        for at, name in enumerate(part["layer"].values.tolist()):
            layer = part.isel(layer=at)
            shares = layer["variance_share"].values.tolist()
            rows.append([*values, name, *shares, float(layer["participation_ratio"])])
    shares = [f"variance_share_{index}" for index in found["component"].values.tolist()]
    results.write_csv(path, [*keys, "layer", *shares, "participation_ratio"], rows)
