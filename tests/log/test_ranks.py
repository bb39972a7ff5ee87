"""Ranks: what several processes recorded is read as one, by step and example id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sonde import analysis
from sonde.exceptions import InvalidInputError, LayerNotFoundError, MismatchError
from sonde.log import LogArray, LogWriter, Run, open_run
from sonde.log.sealing.seal import seal_run

from .conftest import copies, new_run

Array = npt.NDArray[Any]
STEPS = (0, 10, 20)


def rows(ids: Sequence[int], step: int, layer: str = "fc") -> Array:
    """Return what each example, whatever rank it is on, has at a step: [examples, 3]."""
    seeds = [(i, step, len(layer)) for i in ids]
    return np.array([np.random.default_rng(seed).normal(size=3) for seed in seeds]).reshape(-1, 3)


def write_rank(
    path: Path,
    rank: int,
    ids: Sequence[int],
    steps: Sequence[int] = STEPS,
    *,
    attempt: int = 0,
    about: Mapping[str, Any] | None = None,
    table: Mapping[str, Any] | None = None,
    is_live: bool = False,
) -> LogWriter:
    """Record the given examples at each step, as one rank."""
    writer = LogWriter(path, attempt=attempt, rank=rank, about=about, seal=False)
    named = [
        LogArray("id", np.array(ids, np.int64), ("example",)),
        LogArray("target", 7 * np.array(ids, np.int64), ("example",)),
        LogArray("class_weight", np.arange(4.0), ("class",)),
    ]
    writer.add_table("probe", named, table)
    for step in steps:
        record(writer, ids, step)
    if not is_live:
        writer.close()
    return writer


def record(writer: LogWriter, ids: Sequence[int], step: int) -> None:
    arrays = [
        LogArray("full", rows(ids, step, layer), ("example", "feature"), layer)
        for layer in ("fc", "head")
    ]
    gram = rows(ids, step) @ rows(ids, step).T
    arrays += [
        LogArray("transposed", rows(ids, step).T, ("feature", "example")),
        LogArray("gram", gram, ("example", "other_example"), "kernel"),
        LogArray("time", np.array(float(step)), ()),
    ]
    assert writer.append("activations", "probe", step, arrays)
    writer.flush()


def findings(run: Run) -> list[tuple[str, str]]:
    return [(note["event"], note["reason"]) for note in run.notes]


def assert_holds(run: Run, ids: Sequence[int], steps: Sequence[int] = STEPS) -> None:
    log = run.activations
    assert log.steps == list(steps)
    assert log.ids is not None
    assert log.ids.tolist() == list(ids)
    for step in steps:
        assert log.array("full", step, "fc").tobytes() == rows(ids, step).tobytes()
        assert log.array("transposed", step).tolist() == rows(ids, step).T.tolist()
        assert log.describe(step)["fc", "full"].shape == (len(ids), 3)
    assert log.stack("full", steps, "head").tolist() == [
        rows(ids, step, "head").tolist() for step in steps
    ]
    assert log.targets is not None
    assert log.targets.tolist() == [7 * i for i in ids]
    assert log.table("class_weight").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("are_sealed", [False, True])
def test_examples_of_all_ranks_are_put_together_in_order_of_their_ids(
    run_path: Path, are_sealed: bool
) -> None:
    for rank in range(3):
        write_rank(run_path, rank, range(rank, 10, 3), about={"world_size": 3})
    if are_sealed:
        assert len(seal_run(run_path)) == 3
    run = open_run(run_path)
    assert_holds(run, range(10))
    assert findings(run) == []
    assert run.activations.ranks_at(10) == [0, 1, 2]


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.lists(st.integers(0, 12), unique=True, max_size=6), min_size=2, max_size=4))
def test_any_division_into_ranks_is_joined(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]]
) -> None:
    if all(part == parts[0] for part in parts):
        parts[0] = [*parts[0], 99]
    path = new_run(tmp_path_factory.mktemp("ranks") / "run")
    for rank, ids in enumerate(parts):
        write_rank(path, rank, ids)
    assert_holds(open_run(path), sorted({i for part in parts for i in part}))


def test_an_example_that_pads_the_last_batch_counts_once(run_path: Path) -> None:
    write_rank(run_path, 0, [0, 2, 4])
    write_rank(run_path, 1, [1, 3, 0])
    assert_holds(open_run(run_path), range(5))


def test_cka_of_joined_features_is_that_of_one_process(tmp_path: Path) -> None:
    whole, parts = new_run(tmp_path / "whole"), new_run(tmp_path / "parts")
    write_rank(whole, 0, range(12))
    for rank in (0, 1):
        write_rank(parts, rank, range(rank, 12, 2))
    one, both = (
        analysis.cka(open_run(path), layers=["fc", "head"], step=10) for path in (whole, parts)
    )
    assert both.values.tolist() == one.values.tolist()
    assert np.isfinite(one.values).all()


def test_tree_holds_all_examples_and_names_what_only_ranks_have(run_path: Path) -> None:
    for rank in (0, 1):
        write_rank(run_path, rank, range(rank, 6, 2))
    dataset = open_run(run_path).to_xarray()["activations/probe"].to_dataset()
    assert dataset["fc:full"].dims == ("step", "example", "feature")
    assert dataset["example"].values.tolist() == list(range(6))
    assert dataset["fc:full"].sel(step=10).values.tolist() == rows(range(6), 10).tolist()
    assert dataset.attrs["by_rank"] == ["kernel:gram"]
    assert "kernel:gram" not in dataset


def test_gram_matrices_of_different_examples_are_not_joined(run_path: Path) -> None:
    for rank in (0, 1):
        write_rank(run_path, rank, range(rank, 6, 2))
    run = open_run(run_path)
    with pytest.raises(
        MismatchError,
        match=r"'activations' of run 'seed0' holds products of examples of one rank each "
        r"\(ranks 0, 1\), none between ranks; read one by run\.rank\(…\)",
    ):
        run.activations.gram(10, "kernel")
    own = rows([1, 3, 5], 10)
    assert run.rank(1).activations.gram(10, "kernel").tolist() == (own @ own.T).tolist()
    assert run.activations.gram(10, "fc").shape == (6, 6)


def test_one_rank_is_read_by_itself(run_path: Path) -> None:
    for rank in (0, 1):
        write_rank(run_path, rank, range(rank, 6, 2))
    view = open_run(run_path).rank(1)
    assert_holds(view, [1, 3, 5])
    assert view.ranks == [1]
    assert findings(view) == []
    with pytest.raises(InvalidInputError, match=r"rank 2 recorded nothing in run 'seed0'; .*0, 1"):
        open_run(run_path).rank(2)


def test_ranks_of_the_same_examples_are_read_once_and_stand_in_for_each_other(
    run_path: Path,
) -> None:
    table = {"input_digest": "a"}
    write_rank(run_path, 0, [3, 1, 2], [0, 20], table=table)
    write_rank(run_path, 1, [3, 1, 2], [0, 10], table=table)
    run = open_run(run_path)
    assert_holds(run, [3, 1, 2])
    assert [run.activations.ranks_at(step) for step in STEPS] == [[0], [1], [0]]
    same = "rank 1 recorded the same examples; rank 0 is read, run.rank(…) reads the others"
    assert findings(run) == [("other ranks", same)]


def test_other_inputs_under_the_same_ids_are_not_mixed(run_path: Path) -> None:
    write_rank(run_path, 0, [0, 1], [0, 20], table={"input_digest": "a"})
    write_rank(run_path, 1, [0, 1], table={"input_digest": "b"})
    run = open_run(run_path)
    assert run.activations.steps == [0, 20]
    assert findings(run)[0][1].startswith("rank 1 recorded other inputs under the same ids;")


def test_values_without_examples_are_those_of_the_lowest_rank(run_path: Path) -> None:
    for rank in (2, 1):
        writer = LogWriter(run_path, rank=rank, seal=False)
        writer.append("m", "s", rank, [LogArray("a", np.array(rank), ())])
        writer.close()
    run = open_run(run_path)
    assert run.ranks == [1, 2]
    assert run.m.stack("a").tolist() == [1]
    reason = "rank 2 recorded values of its own; rank 1 is read, run.rank(…) reads the others"
    assert findings(run) == [("other ranks", reason)]


def test_a_step_that_a_rank_lacks_is_left_out_and_named(run_path: Path) -> None:
    write_rank(run_path, 0, [0, 2])
    write_rank(run_path, 1, [1, 3], [0])
    run = open_run(run_path)
    assert_holds(run, range(4), [0])
    (note,) = run.notes
    assert (note["event"], note["measure"], note["steps"]) == (
        "incomplete",
        "activations",
        [10, 20],
    )
    assert note["reason"].startswith("rank 1 did not record what rank 0 did; these steps are left")
    assert run.rank(0).activations.steps == list(STEPS)


def test_a_step_is_seen_once_every_rank_has_recorded_it(run_path: Path) -> None:
    first = write_rank(run_path, 0, [0, 2], [0, 10], is_live=True)
    second = write_rank(run_path, 1, [1, 3], [0], is_live=True)
    run = open_run(run_path)
    assert run.steps() == [0]
    assert findings(run) == []  # Rank 1 is on its way.
    record(second, [1, 3], 10)
    run.refresh()
    assert_holds(run, range(4), [0, 10])
    first.close()
    second.close()


def test_a_rank_that_recorded_nothing_is_named(run_path: Path) -> None:
    for rank in (0, 2):
        write_rank(run_path, rank, [rank], about={"world_size": 4})
    run = open_run(run_path)
    assert_holds(run, [0, 2])
    (note,) = run.notes
    assert (note["event"], note["ranks"]) == ("missing ranks", [1, 3])
    assert note["reason"].startswith("rank 1, 3 of 4 recorded nothing in attempt 0; if each rank")


def test_a_rank_whose_ids_are_damaged_is_left_out(run_path: Path) -> None:
    for rank in (0, 1):
        write_rank(run_path, rank, [rank, rank + 2])
    journal = run_path / "attempt0-rank1" / "000000000000.journal"
    content = journal.read_bytes()
    ids = np.array([1, 3]).tobytes()
    assert content.count(ids) == 1
    journal.write_bytes(content.replace(ids, np.array([1, 2]).tobytes()))
    run = open_run(run_path)
    assert_holds(run, [0, 2])
    assert len(run.damage) == 1
    assert "rank 1 does not say which examples it recorded; it is left out" in str(run.notes)


def test_a_layer_that_one_rank_lacks_is_an_error_that_names_it(run_path: Path) -> None:
    write_rank(run_path, 0, [0])
    writer = write_rank(run_path, 1, [1], [0, 20], is_live=True)
    writer.append("activations", "probe", 10, [LogArray("time", np.array(1.0), ())])
    writer.close()
    log = open_run(run_path).activations
    assert log.steps_of("full", "fc") == [0, 20]
    with pytest.raises(
        LayerNotFoundError, match="no 'full' for layer 'fc' at step 10 of rank 1; there is: nothing"
    ):
        log.array("full", 10, "fc")


def test_live_examples_are_joined_step_by_step(run_path: Path) -> None:
    batches = {0: ([5, 1], [2]), 10: ([7], [0, 3])}
    for rank in (0, 1):
        writer = LogWriter(run_path, rank=rank, seal=False)
        for step, batch in batches.items():
            named = LogArray("id", np.array(batch[rank]), ("example",))
            values = LogArray("full", rows(batch[rank], step), ("example", "feature"), "fc")
            writer.append("activations", "training", step, [named, values])
        writer.close()
    log = open_run(run_path).activations
    assert log.ids is None
    for step, ids in ((0, [1, 2, 5]), (10, [0, 3, 7])):
        at = log.ids_at(step)
        assert at is not None
        assert at.tolist() == ids
        assert log.array("full", step, "fc").tolist() == rows(ids, step).tolist()


def test_a_resume_on_fewer_ranks_supersedes_all_of_them(run_path: Path) -> None:
    for rank in range(4):
        write_rank(run_path, rank, range(rank, 8, 4))
    for rank in range(2):
        about = {"resume_step": 11, "world_size": 2}
        write_rank(run_path, rank, range(rank, 8, 2), [20, 30], attempt=1, about=about)
    run = open_run(run_path)
    assert_holds(run, range(8), [0, 10, 20, 30])
    assert [run.activations.ranks_at(step) for step in (10, 20)] == [[0, 1, 2, 3], [0, 1]]


def test_what_a_rank_recorded_before_is_superseded_by_an_attempt_without_it(run_path: Path) -> None:
    for rank in range(2):
        write_rank(run_path, rank, range(rank, 4, 2), STEPS[: 3 - rank])
    write_rank(run_path, 0, range(4), [20], attempt=1, about={"resume_step": 11})
    run = open_run(run_path)
    assert run.rank(1).activations.steps == [0, 10]
    assert_holds(run, range(4))
    # That rank 1 lacked step 20 is of no interest any more.
    assert findings(run) == []


def test_an_earlier_attempt_is_read_in_the_order_of_the_latest(run_path: Path) -> None:
    for rank in range(2):
        write_rank(run_path, rank, range(rank, 6, 2), [0, 10])
    order = [4, 0, 5, 1, 3, 2]
    write_rank(run_path, 0, order, [20], attempt=1, about={"resume_step": 11})
    assert_holds(open_run(run_path), order)


def test_an_earlier_attempt_of_other_examples_is_not_mixed_in(run_path: Path) -> None:
    write_rank(run_path, 0, [0, 1, 2], [0])
    write_rank(run_path, 0, [0, 1, 9], [10], attempt=1, about={"resume_step": 1})
    log = open_run(run_path).activations
    with pytest.raises(
        MismatchError, match=r"step 0 of .* has 3 examples, others than the 3 .*it lacks \[9\]"
    ):
        log.array("full", 0, "fc")
    assert log.array("full", 10, "fc").tolist() == rows([0, 1, 9], 10).tolist()


def test_resumed_three_times_on_four_ranks_each_step_is_there_once(run_path: Path) -> None:
    attempts = [
        (0, range(0, 60, 5)),
        (31, range(35, 80, 5)),
        (51, range(55, 90, 5)),
        (71, [75, 95]),
    ]
    for attempt, (resume_step, steps) in enumerate(attempts):
        for rank in range(4):
            about = {"resume_step": resume_step, "world_size": 4}
            write_rank(run_path, rank, range(rank, 8, 4), steps, attempt=attempt, about=about)
    seal_run(run_path)
    run = open_run(run_path)
    expected = [*range(0, 31, 5), *range(35, 51, 5), *range(55, 71, 5), 75, 95]
    assert_holds(run, range(8), expected)
    for rank in range(4):
        assert run.rank(rank).activations.steps == expected
    assert Counter(copies(run_path).values()) == {1: sum(4 * len(steps) for _, steps in attempts)}
    assert findings(run) == []
