"""Trainings under Accelerate, on one and two processes: what they compute and record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sonde
from sonde.log import Run
from tests.limits import LIMIT_SECONDS

from .conftest import WORKERS, RunRanks

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
pytest.importorskip("accelerate")

IDS = range(10, 32)


@dataclass(frozen=True)
class Trained:
    """What the worker left in a folder."""

    folder: Path
    num_ranks: int

    def run(self, name: str) -> Run:
        return sonde.open_run(self.folder / name)

    def of_rank(self, rank: int) -> dict[str, dict[str, Any]]:
        loaded: dict[str, Any] = json.loads((self.folder / f"rank{rank}.json").read_text())
        return loaded

    @property
    def num_steps(self) -> int:
        # Two epochs; the accumulation ends with the last batch of each.
        return 6 if self.num_ranks == 1 else 4


@pytest.fixture(scope="module", params=[1, 2])
def trained(
    request: pytest.FixtureRequest, run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    folder = tmp_path_factory.mktemp(f"accelerated{request.param}")
    if request.param > 1:
        run_ranks("accelerated.py", folder, num_ranks=request.param)
    else:
        done = subprocess.run(
            [sys.executable, str(WORKERS / "accelerated.py"), str(folder)],
            env={**os.environ, "PYTHONPATH": str(Path(sonde.__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "rank 0 of 1" in done.stdout
    return Trained(folder, request.param)


@pytest.mark.parametrize(
    ("recorded", "alone"),
    [
        ("late", "nothing"),
        ("early", "nothing"),
        ("recorder", "nothing in order"),
        ("bf16", "bf16 nothing"),
        ("resumed", "without sonde"),
    ],
)
def test_training_is_the_same_to_the_last_bit(trained: Trained, recorded: str, alone: str) -> None:
    for rank in range(trained.num_ranks):
        results = trained.of_rank(rank)["results"]
        assert results[recorded] == results[alone]


@pytest.mark.parametrize("name", ["late", "early", "recorder", "bf16", "uninterrupted", "resumed"])
def test_every_step_of_the_optimizer_is_recorded_without_a_warning(
    trained: Trained, name: str
) -> None:
    run = trained.run(name)
    assert run["activations", "training"].steps == list(range(trained.num_steps))
    assert run.steps("output_gradients") == list(range(trained.num_steps))
    for source in ("held", "sharded"):
        assert run["activations", source].steps == list(range(trained.num_steps + 1))
    assert run.ranks == list(range(trained.num_ranks))
    assert run.state == "finished"
    for rank in range(trained.num_ranks):
        assert trained.of_rank(rank)["warned"][name] == []


def test_a_step_holds_all_accumulated_micro_batches_by_id(trained: Trained) -> None:
    log = trained.run("recorder")["activations", "training"]
    first = list(IDS[: 8 * trained.num_ranks])
    ids = log.ids_at(0)
    assert ids is not None
    assert ids.tolist() == first
    assert log.attributes(0)["micro_batches"] == [4, 4]
    seen = {i for step in log.steps for i in np.asarray(log.ids_at(step)).tolist()}
    assert seen == set(IDS)


def test_copies_that_fill_the_last_batch_are_marked(trained: Trained) -> None:
    log = trained.run("recorder")["activations", "training"]
    last = trained.num_steps // 2 - 1
    ids = log.ids_at(last)
    assert ids is not None
    if trained.num_ranks == 1:
        assert "is_duplicate" not in log.fields()
        assert ids.tolist() == [26, 27, 28, 29, 30, 31]
        return
    assert ids.tolist() == [10, 11, 26, 27, 28, 29, 30, 31]
    assert log.array("is_duplicate", last).tolist() == [True, True, *[False] * 6]
    assert log.steps_of("is_duplicate") == [last, 2 * last + 1]


def test_gradients_are_those_of_single_examples(trained: Trained) -> None:
    log = trained.run("recorder").output_gradients
    logits = log.features("head", 0)
    # Softmax minus one-hot: neither accumulation nor the size of the batch is left in it.
    np.testing.assert_allclose(logits.sum(1), 0, atol=1e-6)
    ids = log.ids_at(0)
    assert ids is not None
    classes = (ids - IDS[0]) % 3
    assert ((logits < 0) == np.eye(3, dtype=bool)[classes]).all()
    assert log.attributes(0)["factors"] == pytest.approx([8.0, 8.0])
    assert log.attributes(0)["scale"].startswith("gradient of one example's loss")


def test_a_sharded_probe_is_the_whole_one(trained: Trained) -> None:
    run = trained.run("late")
    for layer in run["activations", "held"].layers:
        np.testing.assert_allclose(
            run["activations", "sharded"].gram(-1, layer),
            run["activations", "held"].gram(-1, layer),
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_training_resumed_in_the_middle_of_an_epoch_has_the_log_of_one_that_was_not(
    trained: Trained,
) -> None:
    one, other = trained.run("uninterrupted"), trained.run("resumed")
    assert len(other.attempts) == 2 * trained.num_ranks
    assert one.measures == other.measures
    for measure in one.measures:
        for source in one.sources(measure):
            log, other_log = one[measure, source], other[measure, source]
            assert (measure, log.steps) == (measure, other_log.steps)
            for step in log.steps:
                assert log.describe(step) == other_log.describe(step)
                for layer, field in log.describe(step):
                    np.testing.assert_array_equal(
                        log.array(field, step, layer), other_log.array(field, step, layer)
                    )


def test_a_checkpoint_without_a_recorder_loads_and_is_named(trained: Trained) -> None:
    for rank in range(trained.num_ranks):
        warned = trained.of_rank(rank)["warned"]["without a state"]
        assert len([text for text in warned if "was written without a recorder" in text]) == 1
    assert {path.name for path in (trained.folder / "saved").glob("sonde*")} == {
        f"sonde-rank{rank}.json" for rank in range(trained.num_ranks)
    }


def test_the_tensorboard_of_the_user_is_shown_what_there_is(trained: Trained) -> None:
    reader = event_accumulator.EventAccumulator(str(trained.folder / "logs" / "training"))
    reader.Reload()
    assert set(reader.Tags()["scalars"]) >= {"sonde/loss", "sonde/recorded_bytes"}
    sizes = [event.value for event in reader.Scalars("sonde/recorded_bytes")]
    assert len(sizes) == trained.num_steps
    assert sizes == sorted(sizes)
