"""Families: which runs a path or glob opens, and how their configuration tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sonde
from sonde.exceptions import InvalidInputError, RunNotFoundError
from sonde.log import Family, LogArray, LogWriter
from sonde.log.format.files import write_run_file

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a run with a configuration, and predictions of which a share is right."""

    def run(name: str, config: Any = None, num_right: int | None = None) -> Path:
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        write_run_file(path, {} if config is None else {"config": config})
        writer = LogWriter(path, seal=False)
        writer.append("scalars", "training", 3, [LogArray("loss", np.array(0.5), ())])
        if num_right is not None:
            targets = np.arange(8) % 2
            ids = LogArray("id", np.arange(8), ("example",))
            writer.add_table("test", [ids, LogArray("target", targets, ("example",))])
            said = np.where(np.arange(8) < num_right, targets, 1 - targets)
            logits = LogArray("logits", np.eye(2)[said], ("example", "class"))
            writer.append("predictions", "test", 7, [logits])
        writer.close()
        return path

    return run


@pytest.fixture
def family(write: Write, tmp_path: Path) -> Family:
    for seed in (0, 1):
        for width in (8, 64):
            write(f"w{width}s{seed}", {"width": width, "seed": seed, "sgd": {"lr": 0.1}})
    return sonde.open_runs(tmp_path / "runs")


def names(runs: Mapping[Any, Family]) -> dict[Any, list[str]]:
    return {value: family.names for value, family in runs.items()}


@pytest.mark.parametrize("pattern", ["runs", "runs/*", "**/*s[01]", ["runs/w8*", "runs"]])
def test_folders_globs_and_lists_open_each_run_once(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sorted(sonde.open_runs(pattern).names) == ["w64s0", "w64s1", "w8s0", "w8s1"]


def test_a_run_whose_name_looks_like_a_glob_is_opened(write: Write) -> None:
    assert sonde.open_runs(write("a[1]")).names == ["a[1]"]


def test_a_glob_that_fits_no_run_says_what_it_fits(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(RunNotFoundError, match=r"fits 1 files or folders, none of them a run"):
        sonde.open_runs(tmp_path / "*")


@pytest.mark.parametrize(("path", "problem"), [("none", "does not exist"), ("", "holds no run")])
def test_a_path_without_a_run_is_refused(tmp_path: Path, path: str, problem: str) -> None:
    with pytest.raises(RunNotFoundError, match=problem):
        sonde.open_runs(tmp_path / path)


def test_no_path_at_all_is_refused() -> None:
    with pytest.raises(RunNotFoundError, match="no paths were given"):
        sonde.open_runs([])


def test_what_a_glob_fits_beside_runs_is_named(family: Family, tmp_path: Path) -> None:
    (tmp_path / "runs" / "notes.txt").write_text("")
    with pytest.warns(RuntimeWarning, match=r"fits 1 that hold no run, .*left out: .*notes\.txt"):
        assert len(sonde.open_runs(f"{tmp_path}/runs/*")) == 4


def test_it_is_a_sequence_of_runs(family: Family) -> None:
    assert [run.name for run in family] == family.names
    assert family[1] is family["w64s1"]
    assert isinstance(family[:2], Family)
    assert len(family[:2]) == 2


def test_an_unknown_name_lists_near_ones(family: Family) -> None:
    with pytest.raises(RunNotFoundError, match=r"'w8s3'; did you mean 'w8s1'\?; runs: w64s0"):
        family["w8s3"]


def test_keys_of_nested_mappings_are_joined_by_dots(family: Family) -> None:
    assert (family.keys, family.varying) == (["width", "seed", "sgd.lr"], ["width", "seed"])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"width": 64}, ["w64s0", "w64s1"]),
        ({"width": 64.0, "seed": 1}, ["w64s1"]),
        ({"width": [8, 64], "seed": {0}}, ["w64s0", "w8s0"]),
        ({"width": lambda width: width < 10}, ["w8s0", "w8s1"]),
        ({"width": 5}, []),
    ],
)
def test_where_chooses_by_values(family: Family, wanted: Any, expected: list[str]) -> None:
    assert family.where(**wanted).names == expected


def test_where_takes_dotted_keys_as_a_mapping(family: Family) -> None:
    assert len(family.where({"sgd.lr": 0.1}, width=8)) == 2


def test_by_groups_by_one_key_or_several(family: Family) -> None:
    assert names(family.by("width")) == {8: ["w8s0", "w8s1"], 64: ["w64s0", "w64s1"]}
    assert list(family.by("seed", "width")) == [(0, 8), (0, 64), (1, 8), (1, 64)]


@pytest.mark.parametrize("group", [lambda f: f.by("width"), lambda f: f.where(width=[8, 64])])
def test_runs_that_lack_a_key_are_named(
    family: Family, write: Write, group: Callable[[Family], Any]
) -> None:
    everything = sonde.open_runs([*(run.path for run in family), write("other", {"depth": 3})])
    with pytest.warns(RuntimeWarning, match="1 without the configuration key 'width': other"):
        left = group(everything)
    kept = left.values() if isinstance(left, dict) else [left]
    assert sum(len(runs) for runs in kept) == 4


def test_a_key_that_no_run_has_lists_all_keys(family: Family) -> None:
    with pytest.raises(InvalidInputError, match=r"'widht'; did you mean 'width'\?; keys: width, s"):
        family.by("widht")


def test_grouping_by_nothing_is_refused(family: Family) -> None:
    with pytest.raises(InvalidInputError, match="no key to group by was given"):
        family.by()


@pytest.mark.parametrize("config", [None, {}])
def test_a_run_without_configuration_has_no_keys(write: Write, config: Any) -> None:
    assert sonde.open_runs(write("plain", config)).keys == []


def test_values_of_several_kinds_are_grouped_and_sorted(write: Write) -> None:
    values = ["b", 2, None, True, 1, [3, 1], {"a": 1}, float("nan"), 0.5, float("nan")]
    paths = [write(str(at), {"key": value, "at": at}) for at, value in enumerate(values)]
    family = sonde.open_runs(paths)
    with pytest.warns(RuntimeWarning, match="1 without the configuration key 'key': 6"):
        found = list(family.by("key"))
    assert repr(found) == repr([None, 0.5, True, 2, float("nan"), "b", (3, 1)])


def test_the_table_holds_configuration_steps_measures_and_accuracy(write: Write) -> None:
    paths = [write("a", {"width": 8, "state": "x"}, num_right=6), write("b", {"width": 9})]
    table = sonde.open_runs(paths).table()
    assert table.index.tolist() == ["a", "b"]
    assert table.loc["a"].drop("path").to_dict() == {
        "width": 8,
        "config.state": "x",
        "state": "finished",
        "num_steps": 2,
        "last_step": 7,
        "measures": "scalars, predictions",
        "accuracy": 0.75,
    }
    assert np.isnan(table.loc["b", "accuracy"])


def test_a_notebook_shows_the_table_and_escapes_markup(write: Write) -> None:
    text = sonde.open_runs(write("a", {"<b>": "<script>"}))._repr_html_()
    assert "&lt;script&gt;" in text
    assert "<script>" not in text


def test_runs_of_one_name_are_told_apart_by_their_path(write: Write) -> None:
    paths = [write("x/run"), write("y/run")]
    assert sonde.open_runs(paths).names == [str(path) for path in paths]


def test_its_text_says_what_differs(family: Family) -> None:
    assert repr(family) == "<Family of 4: w64s0, w64s1, w8s0, w8s1; width, seed differ>"
