"""What a reader sees of one measure: steps, layers, arrays, tables, and messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sonde.exceptions import (
    InvalidInputError,
    LayerNotFoundError,
    MeasureNotFoundError,
    StepNotFoundError,
)
from sonde.log import LogArray, LogWriter, Run, open_run
from sonde.log.sealing.seal import seal_run

from .conftest import assert_identical
from .example_run import STEPS, features_of, gram_of


def test_measure_lists_what_it_holds(run: Run) -> None:
    log = run["activations", "train"]
    assert log.steps == STEPS
    assert log.layers == ["conv1", "fc", "head", "late"]
    assert log.fields("fc") == ["full"]
    assert log.fields() == ["gram_total"]
    assert log.attributes(20) == {"batch": 2}
    # Per record 3·3 + 3·4 + 3·2 + 3·3 float32, and one layer more of 3·3.
    assert log.num_bytes == 4 * (4 * (9 + 12 + 6 + 9) + 9)
    described = log.describe(20)
    keys = [("conv1", "gram"), ("fc", "full"), ("head", "sketch"), (None, "gram_total")]
    assert list(described) == [*keys, ("late", "gram")]
    assert described["fc", "full"].dims == ("example", "feature")
    assert described["fc", "full"].shape == (3, 4)


def test_step_may_count_from_the_end(run: Run) -> None:
    log = run.scalars
    assert log.array("loss").item() == 15
    assert [log.array("loss", step).item() for step in (-1, -2, -4, 0, 20)] == [15, 10, 0, 0, 10]
    assert log.resolve_step(-3) == 10


def test_gram_comes_from_whichever_store_was_kept(run: Run) -> None:
    log = run["activations", "train"]
    features = features_of(10).astype(np.float64)
    assert_identical(log.gram(10, "conv1"), gram_of(10).astype(np.float64))
    assert_identical(log.gram(10), 2 * gram_of(10).astype(np.float64))
    # Rounding in float64 is some 1e-15 of these values of about 1.
    np.testing.assert_allclose(log.gram(10, "fc"), features @ features.T, atol=1e-12)
    np.testing.assert_allclose(
        log["head"].gram(10), features[:, :2] @ features[:, :2].T, atol=1e-12
    )


def test_features_are_those_that_were_stored(run: Run) -> None:
    log = run["activations", "train"]
    assert_identical(log.features("fc", 10), features_of(10))
    assert_identical(log["head"].features(), features_of(30)[:, :2])
    assert_identical(log["fc"].array("full", 20), features_of(20))


def test_layer_knows_its_steps_and_fields(run: Run) -> None:
    log = run["activations", "train"]
    assert log["late"].steps == [20]
    assert log["conv1"].steps == STEPS
    assert log["head"].fields == ["sketch"]


def test_stack_goes_across_files_in_order_of_steps(run: Run) -> None:
    log = run["activations", "train"]
    assert_identical(log.stack("gram", layer="conv1"), np.stack([gram_of(s) for s in STEPS]))
    assert_identical(
        log.stack("gram", [30, 0, -3], "conv1"), np.stack([gram_of(s) for s in (30, 0, 10)])
    )
    assert run.scalars.stack("loss").tolist() == [0, 5, 10, 15]


def test_stack_takes_the_steps_that_have_the_array(run: Run) -> None:
    log = run["activations", "train"]
    assert_identical(log.stack("gram", layer="late"), gram_of(20)[np.newaxis])


def test_tables_belong_to_their_source(run: Run) -> None:
    train, test = run["activations", "train"], run["activations", "test"]
    assert train.ids is not None
    assert test.ids is not None
    assert train.targets is not None
    assert train.ids.tolist() == [7, 5, 9]
    assert test.ids.tolist() == [8, 6, 10]
    assert train.targets.tolist() == [0, 1, 0]
    assert (test.targets, run.scalars.ids) == (None, None)


def test_table_written_again_replaces_the_one_before(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for value in (1, 2):
        writer.add_table("probe", [LogArray("id", np.full(3, value), ("example",))])
    writer.append("m", "probe", 0, [])
    writer.close()
    for _ in range(2):
        assert open_run(run_path).m.table("id").tolist() == [2, 2, 2]
        seal_run(run_path)


def test_step_recorded_twice_counts_as_it_was_last(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for value in (1, 2):
        writer.append("m", "s", 0, [LogArray("a", np.array(value), ())])
    writer.close()
    for _ in range(2):
        assert open_run(run_path).m.stack("a").tolist() == [2]
        seal_run(run_path)


def test_steps_recorded_out_of_order_are_sorted(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for step in (20, 0, 10):
        writer.append("m", "s", step, [LogArray("a", np.array(step), ())])
    writer.close()
    for _ in range(2):
        assert open_run(run_path).m.steps == [0, 10, 20]
        assert open_run(run_path).m.stack("a").tolist() == [0, 10, 20]
        seal_run(run_path)


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (
            lambda run: run["gradients"],
            MeasureNotFoundError,
            "run 'seed0' has no records of 'gradients'; it has: activations, scalars",
        ),
        (
            lambda run: run.gradients,
            AttributeError,
            "run 'seed0' has no records of 'gradients'; it has: activations, scalars",
        ),
        (
            lambda run: run.activations,
            MeasureNotFoundError,
            r"'activations' of run 'seed0' has several sources; name one, as in "
            r"run\['activations', 'train'\]: train, test",
        ),
        (
            lambda run: run["activations", "val"],
            KeyError,
            "'activations' of run 'seed0' has no source 'val'; it has: train, test",
        ),
        (
            lambda run: run.steps("activations", "val"),
            MeasureNotFoundError,
            "has no source 'val'; it has: train, test",
        ),
        (
            lambda run: run.to_xarray(["gradients"]),
            MeasureNotFoundError,
            "has no records of 'gradients'; it has: activations, scalars",
        ),
        (
            lambda run: run.scalars.array("loss", 15),
            StepNotFoundError,
            "step 15 of 'scalars' was not recorded in run 'seed0'; recorded steps: 0, 10, 20, 30",
        ),
        (
            lambda run: run.scalars.attributes(-5),
            StepNotFoundError,
            "step -5 of 'scalars' was not recorded",
        ),
        (
            lambda run: run["activations", "train"]["fc9"],
            LayerNotFoundError,
            "layer 'fc9' of 'activations' was not recorded in run 'seed0'; "
            "recorded layers: conv1, fc, head, late",
        ),
        (
            lambda run: run["activations", "train"].array("gram", 0, "fc9"),
            LayerNotFoundError,
            "layer 'fc9' of 'activations' was not recorded",
        ),
        (
            lambda run: run["activations", "train"].array("full", 0, "conv1"),
            LayerNotFoundError,
            "'activations' of run 'seed0' has no 'full' for layer 'conv1' at step 0; "
            "there is: gram",
        ),
        (
            lambda run: run["activations", "train"]["late"].gram(0),
            LayerNotFoundError,
            "has no 'gram' for layer 'late' at step 0; there is: nothing",
        ),
        (
            lambda run: run["activations", "train"].stack("gram", [20, 0], "late"),
            LayerNotFoundError,
            "has no 'gram' for layer 'late' at step 0; there is: nothing",
        ),
        (
            lambda run: run.scalars.stack("accuracy"),
            LayerNotFoundError,
            "'scalars' of run 'seed0' has no 'accuracy' for the record at step 0; there is: loss",
        ),
        (
            lambda run: run.scalars.gram(),
            LayerNotFoundError,
            "has no 'gram_total' for the record at step 30; there is: loss",
        ),
        (
            lambda run: run["activations", "train"].features("conv1"),
            LayerNotFoundError,
            r"'activations' kept only gram of layer 'conv1'; record it with store=Full\(\) or "
            r"Sketch\(\) to have features",
        ),
        (
            lambda run: run["activations", "train"].table("triplet"),
            InvalidInputError,
            "source 'train' has no table 'triplet'; it has: id, target",
        ),
        (
            lambda run: run.scalars.table("id"),
            InvalidInputError,
            "source 'training' has no table 'id'; it has: none",
        ),
    ],
)
def test_message_says_what_there_is(
    run: Run, ask: Callable[[Run], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ask(run)


def test_message_shortens_a_long_listing(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for step in range(20):
        writer.append("m", "s", step, [])
    writer.close()
    with pytest.raises(
        StepNotFoundError, match=r"steps: 0, 1, 2, 3, 4, 5, 6, 7, 8, … \(9 more\), 18, 19$"
    ):
        open_run(run_path).m.resolve_step(20)
