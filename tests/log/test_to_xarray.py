"""A run as a tree of xarray: names, coordinates, and what does not fit into one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sonde.log import LogArray, LogWriter, Run, open_run

from .conftest import assert_identical
from .example_run import IDS, STEPS, gram_of


def test_tree_has_names_and_coordinates(run: Run) -> None:
    tree = run.to_xarray()
    assert set(tree.groups) == {
        "/", "/activations", "/activations/train", "/activations/test",
        "/scalars", "/scalars/training",
    }  # fmt: skip
    train = tree["activations/train"].to_dataset()
    assert train["conv1:gram"].dims == ("step", "example", "other_example")
    assert train["step"].values.tolist() == STEPS
    assert train["target"].sel(example=5).item() == 1
    values = train["conv1:gram"].sel(step=10, example=7).values
    assert_identical(values, gram_of(10)[0])
    assert tree["scalars/training"].to_dataset()["loss"].values.tolist() == [0, 5, 10, 15]
    assert tree.attrs["state"] == "finished"


def test_record_without_a_stream_reads_as_nan_in_a_tree(run: Run) -> None:
    late = run.to_xarray()["activations/train"]["late:gram"]
    assert late.notnull().all(("example", "other_example")).values.tolist() == [
        False, False, True, False
    ]  # fmt: skip
    assert_identical(late.sel(step=20).values, gram_of(20))


def test_tree_can_be_restricted(run: Run) -> None:
    tree = run.to_xarray(["activations"], layers=["fc"], steps=[10, 30])
    train = tree["activations/train"].to_dataset()
    assert set(train.data_vars) == {"fc:full", "gram_total"}
    assert train["step"].values.tolist() == [10, 30]
    assert "scalars" not in tree.children


def test_second_size_of_a_dimension_gets_a_name_of_its_own_in_a_tree(run: Run) -> None:
    train = run.to_xarray()["activations/train"].to_dataset()
    assert train["fc:full"].dims == ("step", "example", "feature")
    assert train["head:sketch"].dims == ("step", "example", "feature_2")


def test_tree_names_ragged_streams(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for step in range(3):
        writer.append("m", "s", step, [LogArray("a", np.arange(step), ("n",), "fc")])
    writer.close()
    dataset = open_run(run_path).to_xarray()["m/s"].to_dataset()
    assert dataset.attrs["ragged"] == ["fc:a"]
    assert list(dataset.data_vars) == []


def test_tree_takes_streams_named_like_dimensions(run_path: Path) -> None:
    names = ["step", "example", "target", "feature"]
    writer = LogWriter(run_path, seal=False)
    writer.add_table("s", [LogArray(name, IDS, ("example",)) for name in ("id", "target")])
    arrays = [LogArray(name, np.arange(3), ("example",)) for name in names]
    arrays.append(LogArray("wide", np.zeros((3, 5)), ("step", "feature")))
    for step in range(2):
        writer.append("m", "s", step, arrays)
    writer.close()
    dataset = open_run(run_path).to_xarray()["m/s"].to_dataset()
    assert {f"{name}::data" for name in names} | {"wide"} == set(dataset.data_vars)
    assert dataset["step"].values.tolist() == [0, 1]
    assert dataset["step::data"].values.tolist() == [[0, 1, 2]] * 2


def test_tree_takes_measures_and_sources_of_any_name(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for measure, source in (("", ".."), ("a/b", "."), ("..", "")):
        writer.append(measure, source, 0, [LogArray("a", np.array(1.0), ())])
    writer.close()
    tree = open_run(run_path).to_xarray()
    assert {node.path for node in tree.leaves} == {"/%/%2E%2E", "/a%2Fb/%2E", "/%2E%2E/%"}
