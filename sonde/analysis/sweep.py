"""Sweeps: what becomes of a score along a key of the configuration, such as width or depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import xarray as xr

from sonde.analysis.sides.families import over_runs
from sonde.exceptions import InvalidInputError, StepNotFoundError

if TYPE_CHECKING:
    from sonde.log import Family, Run

Score = Callable[..., "xr.Dataset | xr.DataArray | float"]


def sweep(
    family: Family | Sequence[Run],
    *,
    over: str,
    group: str | None = None,
    of: Score,
    step: int | None = -1,
    **options: Any,
) -> xr.Dataset:
    """Follow an analysis along a key of the configuration.

    Args:
        family: The runs.
        over: The key along which it is followed, such as `width`.
        group: A key that tells lines apart, such as `noise`.
        of: The analysis: any function of a run that returns an xarray object or a number, such as
            `sonde.analysis.fragmentation`.
        step: Which recorded step of results over steps is taken, of each run its own; negative
            counts from the last. None keeps all steps.
        options: Further arguments of the analysis.

    Returns:
        Dataset [over] or [group, over, …] of means over the other runs (seeds), with `_spread`
        behind a name their standard deviation (n - 1), and `num_runs`. `of`, `over` and `group` in
        the attributes say what it is; `lacking` names the runs left out.

    Raises:
        InvalidInputError: If no run has a key, `over` is `group`, or the analysis returns
            something else.
        MeasureNotFoundError: If no run has what is analyzed.

    Example::

        result = sonde.analysis.sweep(family, over="width", group="noise", of=fragmentation)
        sonde.analysis.plots.sweep(result, "fragmentation")
    """
    if over == group:
        raise InvalidInputError(f"`over` and `group` (={group}) must be different keys")
    name = getattr(of, "__name__", "score")

    def analyze(run: Run) -> xr.Dataset:
        return _at(_as_dataset(of(run, **options), name), step, run)

    by = [over] if group is None else [group, over]
    result = over_runs(family, by, analyze, f"sweep of {name}")
    result.attrs |= {"of": name, "over": over} | ({} if group is None else {"group": group})
    return result


def _as_dataset(result: object, name: str) -> xr.Dataset:
    """Make a Dataset of what an analysis returned.

    Raises:
        InvalidInputError: If it is no number and no xarray object.
    """
    if isinstance(result, xr.Dataset):
        return result
    if isinstance(result, xr.DataArray):
        return result.to_dataset(name=result.name or name)
    try:
        return xr.Dataset({name: float(result)})  # type: ignore[arg-type]  # That is the question.
    except (TypeError, ValueError):
        raise InvalidInputError(
            f"`of` (={name}) returned a {type(result).__name__}; expected an xarray object or a "
            "number per run"
        ) from None


def _at(result: xr.Dataset, step: int | None, run: Run) -> xr.Dataset:
    """Take one step of a result over steps.

    Raises:
        StepNotFoundError: If it is not there.
    """
    if step is None or "step" not in result.dims:
        return result
    steps = result["step"].values.tolist()
    if step not in steps and not -len(steps) <= step < 0:
        raise StepNotFoundError(
            f"the result of run '{run.name}' has no step {step}; steps: {steps}"
        )
    return result.isel(step=steps.index(step) if step in steps else step, drop=True)
