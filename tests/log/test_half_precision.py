"""Half precision: readers hand it out as float32, so that sums over examples are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sonde.log import LogArray, LogWriter, MeasureLog, open_run
from sonde.log.sealing.seal import seal_run

from .alike import export_and_open
from .conftest import Array, Open, assert_identical

# So many ones add up to 2,048 in float16, which has no 2,049.
NUM_EXAMPLES = 4096
ONES = np.ones((NUM_EXAMPLES, 2), np.float16)
BFLOAT16_ONES = np.full((NUM_EXAMPLES, 2), 0x3F80, np.uint16)

READERS: dict[str, Callable[..., Any]] = {
    "array": lambda log, **asked: log.array("full", 0, "fc", **asked),
    "array of a layer": lambda log, **asked: log["fc"].array("full", 0, **asked),
    "features": lambda log, **asked: log.features("fc", 0, **asked),
    "features of a layer": lambda log, **asked: log["fc"].features(0, **asked),
    "stack": lambda log, **asked: log.stack("full", layer="fc", **asked)[0],
    "table": lambda log, **asked: log.table("target", **asked),
    "tree": lambda log, **asked: log.run.to_xarray(**asked)["m/s"]["fc:full"].values[0],
    "tree of some": lambda log, **asked: log.run.to_xarray(**asked)["m/s"]["rare:full"].values[1],
}


@pytest.fixture(params=["journal", "segment", "export"])
def log(run_path: Path, request: pytest.FixtureRequest) -> MeasureLog:
    writer = LogWriter(run_path, seal=False)
    writer.add_table("s", [LogArray("target", ONES, ("example", "class"))])
    for step in range(2):
        dims = ("example", "feature")
        arrays = [
            LogArray("full", ONES, dims, "fc"),
            LogArray("full", ONES, dims, "rare"),
            LogArray("full", BFLOAT16_ONES, dims, "brain", "bfloat16"),
        ]
        writer.append("m", "s", step, arrays if step else [arrays[0], arrays[2]])
    writer.close()
    if request.param == "export":
        return export_and_open(run_path).m
    if request.param == "segment":
        seal_run(run_path)
    return open_run(run_path).m


@pytest.mark.parametrize("reader", READERS)
def test_float16_is_read_as_float32(log: MeasureLog, reader: str) -> None:
    values = READERS[reader](log)
    assert_identical(values, ONES.astype(np.float32))
    assert values.mean(0).tolist() == [1, 1]


@pytest.mark.parametrize("reader", READERS)
def test_float16_is_read_as_it_was_stored_if_asked(log: MeasureLog, reader: str) -> None:
    assert_identical(READERS[reader](log, as_stored=True), ONES)


def test_mean_of_half_precision_over_examples_is_right_in_xarray(log: MeasureLog) -> None:
    dataset = log.run.to_xarray()["m/s"].to_dataset()
    assert dataset["fc:full"].mean("example").values.tolist() == [[1, 1], [1, 1]]
    late = dataset["rare:full"].mean("example", skipna=False).values
    assert np.isnan(late[0]).all()
    assert late[1].tolist() == [1, 1]


def test_targets_in_half_precision_are_read_as_float32(log: MeasureLog) -> None:
    assert log.targets is not None
    assert_identical(log.targets, ONES.astype(np.float32))


@pytest.mark.parametrize("as_stored", [False, True])
def test_bfloat16_is_always_read_as_float32(log: MeasureLog, as_stored: bool) -> None:
    expected: Array = np.ones((NUM_EXAMPLES, 2), np.float32)
    assert_identical(log.array("full", 0, "brain", as_stored=as_stored), expected)
    assert_identical(log.stack("full", None, "brain", as_stored=as_stored)[1], expected)


def test_a_shape_and_type_are_described_as_stored(log: MeasureLog) -> None:
    assert log.describe(0)["fc", "full"].dtype == "float16"
    assert log.describe(0)["fc", "full"].num_bytes == ONES.nbytes


def test_a_stack_of_two_types_is_of_the_wider_one(run_path: Path, opened: Open) -> None:
    for attempt, dtype in enumerate(["float16", "float32"]):
        writer = LogWriter(run_path, attempt=attempt, about={"resume_step": attempt}, seal=False)
        writer.append("m", "s", attempt, [LogArray("a", np.ones(3, dtype), ("n",))])
        writer.close()
    log = opened(run_path).m
    for as_stored in (False, True):
        assert_identical(log.stack("a", as_stored=as_stored), np.ones((2, 3), np.float32))
