"""The commands that compare layers: `sonde cka`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sonde.exceptions import InvalidInputError

from . import results
from .console import plural, working
from .options import (
    By,
    CsvPath,
    FigurePath,
    Intervals,
    Json,
    NcPath,
    Null,
    Rank,
    Source,
    Where,
    numbers,
    open_family,
    open_one,
    split,
)

if TYPE_CHECKING:
    import xarray as xr

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
        "unbiased": not biased,
        "bandwidth": bandwidth,
        "without": None if without is None else numbers("without", without),
        "remove_components": remove_components,
        "null": null,
        "intervals": intervals,
    }
    is_family = mean or between or by is not None or bool(where)
    _check_runs(len(runs), rank, is_family=is_family)
    with working("comparing layers"):
        if is_family:
            keys = split([by]) if by is not None else None
            similarity = analysis.cka(open_family(runs, where), by=keys, between=between, **options)
        else:
            first, *others = (open_one(run, rank) for run in runs)
            similarity = analysis.cka(first, others[0] if others else None, **options)
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
    estimator = "debiased CKA" if about["estimator"].startswith("unbiased") else "biased CKA"
    if "standard_error" in similarity.coords:
        is_biased = about["estimator"].startswith("biased")
        estimator = f"{'biased ' if is_biased else ''}CKA corrected for the sketch"
    if "bandwidth" in about:
        estimator += f", RBF of bandwidth {about['bandwidth']:g}"
    if "without" in about["estimator"]:
        estimator += f", {about['estimator'].partition(', ')[2]}"
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
