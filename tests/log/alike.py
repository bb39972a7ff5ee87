"""Runs to export, and the comparison of two runs by all that their readers see."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

from sonde.exceptions import SondeError
from sonde.log import LogArray, LogWriter, MeasureLog, Run, open_run
from sonde.log.export import export_run
from sonde.log.verify import verify_run

from .conftest import assert_identical, new_run


def export_and_open(path: Path, **options: Any) -> Run:
    """Export a run directory to `out.h5` beside it, check that it is intact, and open it."""
    out = path.with_name("out.h5")
    assert export_run(open_run(path), out, overwrite=True, **options) == out
    assert verify_run(out) == []
    return open_run(out)


def write_compressible(path: Path) -> Path:
    """Record arrays in many chunks that compress, ragged and small ones among them."""
    rng = np.random.default_rng(0)
    writer = LogWriter(new_run(path), seal=False)
    writer.add_table("probe", [LogArray("id", np.arange(32), ("example",))])
    for step in range(40):
        features = np.maximum(rng.normal(size=(32, 300)), 0).astype(np.float32)
        arrays = [
            LogArray("full", features, ("example", "feature"), "fc"),
            LogArray("bits", features.view(np.uint16)[:, ::2], ("a", "b"), "fc", "bfloat16"),
            LogArray("ragged", features.reshape(-1)[: 40 * step], ("element",)),
            LogArray("loss", np.array(step / 3), ()),
        ]
        writer.append("activations", "probe", step, arrays[step % 3 == 1 :], {"step": step})
    writer.close()
    return path


def assert_alike(actual: Run, expected: Run) -> int:
    """Check that two runs read the same, bit for bit, rank by rank; return the arrays compared."""
    for name in ("info", "measures", "layers", "ranks", "notes", "attempts", "damage"):
        assert getattr(actual, name) == getattr(expected, name), name
    num_arrays = 0
    for measure in expected.measures:
        assert actual.sources(measure) == expected.sources(measure)
        for source in expected.sources(measure):
            num_arrays += _assert_same_log(actual[measure, source], expected[measure, source])
    _assert_same_tree(actual, expected)
    if len(expected.ranks) > 1:
        for rank in expected.ranks:
            num_arrays += assert_alike(actual.rank(rank), expected.rank(rank))
    return num_arrays


def _assert_same_log(actual: MeasureLog, expected: MeasureLog) -> int:
    for name in ("steps", "streams", "layers", "num_bytes"):
        assert getattr(actual, name) == getattr(expected, name), name
    _assert_same_result(lambda: actual.ids, lambda: expected.ids)
    num_arrays = 0
    for table in expected.run._tables(expected.source)[:1]:
        for field in table.arrays:
            _assert_same_result(partial(actual.table, field), partial(expected.table, field))
            num_arrays += 1
    for step in expected.steps:
        assert actual.describe(step) == expected.describe(step)
        assert actual.attributes(step) == expected.attributes(step)
        assert actual.time(step) == expected.time(step)
        assert actual.ranks_at(step) == expected.ranks_at(step)
        _assert_same_result(partial(actual.ids_at, step), partial(expected.ids_at, step))
        for layer, field in expected.describe(step):
            _assert_same_result(
                partial(actual.array, field, step, layer, as_stored=True),
                partial(expected.array, field, step, layer, as_stored=True),
            )
            num_arrays += 1
    for layer, field in expected.streams:
        assert actual.steps_of(field, layer) == expected.steps_of(field, layer)
    return num_arrays


def _assert_same_result(actual: Callable[[], Any], expected: Callable[[], Any]) -> None:
    """Compare what two calls return, or the errors they raise."""
    try:
        values = expected()
    except SondeError as error:
        with pytest.raises(type(error)):
            actual()
        return
    if isinstance(values, np.ndarray):
        assert_identical(actual(), values)
    else:
        assert actual() == values


def _assert_same_tree(actual: Run, expected: Run) -> None:
    try:
        tree = expected.to_xarray()
    except (SondeError, ValueError, KeyError) as error:  # xarray has no node "" or "..".
        with pytest.raises(type(error)):
            actual.to_xarray()
        return
    other = actual.to_xarray()
    assert other.groups == tree.groups
    for node in tree.leaves:
        xarray.testing.assert_identical(other[node.path].to_dataset(), node.to_dataset())
