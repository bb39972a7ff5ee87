"""The commands that compare layers: `sonde cka` and `sonde blocks`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sonde.exceptions import InvalidInputError

from . import results
from .console import console, plural, table, working
from .options import (
    By,
    CsvPath,
    FigurePath,
    Intervals,
    Json,
    NcPath,
    Null,
    Rank,
    RunPaths,
    Source,
    Where,
    numbers,
    open_family,
    open_one,
    split,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Layers = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Only these layers; repeat it, or separate by commas."),
]


def cka(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN [OTHER]",
            help="A run, two to compare, or the runs of --mean, --by and --between.",
            show_default=False,
        ),
    ],
    step: Annotated[int, typer.Option(help="Recorded step; -1 is the last.")] = -1,
    other_step: Annotated[
        int | None, typer.Option(help="Step of the other side; default: the same.")
    ] = None,
    layers: Layers = None,
    other_layers: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Layers of the other side; default: as --layers."),
    ] = None,
    source: Source = None,
    rank: Rank = None,
    biased: Annotated[bool, typer.Option("--biased", help="The biased estimator.")] = False,
    bandwidth: Annotated[
        float | None,
        typer.Option(help="An RBF kernel, this times the median distance; default: linear."),
    ] = None,
    without: Annotated[
        str | None, typer.Option(metavar="ID,ID", help="Leave out these examples.")
    ] = None,
    remove_components: Annotated[
        int, typer.Option(metavar="N", help="Remove the N leading components of each layer.")
    ] = 0,
    null: Null = 0,
    intervals: Intervals = 0,
    knn: Annotated[
        int | None,
        typer.Option(metavar="K", help="The share of K nearest neighbours in common, not CKA."),
    ] = None,
    mean: Annotated[bool, typer.Option("--mean", help="The mean over all runs.")] = False,
    by: By = None,
    between: Annotated[
        bool, typer.Option("--between", help="Compare the pairs of different runs.")
    ] = False,
    where: Where = None,
    figure: FigurePath = None,
    csv: CsvPath = None,
    nc: NcPath = None,
    as_json: Json = False,
) -> None:
    """Compare layers by CKA: within a run, between two runs or steps, over families of runs.

    1 means equal up to rotation and scale, 0 unrelated. The estimator is the debiased one unless
    --biased is given. Examples are matched by their ids. With --null, a star marks what exceeds
    the largest value of a map whose examples are permuted, at the 5 % level.

    Examples:
        sonde cka runs/seed0
        sonde cka runs/seed0 runs/seed1 --figure cka.png
        sonde cka runs/seed0 --step 0 --other-step -1
        sonde cka runs/seed0 --layers "conv*,fc" --csv cka.csv
        sonde cka runs/seed0 runs/seed1 --layers "conv*" --other-layers fc
        sonde cka runs/seed0 --null 50 --intervals 50 --nc cka.nc
        sonde cka runs --by width --where noise=0 --figure by_width.png
        sonde cka runs/* --between --without 100,101
        sonde cka runs/seed0 runs/seed1 --knn 5 --null 50
        sonde cka runs/seed0 --rank 0
    """
    from sonde import analysis

    results.check_figure(figure)
    options: dict[str, Any] = {
        "step": step,
        "other_step": other_step,
        "layers": split(layers),
        "other_layers": split(other_layers),
        "source": source,
        "without": None if without is None else numbers("without", without),
        "null": null,
    }
    of_cka = {
        "unbiased": not biased,
        "bandwidth": bandwidth,
        "remove_components": remove_components,
        "intervals": intervals,
    }
    if knn is None:
        options |= of_cka
    else:
        _refuse_with_knn(of_cka)
        options["k"] = knn
    compare = analysis.cka if knn is None else analysis.mutual_knn
    is_family = mean or between or by is not None or bool(where)
    _check_runs(len(runs), rank, is_family=is_family)
    with working("comparing layers"):
        if is_family:
            keys = split([by]) if by is not None else None
            similarity = compare(open_family(runs, where), by=keys, between=between, **options)
        else:
            first, *others = (open_one(run, rank) for run in runs)
            similarity = compare(first, others[0] if others else None, **options)
    if as_json:
        results.print_json(similarity)
    else:
        results.print_maps(similarity, _title(similarity, [str(run) for run in runs]))
    if csv is not None:
        results.write_matrix(csv, similarity)
    if nc is not None:
        results.write_nc(nc, similarity)
    if figure is not None:
        results.write_figure(figure, analysis.plots.cka(similarity))


def blocks(
    runs: RunPaths,
    step: Annotated[int, typer.Option(help="Recorded step; -1 is the last.")] = -1,
    steps: Annotated[
        str | None, typer.Option(metavar="N,N", help="Several steps of one run instead.")
    ] = None,
    layers: Layers = None,
    source: Source = None,
    biased: Annotated[bool, typer.Option("--biased", help="The biased estimator.")] = False,
    null: Annotated[
        int, typer.Option(metavar="N", help="Permute the examples N times; decides how many.")
    ] = 200,
    intervals: Annotated[
        int, typer.Option(metavar="N", help="Bounds from N halves of the examples; 0: none.")
    ] = 100,
    min_size: Annotated[int, typer.Option(help="The least number of layers.")] = 3,
    min_contrast: Annotated[float, typer.Option(help="The least contrast.")] = 0.1,
    by: By = None,
    where: Where = None,
    figure: FigurePath = None,
    csv: CsvPath = None,
    nc: NcPath = None,
    as_json: Json = False,
) -> None:
    """Find blocks of neighbouring layers that represent the same.

    Layers of a block are more alike than layers at their distance are: "contrast" says how much,
    against pairs of which one layer is inside. The number of blocks is judged by maps of permuted
    examples. Of one run its blocks; of several, or with --by, means over the runs.

    Examples:
        sonde blocks runs/seed0
        sonde blocks runs/seed0 --null 50 --figure blocks.png --csv blocks.csv
        sonde blocks runs/seed0 --steps 0,-1 --nc blocks.nc
        sonde blocks runs --by width --null 50 --intervals 0
    """
    from sonde import analysis

    results.check_figure(figure)
    is_family = len(runs) > 1 or by is not None or bool(where)
    with working("finding blocks"):
        opened = open_family(runs, where)
        subject = opened if is_family or len(opened) > 1 else opened[0]
        found = analysis.blocks(
            subject,
            by=split([by]) if by is not None else None,
            step=step,
            steps=None if steps is None else numbers("steps", steps),
            layers=split(layers),
            source=source,
            unbiased=not biased,
            null=null,
            intervals=intervals,
            min_size=min_size,
            min_contrast=min_contrast,
        )
    is_averaged = "is_in_block" in found
    title = f"{plural(len(opened), 'run')}" if is_averaged else f"{runs[0]}"
    if as_json:
        results.print_json(found)
    elif is_averaged:
        results.print_averages(found, f"blocks of {title}, mean ± spread", _OF_FAMILY)
    else:
        _print_blocks(found, title)
    if csv is not None:
        if is_averaged:
            results.write_averages(csv, found, _OF_FAMILY)
        else:
            _write_blocks(csv, found)
    if nc is not None:
        results.write_nc(nc, found)
    if figure is not None:
        results.write_figure(figure, _drawn(analysis, subject, found, layers, source, biased))


_OF_FAMILY = ("num_blocks", "share_in_blocks", "largest_size", "largest_contrast")


def _drawn(
    analysis: Any,  # Any: the module, whose names are imported when they are used.
    subject: Any,
    found: xr.Dataset,
    layers: list[str] | None,
    source: str | None,
    biased: bool,
) -> Figure:
    """Draw the map of a run with its blocks; of steps and families where blocks are."""
    if "is_in_block" in found or "step" in found.dims:
        drawn: Figure = analysis.plots.blocks(found)
        return drawn
    similarity = analysis.cka(
        subject,
        step=found.attrs["step"],
        layers=split(layers),
        source=source,
        unbiased=not biased,
    )
    drawn = analysis.plots.cka(similarity, blocks=found)
    return drawn


def _block_rows(found: xr.Dataset) -> list[dict[str, Any]]:
    """Return a row per block, with the step where there are several."""
    over = found if "step" in found.dims else found.expand_dims(step=[found.attrs["step"]])
    rows = []
    for step in over["step"].values.tolist():
        at = over.sel(step=step)
        for index in range(int(at["num_blocks"])):
            block = at.isel(block=index)
            names = [str(name) for name in block.data_vars if str(name) not in _BESIDE]
            rows.append({"step": step} | {name: block[name].item() for name in names})
    return rows


_BESIDE = ("num_blocks", "in_block")


def _print_blocks(found: xr.Dataset, title: str) -> None:
    out = console()
    about = found.attrs
    faint = about.get("num_faint", 0)
    beside = f", {faint} too faint (contrast below {about['min_contrast']:g})" if faint else ""
    rows = _block_rows(found)
    examples = plural(about["num_examples"], "example")
    out.print(f"{plural(len(rows), 'block')}{beside} of {title}, {examples} of '{about['source']}'")
    numbers_of = ["step", "size", "similarity", "contrast", "p", "first at", "last at", "support"]
    cells = [
        [
            str(row["step"]),
            row["first_layer"],
            row["last_layer"],
            str(int(row["size"])),
            *(results.number_text(row[name]) for name in ("similarity", "contrast")),
            f"{row['p_value']:.3f}",
            _span(row, "start", 0),
            _span(row, "end", -1),
            results.number_text(row.get("support", float("nan"))),
        ]
        for row in rows
    ]
    if cells:
        columns = ["step", "first layer", "last layer", *numbers_of[1:]]
        out.print(table(columns, cells, right=numbers_of))


def _span(row: dict[str, Any], end: str, shift: int) -> str:
    """Write a position among the layers, with the bounds of it."""
    at = int(row[end]) + shift
    low, high = row.get(f"{end}_low"), row.get(f"{end}_high")
    if low is None or low != low or high is None:
        return str(at)
    return f"{at} ({int(low) + shift}–{int(high) + shift})"


def _write_blocks(path: Path, found: xr.Dataset) -> None:
    rows = _block_rows(found)
    header = list(rows[0]) if rows else ["step", "start", "end", "first_layer", "last_layer"]
    results.write_csv(path, header, [list(row.values()) for row in rows])


def _refuse_with_knn(of_cka: dict[str, Any]) -> None:
    """Refuse options of CKA that nearest neighbours have no use for.

    Raises:
        InvalidInputError: If one was given.
    """
    given = [
        {"unbiased": "biased"}.get(name, name).replace("_", "-")
        for name, value in of_cka.items()
        if value != {"unbiased": True, "bandwidth": None}.get(name, 0)
    ]
    if given:
        raise InvalidInputError(f"`--knn` goes without --{', --'.join(given)}, which are of CKA")


def _check_runs(num_runs: int, rank: int | None, *, is_family: bool) -> None:
    if is_family and rank is not None:
        raise InvalidInputError("`--rank` is of one run or two, not of families")
    if not is_family and num_runs > 2:
        raise InvalidInputError(
            f"{num_runs} runs were given; take their --mean, group them --by a configuration key, "
            "or compare the pairs --between them"
        )


def _title(similarity: xr.DataArray, paths: list[str]) -> str:
    """Say in a line what was compared."""
    about = similarity.attrs
    if "k" in about:
        about = about | {"estimator": ""}
    estimator = "debiased CKA" if about["estimator"].startswith("unbiased") else "biased CKA"
    if "standard_error" in similarity.coords:
        is_biased = about["estimator"].startswith("biased")
        estimator = f"{'biased ' if is_biased else ''}CKA corrected for the sketch"
    if "bandwidth" in about:
        estimator += f", RBF of bandwidth {about['bandwidth']:g}"
    if "without" in about["estimator"]:
        estimator += f", {about['estimator'].partition(', ')[2]}"
    if "k" in about:
        estimator = f"share of {about['k']} nearest neighbours in common (chance: "
        estimator += f"{about['chance']:.2f})"
    examples = "examples"
    if "num_examples" in about:
        examples = plural(about["num_examples"], "example")
    if "runs" in about:
        what = "pairs" if "num_pairs" in similarity.coords else "mean"
        steps = f", step {about['step']}" if "step" in about else ""
        sides = [f"{what} of {plural(len(about['runs']), 'run')}{steps}"]
    else:
        ends = [about["step"], about["other_step"]]
        sides = list(
            dict.fromkeys(
                f"{path}, step {at}" for path, at in zip([paths[0], paths[-1]], ends, strict=True)
            )
        )
    return f"{estimator} of {' and '.join(sides)}, {examples} of '{about['source']}'"
