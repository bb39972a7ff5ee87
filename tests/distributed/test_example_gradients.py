"""Per-example gradients of a training on several processes are those of one process.

The worker accumulates gradients over two micro-batches, under DistributedDataParallel and with
sharded parameters (FSDP2).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sonde
from sonde.hooks.gradients.compute import example_gradients
from sonde.hooks.gradients.result import ExampleGradientResult
from sonde.log import Run

from .conftest import RunRanks
from .launches import Trained, assert_same_training
from .workers import example_gradients as worker

STEPS = list(range(worker.NUM_STEPS))
STEP_SIZE = worker.BATCH_SIZE * worker.NUM_ACCUMULATED


@pytest.fixture(scope="module")
def trained(
    num_ranks: int, run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    folder = tmp_path_factory.mktemp(f"gradients{num_ranks}")
    run_ranks("example_gradients.py", folder, num_ranks=num_ranks)
    return Trained(folder, num_ranks)


@pytest.fixture(scope="module")
def alone() -> ExampleGradientResult:
    """The gradients of all examples, before the model is trained, in one process."""
    model = worker.build("one process")
    return example_gradients(model, F.cross_entropy, *worker.data(), store=sonde.Gram())


def rows_of(rank: int, step: int, num_ranks: int) -> list[int]:
    """The examples that a rank trains on in a step, over all micro-batches."""
    every = torch.arange(STEP_SIZE) + step * STEP_SIZE
    parts = [part.chunk(num_ranks)[rank] for part in every.split(worker.BATCH_SIZE)]
    return [int(row) for row in torch.cat(parts)]


def coverage(run: Run, source: str) -> list[dict[str, str]]:
    """How parameters are covered, on every rank."""
    notes = [note for note in run.notes if note["event"] == "coverage"]
    return [note["parameters"] for note in notes if note["source"] == source]


kinds = pytest.mark.parametrize("kind", worker.KINDS)


@kinds
@pytest.mark.parametrize("recorded", worker.RECORDED)
def test_training_is_the_same_to_the_last_bit(trained: Trained, kind: str, recorded: str) -> None:
    assert_same_training(trained, kind, recorded)


@kinds
@pytest.mark.parametrize("recorded", [name for name in worker.RECORDED if name != "wrong"])
def test_every_parameter_is_covered(trained: Trained, kind: str, recorded: str) -> None:
    assert all(result["warned"] == [] for result in trained.results(kind, recorded))
    names = [name for name, _ in worker.build("one process").named_parameters()]
    source = "probe" if "probe" in recorded else "training"
    covered = coverage(trained.run(kind, recorded), source)
    # A sharded probe is recorded by rank 0 alone.
    assert len(covered) == (1 if recorded == "sketched probe" else trained.num_ranks)
    for parameters in covered:
        assert sorted(parameters) == sorted(names)
        assert parameters.pop("scale") == "frozen"
        assert set(parameters.values()) == {"exact"}


@kinds
def test_each_rank_records_the_gradients_of_its_rows(
    trained: Trained, alone: ExampleGradientResult, kind: str
) -> None:
    run = trained.run(kind, "gram")
    for rank in range(trained.num_ranks):
        log = run.rank(rank).example_gradients
        assert log.steps == STEPS
        for step in STEPS:
            ids = log.ids_at(step)
            assert ids is not None
            assert ids.tolist() == rows_of(rank, step, trained.num_ranks)
        rows = rows_of(rank, 0, trained.num_ranks)
        assert alone.total is not None
        np.testing.assert_allclose(log.gram(0), alone.total[rows][:, rows], rtol=1e-3, atol=1e-6)
        for layer in log.layers:
            expected = alone.layers[layer][rows][:, rows]
            np.testing.assert_allclose(log.gram(0, layer), expected, rtol=1e-3, atol=1e-6)


@kinds
def test_norms_of_all_ranks_are_joined_by_id(
    trained: Trained, alone: ExampleGradientResult, kind: str
) -> None:
    log = trained.run(kind, "gram").example_gradients
    ids = log.ids_at(0)
    assert ids is not None
    assert ids.tolist() == list(range(STEP_SIZE))
    np.testing.assert_allclose(log.array("norm_total", 0), alone.norms[:STEP_SIZE], rtol=1e-4)
    for layer, norms in alone.layer_norms.items():
        actual = log.array("norm", 0, layer)
        np.testing.assert_allclose(actual, norms[:STEP_SIZE], rtol=1e-4)


@kinds
def test_their_sum_is_held_against_the_gradients_of_each_rank(trained: Trained, kind: str) -> None:
    parameters = [p for p in worker.build("one process").parameters() if p.requires_grad]
    for rank in range(trained.num_ranks):
        log = trained.run(kind, "gram").rank(rank).example_gradients
        for step in STEPS:
            check = log.attributes(step)["sum_check"]
            assert check["parameters"] == len(parameters)
            assert check["largest_difference"] < 1e-5


@kinds
def test_they_add_up_to_the_gradients_that_ranks_agree_on(trained: Trained, kind: str) -> None:
    log = trained.run(kind, "full").example_gradients
    model = worker.build("one process")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for step in STEPS:
        for result in trained.results(kind, "full"):
            for name, synced in zip(names, result["gradients"][step], strict=True):
                # The ranks' mean of the mean over as many rows each.
                mean = log.features(name, step).sum(0) / STEP_SIZE
                np.testing.assert_allclose(mean, synced.flatten(), rtol=1e-3, atol=1e-6)


@kinds
def test_those_of_a_probe_are_those_of_one_process(
    trained: Trained, alone: ExampleGradientResult, kind: str
) -> None:
    log = trained.run(kind, "probe").example_gradients
    assert alone.total is not None
    expected = alone.total[: worker.NUM_PROBED, : worker.NUM_PROBED]
    assert log.steps == [0, 1]
    np.testing.assert_allclose(log.gram(0), expected, rtol=1e-3, atol=1e-6)


@kinds
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("training", "the per-example gradients do not add up to the gradient: the difference"),
        ("probe", "the gradient of one example alone differs; torch.func "),
    ],
)
def test_wrong_gradients_are_found_and_left_out(
    trained: Trained, kind: str, source: str, reason: str
) -> None:
    run = trained.run(kind, "wrong")
    covered = coverage(run, source)
    assert len(covered) >= trained.num_ranks
    # With sharded parameters, and of the training itself, no example can be run alone.
    is_evaluated_alone = source == "probe" and kind == "ddp"
    kind_of_coverage = "unsupported: "
    if is_evaluated_alone:
        kind_of_coverage = "fallback: one example after the other, because "
    for parameters in covered:
        assert parameters["layer.linear1.weight"].startswith(f"{kind_of_coverage}{reason}")
        assert parameters["layer.linear1.bias"] == "exact"
    assert "layer.linear1" in run["example_gradients", source].layers  # Of the bias.
