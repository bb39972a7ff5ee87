"""Runs told apart by their configuration: what `--where` and `--by` mean, and `sonde sweep`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sonde.exceptions import InvalidInputError

from . import results
from .console import console, plural, say, table, working
from .options import CsvPath, FigurePath, RunPaths, Source, Where, open_family

if TYPE_CHECKING:
    from .facts import Facts


class Of(str, Enum):
    """What `sonde sweep` follows."""

    FRAGMENTATION = "fragmentation"
    STIFFNESS = "stiffness"


_SCORES = {
    Of.FRAGMENTATION: ("fragmentation",),
    Of.STIFFNESS: ("cosine_within", "cosine_between", "sign_within", "sign_between"),
}


def sweep(
    runs: RunPaths,
    over: Annotated[str, typer.Option(metavar="KEY", help="Configuration key to follow.")],
    of: Annotated[Of, typer.Option(help="The analysis.")] = Of.FRAGMENTATION,
    group: Annotated[
        str | None, typer.Option(metavar="KEY", help="Configuration key that tells lines apart.")
    ] = None,
    where: Where = None,
    step: Annotated[int, typer.Option(help="Recorded step of each run; -1 is its last.")] = -1,
    source: Source = None,
    figure: FigurePath = None,
    csv: CsvPath = None,
) -> None:
    """Follow an analysis along a key of the configuration, such as width.

    Means over the runs that have the same values, such as seeds, and their spread (standard
    deviation over runs). Runs that lack a key or the measure are named and left out.

    Examples:
        sonde sweep runs --over width
        sonde sweep runs --over width --group noise --where noise=0 --figure sweep.png
        sonde sweep runs/* --over width --of stiffness --csv sweep.csv
    """
    from sonde import analysis

    results.check_figure(figure)
    family = open_family(runs, where)
    with working(f"{of.value} of {plural(len(family), 'run')}"):
        found = analysis.sweep(
            family,
            over=over,
            group=group,
            of=getattr(analysis, of.value),
            step=step,
            steps=[step],
            source=source,
        )
    scores = [name for name in _SCORES[of] if name in found]
    along = over if group is None else f"{over} and {group}"
    count = f"mean ± spread of {plural(len(found.attrs['runs']), 'run')}"
    results.print_averages(found, f"{of.value} over {along}, {count}", scores)
    if csv is not None:
        results.write_averages(csv, found, scores)
    if figure is not None:
        results.write_figure(figure, analysis.plots.sweep(found, scores[0]))


def choose(overviews: Sequence[Facts], where: Sequence[str] | None) -> list[Facts]:
    """Return the runs whose configuration has these values; name those that lack a key.

    Raises:
        InvalidInputError: If a condition is none, or no run has its key.
    """
    from sonde.log.configs import fits

    chosen = list(overviews)
    for key, wanted in conditions(where).items():
        chosen = _with_key(chosen, key, "--where")
        chosen = [facts for facts in chosen if fits(facts["config"][key], wanted)]
    return chosen


def print_groups(overviews: Sequence[Facts], keys: Sequence[str]) -> None:
    """Print a row per combination of values of configuration keys, with its runs."""
    from sonde.log.configs import order_of

    kept = list(overviews)
    for key in keys:
        kept = _with_key(kept, key, "--by")
    groups: dict[tuple[Any, ...], list[Facts]] = {}
    for facts in kept:
        groups.setdefault(tuple(facts["config"][key] for key in keys), []).append(facts)
    rows = []
    for values in sorted(groups, key=lambda group: [order_of(value) for value in group]):
        runs = groups[values]
        last = sorted({facts["steps"][-1] for facts in runs if facts["steps"]})
        steps = "–".join(str(step) for step in dict.fromkeys([*last[:1], *last[-1:]])) or "–"
        names = ", ".join(facts["name"] for facts in runs)
        rows.append([*map(value_text, values), str(len(runs)), steps, names])
    numbers = [*keys, "number", "last step"]
    console().print(table([*numbers, "runs"], rows, right=numbers))


def conditions(where: Sequence[str] | None) -> dict[str, Any]:
    """Read conditions such as `width=64` or `width=32,64`.

    Raises:
        InvalidInputError: If one has no `=`.
    """
    from sonde.log.configs import parse_value

    wanted: dict[str, Any] = {}
    for text in where or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InvalidInputError(f"`--where` (={text}) must be KEY=VALUE, such as width=64")
        parts = value.split(",")
        is_list = len(parts) > 1 and not value.startswith(("[", '"'))
        wanted[key.strip()] = [parse_value(p) for p in parts] if is_list else parse_value(value)
    return wanted


def value_text(value: object) -> str:
    """Write a value of a configuration; a dash where there is none."""
    return "–" if value is None else str(value)


def _with_key(overviews: Sequence[Facts], key: str, option: str) -> list[Facts]:
    """Return the runs that have a key; say which have not.

    Raises:
        InvalidInputError: If none has it.
    """
    having = [facts for facts in overviews if key in facts.get("config", {})]
    if overviews and not having:
        keys = dict.fromkeys(name for facts in overviews for name in facts.get("config", {}))
        raise InvalidInputError(
            f"`{option}`: no run has the configuration key '{key}'; keys: "
            f"{', '.join(keys) or 'none'}"
        )
    lacking = [facts["name"] for facts in overviews if facts not in having]
    if lacking:
        say(f"sonde: {option} leaves out runs without '{key}': {', '.join(lacking)}", err=True)
    return having


def config_columns(overviews: Sequence[Facts]) -> Mapping[str, list[str]]:
    """Return the values of every configuration key, a text per run."""
    keys = dict.fromkeys(key for facts in overviews for key in facts.get("config", {}))
    return {
        key: [value_text(facts.get("config", {}).get(key)) for facts in overviews] for key in keys
    }
