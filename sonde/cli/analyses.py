"""The commands that analyze a training: `sonde stiffness` and `sonde boundary`."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from sonde.exceptions import InvalidInputError

from . import results
from .console import plural, say, working
from .options import CsvPath, FigurePath, Rank, RunPaths, Source, numbers, open_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class By(str, Enum):
    """How stiffness groups the examples."""

    CLASS = "class"
    NONE = "none"


class Drawing(str, Enum):
    """What `sonde boundary --figure` draws."""

    PLANES = "planes"
    REGIONS = "regions"
    AGREEMENT = "agreement"


def stiffness(
    runs: RunPaths,
    by: Annotated[By, typer.Option(help="Pairs within and between classes, or all pairs.")] = (
        By.CLASS
    ),
    layer: Annotated[
        str | None, typer.Option(help="Parameters of this layer; default: all.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="N,N", help="Recorded steps; -1 is the last.")
    ] = None,
    source: Source = None,
    rank: Rank = None,
    figure: FigurePath = None,
    csv: CsvPath = None,
) -> None:
    """Tell whether examples pull the weights together, within and between classes.

    The cosine, and its sign, of the gradients of pairs of different examples: 1 where a step for
    one helps the other as much, 0 where they are unrelated, -1 where it hurts. An example without
    gradient counts in no pair; "zero gradients" says how many there are.

    Examples:
        sonde stiffness runs/seed0
        sonde stiffness runs/seed0 runs/seed1 --figure stiffness.png
        sonde stiffness runs/seed0 --layer fc --steps 0,-1
        sonde stiffness runs/seed0 --by none --csv stiffness.csv
    """
    from sonde import analysis

    results.check_figure(figure)
    opened = open_all(runs, rank)
    chosen = None if steps is None else numbers("steps", steps)
    found = {}
    with working("stiffness", total=len(opened)) as start:
        for name, run in opened.items():
            start(name)
            found[name] = analysis.stiffness(
                run,
                by="class" if by is By.CLASS else None,
                steps=chosen,
                layer=layer,
                source=source,
            )
    about = next(iter(found.values())).attrs
    grouped = "within and between classes" if by is By.CLASS else "over all pairs"
    parameters = " / ".join(dict.fromkeys(results.parameters_text(r) for r in found.values()))
    if layer is not None:
        parameters = f"layer {layer}, {parameters}"
    examples = plural(about["num_examples"], "example")
    where = f"{', '.join(found)}, {examples} of '{about['source']}'"
    say(f"stiffness {grouped}, {parameters}: {where}")
    results.print_stiffness(found)
    if csv is not None:
        columns = [*results.stiffness_columns(found), "num_zero_gradients"]
        results.write_steps(csv, found, columns)
    if figure is not None:
        results.write_figure(figure, analysis.plots.stiffness(found))


def boundary(
    runs: RunPaths,
    step: Annotated[
        int | None, typer.Option(help="Recorded step; default: all of one run, or the last.")
    ] = None,
    source: Source = None,
    rank: Rank = None,
    figure: FigurePath = None,
    draw: Annotated[Drawing, typer.Option(help="What --figure draws.")] = Drawing.PLANES,
    csv: CsvPath = None,
) -> None:
    """Tell how fragmented decision boundaries are, and whether runs draw the same ones.

    The number of decision regions per plane of each run; for several runs, the fraction of the
    planes where each pair predicts the same class, its bootstrap interval, and what chance gives.

    Examples:
        sonde boundary runs/seed0
        sonde boundary runs/seed0 runs/seed1 --figure planes.png
        sonde boundary runs/seed0 --step 0 --csv regions.csv
        sonde boundary runs/seed0 runs/seed1 --figure out.pdf --draw agreement
    """
    from sonde import analysis

    results.check_figure(figure)
    opened = open_all(runs, rank)
    _check_drawing(draw, len(opened))
    at = -1 if step is None else step
    steps = None if len(opened) == 1 and step is None else [at]
    regions = {}
    with working("decision planes", total=len(opened)) as start:
        for name, run in opened.items():
            start(name)
            regions[name] = analysis.fragmentation(run, steps=steps, source=source)
    first = next(iter(regions.values()))
    planes = plural(first.sizes["triplet"], "plane")
    say(f"decision regions: {', '.join(regions)}, {planes} of '{first.attrs['source']}'")
    results.print_fragmentation(regions)
    if len(opened) > 1:
        with working("comparing planes"):
            pairs = analysis.reproducibility(list(opened.values()), step=at, source=source)
        results.print_reproducibility(pairs, list(opened))
    if csv is not None:
        if len(opened) > 1:
            results.write_pairs(csv, pairs, list(opened))
        else:
            results.write_steps(csv, regions, ["fragmentation", "standard_error"])
    if figure is None:
        return
    with working("drawing"):
        drawn: Figure
        if draw is Drawing.AGREEMENT:
            drawn = analysis.plots.reproducibility(pairs)
        elif draw is Drawing.REGIONS:
            over_steps = {
                name: analysis.fragmentation(run, source=source) for name, run in opened.items()
            }
            drawn = analysis.plots.fragmentation(over_steps)
        else:
            drawn = analysis.plots.decision_planes(list(opened.values()), step=at, source=source)
    results.write_figure(figure, drawn)


def _check_drawing(draw: Drawing, num_runs: int) -> None:
    if draw is Drawing.AGREEMENT and num_runs < 2:
        raise InvalidInputError("--draw agreement compares runs; name at least 2")
