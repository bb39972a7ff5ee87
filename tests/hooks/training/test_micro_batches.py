"""Micro-batches: which passes make one, and what a loop tells of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from tests.hooks.gradients.live_loop import (
    NUM_EXAMPLES,
    Net,
    Seen,
    activations,
    alone,
    batches,
    features,
    gradients,
    plain_loop,
    record,
)


def test_gram_matrices_span_micro_batches(tmp_path: Path) -> None:
    model, data = Net(), batches(3)
    measures = [
        sonde.Activations(sonde.TRAINING),
        sonde.OutputGradients(sonde.TRAINING),
    ]
    seen = Seen(model)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            (F.cross_entropy(model(batch.inputs), batch.targets) / 3).backward()
        optimizer.step()

    run = record(tmp_path, model, measures, loop)
    for layer, outputs in seen.outputs.items():
        rows = torch.cat([output for output in outputs if len(output) == NUM_EXAMPLES]).double()
        gram = run.activations[layer].gram(0)
        np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-5, atol=1e-6)
        assert run["output_gradients"][layer].gram(0).shape == gram.shape


def test_features_over_the_budget_are_a_reason_where_micro_batches_need_them(
    tmp_path: Path,
) -> None:
    model, data = Net(), batches(2)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
        plain_loop(model, data[:1])(recorder, optimizer)

    measure = sonde.Activations(sonde.TRAINING, ["0", "3"], memory=2 * NUM_EXAMPLES * 5 * 4)
    with pytest.warns(UserWarning, match="take more memory than `memory` allows"):
        run = record(tmp_path, model, [measure], loop)
    assert run.activations.fields("3") == ["gram"]
    assert run.activations["0"].steps == [1]
    assert run.activations["3"].steps == [0, 1]


def test_passes_without_a_backward_pass_are_left_out(tmp_path: Path) -> None:
    model, data = Net(), batches(2)
    seen = Seen(model)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            model(torch.zeros(NUM_EXAMPLES, 4))
        model(torch.ones(NUM_EXAMPLES, 4))
        model(torch.ones(NUM_EXAMPLES + 1, 4))
        F.cross_entropy(model(data[0].inputs), data[0].targets).backward()
        model(torch.ones(NUM_EXAMPLES, 4))
        optimizer.step()

    run = record(tmp_path, model, [activations()], loop)
    assert run.layers == ["0", "1", "2", "3"]
    own = [output for output in seen.outputs["3"] if len(output) == NUM_EXAMPLES]
    np.testing.assert_array_equal(features(run, "activations", "3", 0), own[2])
    assert run.activations.attributes(0)["micro_batches"] == [NUM_EXAMPLES]


def test_two_passes_of_one_loss_are_calls_of_one_micro_batch(tmp_path: Path) -> None:
    model, data = Net(), batches(2)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        first, second = model(data[0].inputs), model(data[1].inputs)
        F.mse_loss(first, second).backward()
        optimizer.step()

    run = record(tmp_path, model, [activations(["0", "3"])], loop)
    assert run.layers == ["0", "3", "0#1", "3#1"]
    assert run.activations.attributes()["micro_batches"] == [NUM_EXAMPLES]


def test_named_batches_are_micro_batches_of_one_backward_pass(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(2)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        losses = []
        for batch in data:
            with recorder.batch(ids=batch.ids):
                losses.append(F.cross_entropy(model(batch.inputs), batch.targets))
                recorder.batch(loss=losses[-1])
        (sum(losses) / 2).backward()  # type: ignore[union-attr]
        optimizer.step()

    expected = torch.cat([alone(model, "3", batch) for batch in data])
    run = record(tmp_path, model, [gradients("3")], loop)
    found = features(run, "output_gradients", "3")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert run["output_gradients"].attributes()["micro_batches"] == [NUM_EXAMPLES] * 2


def test_only_the_first_evaluation_of_a_closure_counts(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(1)
    with torch.no_grad():
        expected = [model[0](data[0].inputs)]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0].inputs), data[0].targets)
        loss.backward()
        return loss

    with sonde.Recorder(
        tmp_path / "run", model, [activations("0")], when=sonde.every(1), on_error="raise"
    ) as recorder:
        recorder.attach(optimizer)
        for _ in range(2):
            optimizer.step(closure)
            with torch.no_grad():
                expected.append(model[0](data[0].inputs))
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("activations") == [0, 1]
    for step in range(2):
        np.testing.assert_array_equal(features(run, "activations", "0", step), expected[step])


def test_micro_batches_of_a_lazy_model_and_of_weights_that_change(tmp_path: Path) -> None:
    class Renormalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lazy, self.head = nn.LazyLinear(4), nn.Linear(4, 3)
            self.is_changing = False

        def forward(self, x: Tensor) -> Tensor:
            if self.is_changing:
                with torch.no_grad():
                    self.head.weight.mul_(0.9)
            return torch.as_tensor(self.head(self.lazy(x)))

    model, data = Renormalized(), batches(2)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for is_changing in (False, True):
            model.is_changing = is_changing
            for batch in data:
                F.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()

    run = record(tmp_path, model, [activations()], loop)
    assert run.activations.attributes(0)["micro_batches"] == [NUM_EXAMPLES] * 2
    assert "late_passes" not in run.activations.attributes(0)
    # Both reach the step, whatever has moved the weights between them.
    assert run.activations.attributes(1)["micro_batches"] == [NUM_EXAMPLES] * 2
    assert "late_passes" not in run.activations.attributes(1)


def test_examples_that_only_fill_up_a_batch_are_marked(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    measures = [sonde.Activations(sonde.TRAINING)]
    recorder = sonde.Recorder(tmp_path / "run", model, measures, when=sonde.every(1))
    recorder.attach(optimizer)
    for num_real in (None, 1):
        for _ in range(2):
            with recorder.batch(ids=torch.arange(3)):
                loss = model(torch.ones(3, 3)).sum()
            loss.backward()
        with recorder.batch(ids=torch.arange(3)):
            loss = model(torch.ones(3, 3)).sum()
            recorder.batch(loss=loss, reduction="sum")
            recorder.batch(num_real=num_real)
        loss.backward()
        optimizer.step()
    recorder.close()
    log = sonde.open_run(tmp_path / "run").activations
    assert log.steps_of("is_duplicate") == [1]
    assert log.array("is_duplicate", 1).tolist() == [False] * 7 + [True] * 2


def test_a_negative_number_of_examples_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    measures = [sonde.Activations(sonde.TRAINING)]
    with sonde.Recorder(tmp_path / "run", model, measures, on_error="raise") as recorder:
        with pytest.raises(sonde.SondeError, match=r"`num_real` \(=-1\) must be >= 0"):
            recorder.batch(num_real=-1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2]], "`ids` has shape"),
        (np.array([1, 2**64 - 1], dtype=np.uint64), "`ids` holds 18446744073709551615; the log"),
    ],
)
def test_wrong_ids_are_refused_without_ending_the_training(
    tmp_path: Path, ids: Any, message: str
) -> None:
    model, data = Net(), batches(1)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        recorder.batch(ids=ids)
        plain_loop(model, data)(recorder, optimizer)

    with pytest.warns(UserWarning, match=rf"recorder.batch\(\) is ignored: {message}"):
        run = record(tmp_path, model, [activations()], loop, on_error="warn")
    assert run.steps("activations") == [0]


def test_the_same_ids_twice_name_one_micro_batch(tmp_path: Path) -> None:
    model, data = Net(), batches(2)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            recorder.batch(ids=batch.ids)
            loss = F.cross_entropy(model(batch.inputs), batch.targets)
            recorder.batch(ids=batch.ids)
            recorder.batch(ids=batch.ids, loss=loss)
            (3 * loss).backward()
        optimizer.step()

    run = record(tmp_path, model, [gradients("3")], loop)
    log = run["output_gradients"]
    np.testing.assert_array_equal(log.ids_at(0), torch.cat([batch.ids for batch in data]))
    assert log.attributes(0)["factors"] == [pytest.approx(NUM_EXAMPLES / 3)] * 2


@pytest.mark.parametrize("place", ["before the pass", "after the pass", "after backward"])
def test_ids_of_no_pass_are_warned_of(tmp_path: Path, place: str) -> None:
    model, (batch, other) = Net(), batches(2)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        if place == "before the pass":
            recorder.batch(ids=other.ids)
            recorder.batch(ids=batch.ids)
        loss = F.cross_entropy(model(batch.inputs), batch.targets)
        if place == "after the pass":
            recorder.batch(ids=batch.ids)
            recorder.batch(ids=other.ids)
        loss.backward()
        if place == "after backward":
            recorder.batch(ids=batch.ids)
        optimizer.step()

    with pytest.warns(sonde.SondeWarning, match="at step 0 examples that recorder.batch.. named"):
        run = record(tmp_path, model, [activations()], loop)
    if place == "after backward":
        assert run.activations.attributes(0)["ids"].startswith("unknown")
    else:
        np.testing.assert_array_equal(run.activations.ids_at(0), batch.ids)
    assert any("called twice for one micro-batch" in note.get("reason", "") for note in run.notes)
