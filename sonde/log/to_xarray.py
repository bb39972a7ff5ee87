"""Records as xarray datasets with named dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray

from sonde.log.format.names import stream_name

if TYPE_CHECKING:
    from .measure_log import MeasureLog

_EXAMPLE_DIMS = ("example", "other_example")


def dataset_of(
    log: MeasureLog,
    layers: Sequence[str] | None,
    steps: Sequence[int] | None,
    *,
    as_stored: bool,
) -> xarray.Dataset:
    """Load the records of one measure × source.

    Args:
        log: The records.
        layers: Only these layers; None takes all.
        steps: Only these steps; None takes all.
        as_stored: Leave arrays as they are; see `MeasureLog.array`.

    Returns:
        A dataset with one variable per stream, first axis `step`.
    """
    wanted = [step for step in log.steps if steps is None or step in steps]
    described = {step: log.describe(step) for step in wanted}
    variables: dict[str, tuple[tuple[str, ...], np.ndarray[Any, Any]]] = {}
    sizes = {"step": -1}  # A stream's own axis of this name is another one.
    taken = {"step", "target"} | {
        name
        for streams in described.values()
        for stream in streams.values()
        for dim, size in zip(stream.dims, stream.shape, strict=True)
        for name in (dim, f"{dim}_{size}")
    }
    ragged, by_rank = [], []
    for layer, field in log.streams:
        if layers is not None and layer is not None and layer not in layers:
            continue
        label = stream_name(layer, field)
        name = f"{label}::data" if label in taken else label
        present = [step for step in wanted if (layer, field) in described[step]]
        shapes = {described[step][layer, field].shape for step in present}
        if len(shapes) != 1:
            ragged += [name] if shapes else []
            continue
        stream = described[present[0]][layer, field]
        if set(_EXAMPLE_DIMS) <= set(stream.dims) and len(log.ranks_at(present[0])) > 1:
            by_rank.append(name)
            continue
        values = _aligned(log.stack(field, present, layer, as_stored=as_stored), present, wanted)
        dims = tuple(
            _free_name(sizes, dim, size)
            for dim, size in zip(stream.dims, stream.shape, strict=True)
        )
        variables[name] = (("step", *dims), values)
    return xarray.Dataset(
        variables,
        coords={"step": wanted, **_example_coordinates(log, sizes)},
        attrs={"measure": log.measure, "source": log.source, "ragged": ragged, "by_rank": by_rank},
    )


def _aligned(
    values: np.ndarray[Any, Any], present: Sequence[int], wanted: Sequence[int]
) -> np.ndarray[Any, Any]:
    """Spread values over all wanted steps, NaN where there is no record."""
    if len(present) == len(wanted):
        return values
    kind = values.dtype if values.dtype.kind == "f" else np.dtype(np.float64)
    spread = np.full((len(wanted), *values.shape[1:]), np.nan, kind)
    spread[np.searchsorted(wanted, present)] = values
    return spread


def _free_name(sizes: dict[str, int], dim: str, size: int) -> str:
    """Name a dimension; a second size of the same name is told apart by its size."""
    name = dim if sizes.setdefault(dim, size) == size else f"{dim}_{size}"
    sizes[name] = size
    return name


def _example_coordinates(log: MeasureLog, sizes: dict[str, int]) -> dict[str, Any]:
    ids = log.ids
    if ids is None:
        return {}
    coordinates: dict[str, Any] = {dim: ids for dim in _EXAMPLE_DIMS if sizes.get(dim) == len(ids)}
    targets = log.targets
    if targets is not None and "example" in coordinates and len(targets) == len(ids):
        dims = ["example", *(f"target_{axis}" for axis in range(1, targets.ndim))]
        coordinates["target"] = (dims, targets)
    return coordinates
