"""Runs written with the real log writer, for analyses to read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sonde.log import LogArray, LogWriter, Run, open_run
from sonde.log.format.files import write_run_file

Array = npt.NDArray[Any]
GRAM_DIMS = ("example", "other_example")
COVERAGE = {"conv.weight": "exact", "conv.bias": "frozen", "fc.weight": "exact"}


def _write(
    path: Path,
    measure: str,
    records: Mapping[int, list[LogArray]],
    table: list[LogArray],
    attributes: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Run:
    path.mkdir()
    described = {"measure": measure, "source": "probe", "features": "flattened"}
    write_run_file(path, {"measures": [described]})
    writer = LogWriter(path, seal=False)
    if measure == "example_gradients":
        writer.note("coverage", 0, measure=measure, source="probe", parameters=COVERAGE)
    if table:
        writer.add_table("probe", table, facts)
    for step, arrays in records.items():
        assert writer.append(measure, "probe", step, arrays, attributes)
    writer.close()
    return open_run(path)


def _grams(grams: Mapping[str, Array]) -> list[LogArray]:
    return [LogArray("gram", gram, GRAM_DIMS, layer) for layer, gram in grams.items()]


@pytest.fixture
def activations_run(
    tmp_path: Path,
) -> Callable[[str, Mapping[int, Mapping[str, Array]], Array | None], Run]:
    """Write (name, {step: {layer: gram}}, ids) as a run with activations."""

    def write(name: str, grams: Mapping[int, Mapping[str, Array]], ids: Array | None) -> Run:
        table = [] if ids is None else [LogArray("id", ids.astype(np.int64), ("example",))]
        records = {step: _grams(layers) for step, layers in grams.items()}
        return _write(tmp_path / name, "activations", records, table)

    return write


@pytest.fixture
def probed_run(tmp_path: Path) -> Callable[..., Run]:
    """Write a run with the activations of a probe of 8 examples, and what it says of itself."""

    def write(
        name: str,
        targets: Array | None = None,
        example_ids: Array | None = None,
        kind: str | None = None,
        **facts: str,
    ) -> Run:
        if kind is not None:
            facts["ids"] = kind
        columns = {"id": np.arange(8) if example_ids is None else example_ids}
        if targets is not None:
            columns["target"] = targets
        table = [LogArray(field, values, ("example",)) for field, values in columns.items()]
        features = np.random.default_rng(0).standard_normal((8, 3))
        records = {0: _grams({"fc": features @ features.T})}
        return _write(tmp_path / name, "activations", records, table, facts=facts)

    return write


@pytest.fixture
def gradients_run(
    tmp_path: Path,
) -> Callable[[Mapping[int, Mapping[str, Array]], Array | None], Run]:
    """Write ({step: {layer: gram}}, targets) as a run with per-example gradients."""

    def write(grams: Mapping[int, Mapping[str, Array]], targets: Array | None) -> Run:
        dims = ("example", "class")[: 0 if targets is None else targets.ndim]
        table = [] if targets is None else [LogArray("target", targets, dims)]
        totals = {step: np.sum(list(layers.values()), axis=0) for step, layers in grams.items()}
        records = {
            step: [*_grams(layers), LogArray("gram_total", totals[step], GRAM_DIMS)]
            for step, layers in grams.items()
        }
        return _write(tmp_path / "run", "example_gradients", records, table)

    return write


@pytest.fixture
def planes_run(tmp_path: Path) -> Callable[[str, Mapping[int, Array], str], Run]:
    """Write (name, {step: labels}, digest) as a run with decision planes."""

    def write(name: str, labels: Mapping[int, Array], digest: str) -> Run:
        num_triplets = len(next(iter(labels.values())))
        corners = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 4.0]])
        ranges = np.array([[-0.2, 2.2], [-0.4, 4.4]])
        triplet = np.arange(3 * num_triplets).reshape(-1, 3)
        table = [
            LogArray("triplet", triplet, ("triplet", "image")),
            LogArray("triplet_target", triplet % 2, ("triplet", "image")),
            LogArray(
                "coordinates", np.stack([corners] * num_triplets), ("triplet", "image", "axis")
            ),
            LogArray("extent", np.stack([ranges] * num_triplets), ("triplet", "axis", "end")),
        ]
        dims = ("triplet", "row", "column")
        records = {
            step: [LogArray("labels", values.astype(np.uint8), dims)]
            for step, values in labels.items()
        }
        return _write(tmp_path / name, "decision_planes", records, table, {"digest": digest})

    return write
