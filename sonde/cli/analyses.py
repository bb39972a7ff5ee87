"""The commands that analyze: `sonde cka`, `sonde stiffness` and `sonde boundary`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sonde.exceptions import InvalidInputError

from . import results
from .console import plural, say, working
from .options import CsvPath, FigurePath, Rank, RunPath, RunPaths, Source, open_all, open_one

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


def cka(
    run: RunPath,
    other: Annotated[
        Path | None,
        typer.Argument(metavar="OTHER", help="Run to compare with; default: RUN itself."),
    ] = None,
    step: Annotated[int, typer.Option(help="Recorded step; -1 is the last.")] = -1,
    other_step: Annotated[
        int | None, typer.Option(help="Step of the other side; default: the same.")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only these layers; repeat it, or separate by commas."),
    ] = None,
    source: Source = None,
    rank: Rank = None,
    biased: Annotated[bool, typer.Option("--biased", help="The biased estimator.")] = False,
    figure: FigurePath = None,
    csv: CsvPath = None,
) -> None:
    """Compare layers by CKA: within a run, between two runs, or between two steps.

    1 means equal up to rotation and scale, 0 unrelated. The estimator is the debiased one unless
    --biased is given. Examples are matched by their ids.

    Examples:
        sonde cka runs/seed0
        sonde cka runs/seed0 runs/seed1 --figure cka.png
        sonde cka runs/seed0 --step 0 --other-step -1
        sonde cka runs/seed0 --layers "conv*,fc" --csv cka.csv
        sonde cka runs/seed0 --rank 0
    """
    from sonde import analysis

    results.check_figure(figure)
    with working("comparing layers"):
        similarity = analysis.cka(
            open_one(run, rank),
            None if other is None else open_one(other, rank),
            step=step,
            other_step=other_step,
            layers=None if layers is None else _split(layers),
            source=source,
            unbiased=not biased,
        )
    about = similarity.attrs
    estimator = "biased CKA" if biased else "debiased CKA"
    if "standard_error" in similarity.coords:
        estimator = f"{'biased ' if biased else ''}CKA corrected for the sketch"
    sides = dict.fromkeys(
        [f"{run}, step {about['step']}", f"{other or run}, step {about['other_step']}"]
    )
    examples = plural(about["num_examples"], "example")
    title = f"{estimator} of {' and '.join(sides)}, {examples} of '{about['source']}'"
    results.print_cka(similarity, title)
    if csv is not None:
        results.write_matrix(csv, similarity)
    if figure is not None:
        results.write_figure(figure, analysis.plots.cka(similarity))


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
    chosen = None if steps is None else _numbers(steps)
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


def _split(texts: Sequence[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in _split([text])]
    except ValueError:
        raise InvalidInputError(
            f"`--steps` (={text}) must be whole numbers separated by commas, such as 0,100,-1"
        ) from None
