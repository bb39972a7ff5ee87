"""What is recorded of a training on several processes is what one process would record.

The worker trains under DistributedDataParallel and with sharded parameters (FSDP2), with probes
whose size the number of ranks does not divide.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sonde
from sonde.exceptions import InvalidInputError
from sonde.log import Run

from .conftest import RunRanks
from .launches import Trained, assert_same_training
from .workers import parallel

STEPS = list(range(parallel.NUM_STEPS + 1))
PROBED_IDS = list(range(100, 100 + parallel.NUM_PROBED))
LAYERS = ["conv", "drop", "mix", "norm", "head"]


@pytest.fixture(scope="module")
def trained(
    num_ranks: int, run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    folder = tmp_path_factory.mktemp(f"parallel{num_ranks}")
    run_ranks("parallel.py", folder, num_ranks=num_ranks)
    return Trained(folder, num_ranks)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same probes of the same model, before it is trained, in one process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    measures = list(parallel.probe_measures())
    with sonde.Recorder(path, parallel.build("one process"), measures) as recorder:
        recorder.measure()
    return sonde.open_run(path)


def problems_of(trained: Trained) -> list[dict[str, list[str]]]:
    """What each rank was told of what it cannot record."""
    paths = [trained.folder / f"problems{rank}.json" for rank in range(trained.num_ranks)]
    return [json.loads(path.read_text()) for path in paths]


kinds = pytest.mark.parametrize("kind", parallel.KINDS)


@kinds
@pytest.mark.parametrize("recorded", ["probes", "training"])
def test_training_is_the_same_to_the_last_bit(trained: Trained, kind: str, recorded: str) -> None:
    assert_same_training(trained, kind, recorded)


@kinds
@pytest.mark.parametrize("store", parallel.STORES)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_probe_is_recorded_whole_as_one_process_does(
    trained: Trained, alone: Run, kind: str, store: str, is_sharded: bool
) -> None:
    name = f"{store}{' sharded' * is_sharded}"
    run = trained.run(kind, "probes")
    log, expected = run["activations", name], alone["activations", store]
    assert log.steps == STEPS
    assert log.ids is not None
    assert log.ids.tolist() == PROBED_IDS
    assert log.targets is not None
    assert log.layers == LAYERS == expected.layers
    for layer in LAYERS:
        field, *_ = log.fields(layer)  # Beside it there may be what a reference adds.
        actual = log.array(field, 0, layer)
        # Other sizes of batches are rounded otherwise.
        np.testing.assert_allclose(actual, expected.array(field, 0, layer), rtol=1e-4, atol=1e-5)
    assert log.attributes(0) == expected.attributes(0)
    logits = run["predictions", name].array("logits", 0)
    np.testing.assert_allclose(
        logits, alone["predictions", store].array("logits", 0), rtol=1e-4, atol=1e-5
    )


@kinds
def test_sharded_probe_is_the_unsharded_one_at_every_step(trained: Trained, kind: str) -> None:
    run = trained.run(kind, "probes")
    for step in STEPS:
        for layer in LAYERS:
            whole, sharded = (
                run["activations", name].gram(step, layer) for name in ("gram", "gram sharded")
            )
            np.testing.assert_allclose(sharded, whole, rtol=1e-4, atol=1e-5)
            assert (sharded == sharded.T).all()
    # Some layer is far from zero: all ranks subtract the same from it.
    log = run["activations", "gram sharded"]
    assert any("gram_offset" in log.fields(layer) for layer in LAYERS)


@kinds
def test_sharded_probe_is_recorded_by_rank_0_alone(trained: Trained, kind: str) -> None:
    run = trained.run(kind, "probes")
    assert run.ranks == list(range(trained.num_ranks))
    assert "gram sharded" not in run.rank(1).sources("activations")
    notes = [note for note in run.notes if "sharded" in str(note.get("source"))]
    assert {note["event"] for note in notes} == {"layers"}
    assert {note["rank"] for note in notes} == {0}


@kinds
def test_each_rank_records_the_rows_it_trains_on(trained: Trained, kind: str) -> None:
    log = trained.run(kind, "training").activations
    assert log.steps == STEPS[:-1]
    for step in log.steps:
        batch = list(range(8 * step, 8 * step + 8))
        ids = log.ids_at(step)
        assert ids is not None
        assert ids.tolist() == batch
        assert log.array("target", step).tolist() == [example % 5 for example in batch]
        assert log.ranks_at(step) == list(range(trained.num_ranks))
        assert log.features("head", step).shape == (8, 5)


@kinds
def test_live_features_are_those_of_the_whole_batch(trained: Trained, kind: str) -> None:
    log = trained.run(kind, "training").activations
    inputs, _ = parallel.data()
    model = parallel.build("one process")
    convolved = model.get_submodule("conv")(inputs[:8]).flatten(1).detach().numpy()
    np.testing.assert_allclose(log.features("conv", 0), convolved, rtol=1e-4, atol=1e-5)


@kinds
def test_gradients_of_examples_add_up_to_those_all_ranks_agree_on(
    trained: Trained, kind: str
) -> None:
    run = trained.run(kind, "training")
    names = [name for name, _ in parallel.build("one process").named_parameters()]
    results = trained.results(kind, "training")
    for step in STEPS[:-1]:
        # The sum over the rows of a rank, over the ranks, each mean being of as many rows.
        total = run.output_gradients.features("head", step).sum(0) / parallel.BATCH_SIZE
        for result in results:
            synced = result["gradients"][step][names.index("head.bias")]
            np.testing.assert_allclose(total, synced, rtol=1e-4, atol=1e-6)


def test_ranks_with_other_probes_are_refused_on_all_of_them(trained: Trained) -> None:
    for told in problems_of(trained):
        (message,) = told["refused"]
        assert message.startswith("MismatchError: rank 1 measures activations of 'probe' (")
        assert message.endswith("so give each rank the same measures and the same whole probe")


def test_what_fails_on_one_rank_is_switched_off_on_all(trained: Trained) -> None:
    for told in problems_of(trained):
        first, second = told["failing"]
        assert (
            "activations of 'a' could not be recorded at step 0, so sonde switches it off" in first
        )
        assert (
            "predictions of 'b' could not be recorded at step 0, so sonde switches it off" in second
        )
        assert f"rank {trained.num_ranks - 1}: RuntimeError: out of memory" in first
    assert trained.run("failing").steps() == []


def test_a_sharded_probe_needs_ranks_that_can_talk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    measures = [sonde.Predictions(sonde.Probe(torch.ones(3, 2, 7), sharded=True))]
    with pytest.raises(InvalidInputError, match=r"is sharded, but the ranks cannot talk .*init_pr"):
        sonde.Recorder(tmp_path / "run", parallel.build("one process"), measures)
