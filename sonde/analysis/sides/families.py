"""Analyses of several runs: one run after the other, grouped by keys of their configuration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import xarray as xr

from sonde.exceptions import (
    InvalidInputError,
    LayerNotFoundError,
    MeasureNotFoundError,
    StepNotFoundError,
)
from sonde.log.family import Family, lacking_text
from sonde.log.measure_log import listing
from sonde.log.run import Run

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from sonde.log.configs import Value

Runs: TypeAlias = "Run | Family | Sequence[Run]"
By: TypeAlias = "str | Sequence[str] | None"

SPREAD = "_spread"
"""What the name of a spread ends in."""

_LACKING = (MeasureNotFoundError, StepNotFoundError, LayerNotFoundError)


def are_several(runs: Runs) -> TypeIs[Family | Sequence[Run]]:
    """Tell whether several runs were given, as a family or a list."""
    return isinstance(runs, (Family, list, tuple)) and all(isinstance(run, Run) for run in runs)


@dataclass
class Grouped:
    """Runs by values of their configuration.

    Attributes:
        keys: What they are grouped by.
        groups: The runs of each tuple of values.
        lacking: What to say of runs that are in no group, or that gave no result.
    """

    keys: list[str]
    groups: dict[tuple[Value, ...], Family]
    lacking: list[str] = field(default_factory=list)


def group(runs: Family | Sequence[Run], by: By) -> Grouped:
    """Group runs; all are one group where `by` is None.

    Raises:
        InvalidInputError: If there is no run, or no run has a key.
    """
    family = runs if isinstance(runs, Family) else Family(runs)
    if not len(family):
        raise InvalidInputError("`runs` is empty; expected at least one run")
    keys = [by] if isinstance(by, str) else list(by or ())
    if not keys:
        return Grouped([], {(): family})
    groups, left_out = family._groups(keys)
    text = lacking_text(left_out)
    return Grouped(keys, groups, [text] if text else [])


def over_runs(
    runs: Family | Sequence[Run],
    by: By,
    analyze: Callable[[Run], xr.Dataset],
    what: str,
    *,
    no_spread: Sequence[str] = (),
) -> xr.Dataset:
    """Analyze each run, and return means and spreads over the runs of each group.

    Args:
        runs: The runs.
        by: The configuration keys that become dimensions; the rest, such as seeds, is averaged.
        analyze: What is done with each.
        what: What it is called, for messages.
        no_spread: Variables whose spread says nothing.

    Returns:
        The variables as means over runs, and with `_spread` behind their names their standard
        deviations over runs (n - 1; NaN for one run), [*by, …]; `num_runs` [*by], 0 for
        combinations that no run has. Values that only some runs of a group have, such as layers of
        deeper models, are means over those; then `num_values_of_` and a name counts them. `lacking`
        in the attributes names the runs that are left out, and why.

    Raises:
        InvalidInputError: If there is no run, or no run has a key.
        MeasureNotFoundError: If no run has what is analyzed.
    """
    grouped = group(runs, by)
    found: dict[tuple[Value, ...], list[xr.Dataset]] = {}
    without: dict[str, list[str]] = {}
    used: list[str] = []
    first: Exception | None = None
    for values, family in grouped.groups.items():
        for name, run in zip(family.names, family, strict=True):
            try:
                result = analyze(run)
            except _LACKING as error:
                first = first or error
                without.setdefault(_reason(error), []).append(name)
            else:
                found.setdefault(values, []).append(result)
                used.append(name)
    if first is not None and not found:
        raise first
    for reason, names in without.items():
        grouped.lacking.append(f"{len(names)} without what it needs ({reason}): {listing(names)}")
    say_lacking(grouped, what, stacklevel=4)
    combined = combine(grouped.keys, found, no_spread=no_spread)
    combined.attrs = {
        **_common_attributes([result for results in found.values() for result in results]),
        "runs": used,
        "by": grouped.keys,
        "lacking": grouped.lacking,
    }
    return combined


def over_pairs(
    runs: Family | Sequence[Run],
    by: By,
    analyze: Callable[[Run, Run], xr.Dataset],
    what: str,
    *,
    no_spread: Sequence[str] = (),
) -> xr.Dataset:
    """Analyze the pairs of runs of each group, and return means and spreads over the pairs.

    Args:
        runs: The runs.
        by: The configuration keys that become dimensions.
        analyze: What is done with the earlier and the later run of a pair.
        what: What it is called, for messages.
        no_spread: Variables whose spread says nothing.

    Returns:
        As `over_runs`, with `num_pairs` instead of `num_runs`.

    Raises:
        InvalidInputError: If there is no run, no run has a key, or no two are in one group.
        MeasureNotFoundError: If no pair of runs has what is analyzed.
    """
    grouped = group(runs, by)
    found: dict[tuple[Value, ...], list[xr.Dataset]] = {}
    used: dict[str, None] = {}
    first: Exception | None = None
    for values, family in grouped.groups.items():
        names = family.names
        if len(family) < 2:
            where = [f"{key}={value}" for key, value in zip(grouped.keys, values, strict=True)]
            grouped.lacking.append(
                f"{names[0]}, the only one{' with ' * bool(where)}{', '.join(where)}"
            )
        for a, b in combinations(range(len(family)), 2):
            try:
                result = analyze(family[a], family[b])
            except _LACKING as error:
                first = first or error
                grouped.lacking.append(f"{names[a]} and {names[b]} ({error})")
            else:
                found.setdefault(values, []).append(result)
                used.update({names[a]: None, names[b]: None})
    if not found and first is not None:
        raise first
    if not found:
        same = f" have the same {' and '.join(grouped.keys)}" if grouped.keys else " were given"
        raise InvalidInputError(f"no two runs{same}; nothing to compare")
    say_lacking(grouped, what, stacklevel=4)
    combined = combine(grouped.keys, found, no_spread=no_spread).rename(num_runs="num_pairs")
    combined.attrs = {
        **_common_attributes([result for results in found.values() for result in results]),
        "runs": list(used),
        "by": grouped.keys,
        "lacking": grouped.lacking,
    }
    return combined


def say_lacking(grouped: Grouped, what: str, *, stacklevel: int) -> None:
    """Warn once of the runs that are left out."""
    if grouped.lacking:
        text = f"{what} leaves out runs: {'; '.join(grouped.lacking)}"
        warnings.warn(text, RuntimeWarning, stacklevel=stacklevel)


def combine(
    keys: Sequence[str],
    found: Mapping[tuple[Value, ...], Sequence[xr.Dataset]],
    *,
    no_spread: Sequence[str] = (),
) -> xr.Dataset:
    """Average results over the runs of each group, and lay the groups out as dimensions.

    Args:
        keys: The names of the dimensions.
        found: The results by values of the keys.
        no_spread: Variables whose spread says nothing.

    Returns:
        See `over_runs`.

    Raises:
        InvalidInputError: If a key is called like a dimension or variable of the results.
    """
    everything = [result for results in found.values() for result in results]
    labels = _labels(everything)
    taken = {str(name) for result in everything for name in (*result.dims, *result.data_vars)}
    for key in keys:
        if key in taken:
            raise InvalidInputError(
                f"`by` names the configuration key '{key}', but the result has a dimension or "
                "variable of this name"
            )
    groups = [_average(results, labels, no_spread) for results in found.values()]
    is_uneven = any(not is_even for _, is_even in groups)
    made = [result if is_uneven else _without_counts(result) for result, _ in groups]
    if not keys:
        return made[0]
    # NaN for combinations without a run; the number of runs is 0 there.
    values = [list(dict.fromkeys(each)) for each in zip(*found, strict=True)]
    shape = [len(each) for each in values]
    laid = {}
    for name in dict.fromkeys(str(name) for result in made for name in result.data_vars):
        template = next(result[name] for result in made if name in result)
        is_count = name == "num_runs" or name.startswith("num_values")
        kind = np.int64 if is_count else np.float64
        array = np.full((*shape, *template.shape), 0 if is_count else np.nan, kind)
        for at, result in zip(found, made, strict=True):
            if name in result:
                places = [each.index(value) for each, value in zip(values, at, strict=True)]
                array[tuple(places)] = result[name].values
        laid[name] = ((*keys, *template.dims), array)
    coordinates = {name: values for name, values in made[0].coords.items() if name in labels}
    return xr.Dataset(
        laid,
        coords=coordinates
        | {key: _coordinate(each) for key, each in zip(keys, values, strict=True)},
    )


def _average(
    results: Sequence[xr.Dataset], labels: Mapping[str, list[Any]], no_spread: Sequence[str]
) -> tuple[xr.Dataset, bool]:
    """Return mean, spread and counts over runs, and whether each value is of all of them."""
    aligned = [
        result.reindex({dim: labels[str(dim)] for dim in result.dims if dim in labels})
        for result in results
    ]
    variables: dict[str, Any] = {"num_runs": len(results)}
    is_even = True
    for name in dict.fromkeys(str(name) for result in aligned for name in result.data_vars):
        arrays = [result[name] for result in aligned if name in result]
        if arrays[0].dtype.kind not in "fiub":
            continue
        dims = arrays[0].dims
        stack = np.stack([array.transpose(*dims).values.astype(np.float64) for array in arrays])
        counts = np.count_nonzero(~np.isnan(stack), axis=0)
        is_even = is_even and bool(np.isin(counts, (0, len(results))).all())
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.nansum(stack, axis=0) / np.where(counts, counts, np.nan)
            squares = np.nansum((stack - mean) ** 2, axis=0)
            spread = np.sqrt(squares / np.where(counts > 1, counts - 1, np.nan))
        variables[name] = (dims, mean)
        if name not in no_spread:
            variables[f"{name}{SPREAD}"] = (dims, spread)
            variables[f"num_values_of_{name}"] = (dims, counts)
    coordinates = {
        name: values for name, values in aligned[0].coords.items() if name in aligned[0].dims
    }
    return xr.Dataset(variables, coords=coordinates), is_even


def _without_counts(result: xr.Dataset) -> xr.Dataset:
    return result.drop_vars([n for n in result.data_vars if str(n).startswith("num_values_of_")])


def _labels(results: Sequence[xr.Dataset]) -> dict[str, list[Any]]:
    """Return what lies along each dimension of some result: steps sorted, names in their order."""
    labels: dict[str, list[Any]] = {}
    for dim in dict.fromkeys(str(dim) for result in results for dim in result.dims):
        each = [result[dim].values.tolist() for result in results if dim in result.coords]
        if not each:
            continue
        if all(isinstance(label, (int, float)) for some in each for label in some):
            labels[dim] = sorted(set().union(*each))
        else:
            labels[dim] = merged(each)
    return labels


def merged(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """Merge lists of names so that each keeps its order as far as that is possible.

    Example:
        >>> merged([["conv", "fc"], ["conv", "block.1", "fc"]])
        ['conv', 'block.1', 'fc']
    """
    found: list[Any] = []
    for names in lists:
        place = 0
        for name in names:
            if name in found:
                place = found.index(name) + 1
            else:
                found.insert(place, name)
                place += 1
    return found


def _coordinate(values: Sequence[Value]) -> Any:
    """Make a coordinate of configuration values; values of several kinds become texts."""
    kinds = {type(value) for value in values}
    if kinds <= {int, float} or kinds in ({str}, {bool}):
        return list(values)
    return [str(value) for value in values]


def _reason(error: Exception) -> str:
    return {
        MeasureNotFoundError: "the measure or source",
        StepNotFoundError: "the step",
        LayerNotFoundError: "the layers",
    }[type(error)]


def _common_attributes(results: Sequence[xr.Dataset]) -> dict[str, Any]:
    """Return the attributes that are the same in all results."""
    first = results[0].attrs
    return {
        name: value
        for name, value in first.items()
        if all(_is_same(result.attrs.get(name), value) for result in results)
    }


def _is_same(value: object, other: object) -> bool:
    return bool(np.array_equal(np.asarray(value, dtype=object), np.asarray(other, dtype=object)))
