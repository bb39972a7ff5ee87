"""Trainings of `transformers.Trainer`, recorded by its callback."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import sonde
from sonde.exceptions import InvalidInputError, SondeWarning
from sonde.integrations.transformers import SondeCallback

from .outcomes import (
    assert_closed,
    assert_gradients,
    assert_recorded_every_batch,
    assert_resumes,
    assert_same_training,
    state_of,
)
from .trainings import NUM_EXAMPLES, alone, body, break_recorders, data, in_band, smooth_body, told


class Rows(Dataset[dict[str, Any]]):
    """Examples with ids, as a collator of the Trainer takes them."""

    def __init__(self) -> None:
        self.inputs, self.labels = data()

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {"inputs": self.inputs[index], "labels": int(self.labels[index])}
        return {**row, "example_id": 100 + index}


class Stream(IterableDataset[dict[str, Any]]):
    """The same, of a length that nobody knows."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = Rows()
        return iter([rows[index] for index in range(len(rows))])


class Classifier(nn.Module):
    """A model whose outputs hold the mean loss."""

    def __init__(self, *, smooth: bool = False) -> None:
        super().__init__()
        self.body = smooth_body() if smooth else body()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(inputs)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Greedy(Classifier):
    """A model that divides by the number of items of all accumulated micro-batches."""

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Tensor]:
        logits = self.body(inputs)
        assert labels is not None
        assert num_items_in_batch is not None
        loss = F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        return {"loss": loss, "logits": logits}


def arguments(path: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(path / "checkpoints"),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 0.01,
            "use_cpu": True,
            "logging_steps": 2,
            "save_strategy": "no",
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "report_to": [],
            "dataloader_pin_memory": False,
            "seed": 3,
            **options,
        }
    )


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.losses.append(logs.get("loss", 0.0))


def train(
    path: Path,
    callback: TrainerCallback | None,
    model: nn.Module | None = None,
    *,
    dataset: Any = None,
    resume: str | None = None,
    **options: Any,
) -> tuple[nn.Module, list[float]]:
    set_seed(5)
    model = Classifier() if model is None else model
    losses = Losses()
    trainer = Trainer(
        model,
        arguments(path, **options),
        train_dataset=Rows() if dataset is None else dataset,
        eval_dataset=Rows(),
        callbacks=[losses] if callback is None else [losses, callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, losses.losses


def in_band_callback(path: Path, **options: Any) -> SondeCallback:
    return SondeCallback(path, **in_band("example_id", **options))


class WithoutIds(Classifier):
    """A model that takes ids and lets them be, so that it trains without sonde, too."""

    def forward(  # type: ignore[override]  # Takes ids.
        self, inputs: Tensor, labels: Tensor, example_id: Tensor
    ) -> dict[str, Tensor]:
        return super().forward(inputs, labels)


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [
        ({}, 12),
        ({"gradient_accumulation_steps": 4}, 4),
        ({"bf16": True}, 12),
        ({"eval_strategy": "steps", "eval_steps": 3}, 12),
    ],
    ids=["plain", "accumulated", "bf16", "evaluated"],
)
def test_training_is_bit_identical_with_and_without_the_callback(
    tmp_path: Path, options: dict[str, Any], num_steps: int
) -> None:
    plain, losses = train(tmp_path, None, WithoutIds(), **options)
    expected = state_of(plain)
    callback = in_band_callback(tmp_path / "run")
    recorded, recorded_losses = train(tmp_path, callback, WithoutIds(), **options)
    assert_same_training(state_of(recorded), expected)
    assert recorded_losses == losses
    # Neither an evaluation nor a probe is taken for the training.
    assert_recorded_every_batch(tmp_path / "run", num_steps)


def test_training_is_bit_identical_with_a_probe(tmp_path: Path) -> None:
    class Named(Classifier):
        def forward(self, inputs: Tensor, labels: Any = None) -> Any:
            return super().forward(inputs, labels)

    x, y = data()
    probe = sonde.Probe({"inputs": x[:5]}, y[:5])
    kept: dict[str, Any] = {"remove_unused_columns": True}
    plain, losses = train(tmp_path, None, Named(), **kept)
    expected = state_of(plain)
    callback = SondeCallback(
        tmp_path / "run",
        probe=probe,
        loss=lambda outputs, targets: F.cross_entropy(outputs["logits"], targets),
        when=sonde.every(1),
        on_error="raise",
    )
    recorded, recorded_losses = train(tmp_path, callback, Named(), **kept)
    assert_same_training(state_of(recorded), expected)
    assert recorded_losses == losses
    assert sonde.open_run(tmp_path / "run").steps("example_gradients") == list(range(13))


def one_step(path: Path, model: nn.Module, **options: Any) -> sonde.Run:
    """Record the output gradients of one step over all examples, without shuffling."""
    callback = in_band_callback(
        path / "run",
        measures=[sonde.OutputGradients(sonde.TRAINING, "body.0", sonde.Full())],
        reduction=options.pop("reduction", "mean"),
    )
    kept: dict[str, Any] = {"num_train_epochs": 1, "gradient_accumulation_steps": 6}
    train(path, callback, model, train_sampling_strategy="sequential", **kept, **options)
    return sonde.open_run(path / "run")


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 3e-2)])
def test_gradients_in_band_are_those_of_each_example_alone(
    tmp_path: Path, bf16: bool, tolerance: float
) -> None:
    model = Classifier(smooth=True)
    expected = alone(model.body, model.body[0], *data())
    log = one_step(tmp_path, model, bf16=bf16)["output_gradients"]
    ids = range(100, 100 + NUM_EXAMPLES)
    assert_gradients(tmp_path / "run", "body.0", expected, tolerance, ids)
    assert log.attributes(0)["micro_batches"] == [4, 4, 4, 4, 4, 2]
    assert "not divided" in log.attributes(0)["scale"]


def test_a_loss_over_all_micro_batches_is_not_taken_for_a_mean(tmp_path: Path) -> None:
    model = Greedy(smooth=True)
    expected = alone(model.body, model.body[0], *data()).numpy() / NUM_EXAMPLES
    with pytest.warns(SondeWarning, match="gradients keep their scale: the Trainer makes the loss"):
        log = one_step(tmp_path, model)["output_gradients"]
    np.testing.assert_allclose(log["body.0"].features(0), expected, rtol=1e-4, atol=1e-7)
    assert log.attributes(0)["scale"].startswith("unknown")


def test_without_a_reduction_gradients_keep_their_scale(tmp_path: Path) -> None:
    log = one_step(tmp_path, Classifier(smooth=True), reduction=None)["output_gradients"]
    assert log.attributes(0)["scale"].startswith("unknown")


# Six steps an epoch: in the middle of one, at its end, at the end of all but one step.
# A Trainer that goes on in the second epoch of a stream skips it, with and without a callback.
@pytest.mark.parametrize(
    ("at", "is_stream"), [(2, False), (6, False), (8, False), (2, True), (6, True)]
)
def test_a_resumed_training_leaves_the_log_of_an_uninterrupted_one(
    tmp_path: Path, at: int, is_stream: bool
) -> None:
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "remove_unused_columns": False,
    }
    dataset = Stream() if is_stream else Rows()
    if is_stream:
        options["max_steps"] = 12
    options["restore_callback_states_from_checkpoint"] = at == 8

    def run(path: Path, in_all: Sequence[sonde.hooks.Measure], resume: int | None) -> nn.Module:
        callback = in_band_callback(path / "run", measures=in_all)
        checkpoint = None if resume is None else str(path / f"checkpoints/checkpoint-{resume}")
        model, _ = train(path, callback, dataset=dataset, resume=checkpoint, **options)
        return model

    x, y = data()
    probe = sonde.Probe({"inputs": x[:5]}, y[:5])
    assert_resumes(tmp_path, at, run, probe=probe, predicted=[0, 6] if is_stream else [0, 6, 12])


def test_a_checkpoint_that_was_written_without_the_callback_is_gone_on_with(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, None, WithoutIds(), **options)
    callback = in_band_callback(tmp_path / "run")
    checkpoint = str(tmp_path / "checkpoints/checkpoint-8")
    train(tmp_path, callback, WithoutIds(), resume=checkpoint, **options)
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("activations") == [8, 9, 10, 11]
    assert callback.recorder is not None
    assert callback.recorder.num_epochs == 2


def test_each_further_training_by_one_callback_has_a_run_of_its_own(tmp_path: Path) -> None:
    expected, expected_losses = train(tmp_path, None, WithoutIds())
    callback = in_band_callback(tmp_path / "run")
    train(tmp_path, callback)
    for name in ("run-2", "run-3"):
        with pytest.warns(SondeWarning, match=f"a training begins again .* into .*{name}$"):
            model, losses = train(tmp_path, callback)
        assert losses == expected_losses
        assert_same_training(state_of(model), state_of(expected))
        run = sonde.open_run(tmp_path / name)
        assert (run.state, run.steps("activations")) == ("finished", list(range(12)))
    assert sonde.open_run(tmp_path / "run").steps("activations") == list(range(12))


def test_a_training_that_was_broken_off_begins_again_as_a_new_attempt(tmp_path: Path) -> None:
    class Full(TrainerCallback):
        num_left = 1

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5 and self.num_left:
                self.num_left -= 1
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

    callback = in_band_callback(tmp_path / "run")
    set_seed(5)
    trainer = Trainer(
        Classifier(),
        arguments(tmp_path, auto_find_batch_size=True, dataloader_drop_last=True),
        train_dataset=Rows(),
        callbacks=[Full(), callback],
    )
    with pytest.warns(SondeWarning, match="into .*run as a new attempt, in place of the one"):
        trainer.train()
    run = sonde.open_run(tmp_path / "run")
    assert [attempt["attempt"] for attempt in run.attempts] == [0, 1]
    assert (run.state, run.steps("activations")) == (
        "finished",
        list(range(trainer.state.global_step)),
    )
    assert not (tmp_path / "run-2").exists()


def test_a_training_that_begins_again_and_cannot_be_recorded_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = in_band_callback(tmp_path / "run")
    train(tmp_path, callback)
    _, expected = train(tmp_path, None, WithoutIds())
    monkeypatch.setattr("sonde.integrations._starting.reserve", lambda path: 1 / 0)
    with pytest.warns(SondeWarning, match="begins again is not recorded: ZeroDivisionError"):
        _, losses = train(tmp_path, callback)
    assert losses == expected
    assert callback.recorder is None


def test_what_the_trainer_logs_is_recorded(tmp_path: Path) -> None:
    class Last(TrainerCallback):
        history: list[dict[str, float]]

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            Last.history = state.log_history

    last = Last()
    callback = SondeCallback(tmp_path / "run", measures=[sonde.Scalars()], when=sonde.every(1))
    set_seed(0)
    trainer = Trainer(
        Classifier(),
        arguments(tmp_path, remove_unused_columns=True),
        train_dataset=Rows(),
        callbacks=[callback, last],
    )
    trainer.train()
    log = sonde.open_run(tmp_path / "run")["scalars"]
    # What is logged after a step is there from the next one on.
    assert log.array("loss", 3) == pytest.approx(Last.history[0]["loss"])
    assert log.array("loss", 12) == pytest.approx(Last.history[4]["loss"])
    assert {field for _, field in log.streams} == {
        "learning_rate",
        "learning_rate_1",  # Of the parameters without weight decay.
        "loss",
        "grad_norm",
    }


@pytest.mark.parametrize(
    ("bad", "logging_steps", "as_tuple"),
    [(math.nan, 1, False), (math.inf, 1, False), (math.nan, 2, False), (math.nan, 1, True)],
)
def test_a_loss_that_the_trainer_filters_is_recorded_as_it_was(
    tmp_path: Path, bad: float, logging_steps: int, as_tuple: bool
) -> None:
    class Failing(Classifier):
        num_calls = 0

        def forward(self, inputs: Tensor, labels: Any = None) -> Any:
            found = super().forward(inputs, labels)
            self.num_calls += self.training
            # Of no effect on the gradients, so that only one loss is not finite.
            loss = found["loss"] + bad if self.num_calls == 3 else found["loss"]
            return (loss, found["logits"]) if as_tuple else {**found, "loss": loss}

    callback = SondeCallback(tmp_path / "run", measures=[sonde.Scalars()], when=sonde.every(1))
    kept: dict[str, Any] = {"remove_unused_columns": True, "logging_steps": logging_steps}
    _, logged = train(tmp_path, callback, Failing(), **kept)
    log = sonde.open_run(tmp_path / "run")["scalars"]
    assert all(map(math.isfinite, logged))  # What the Trainer says.
    losses = [float(log.array("loss", step)) for step in range(logging_steps + 1, 12)]
    shown = [losses[i] for i in range(0, len(losses), logging_steps)]
    at = 2 // logging_steps
    assert shown[:at] == pytest.approx(logged[:at])
    assert shown[at] == pytest.approx(bad, nan_ok=True)
    assert shown[at + 1 :] == pytest.approx(logged[at + 1 : len(shown)])


def test_gradients_that_are_not_finite_without_a_loss_to_see_are_warned_of(tmp_path: Path) -> None:
    class Output:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

        def __getitem__(self, _: object) -> Tensor:
            return self.loss

    class Hidden(Classifier):
        def forward(self, inputs: Tensor, labels: Any = None) -> Any:
            return Output(super().forward(inputs, labels)["loss"] * math.nan)

    callback = SondeCallback(tmp_path / "run", measures=[sonde.Scalars()], when=sonde.every(1))
    with pytest.warns(SondeWarning, match="logs a loss that is not finite as 0 .logging_nan_inf"):
        train(tmp_path, callback, Hidden(), remove_unused_columns=True)


def test_a_probe_is_in_float32_under_bf16(tmp_path: Path) -> None:
    class Named(Classifier):
        def forward(self, inputs: Tensor, labels: Any = None) -> Any:
            return super().forward(inputs, labels)

    x, y = data()
    model = Named(smooth=True)
    plain = copy.deepcopy(model)
    probe = sonde.Probe({"inputs": x[:5]}, y[:5])
    measures = [sonde.Activations(probe, "body.0", sonde.Full())]
    callback = SondeCallback(tmp_path / "run", measures=measures, when=sonde.at(0))
    train(tmp_path, callback, model, remove_unused_columns=True, bf16=True)
    log = sonde.open_run(tmp_path / "run")["activations"]
    with torch.no_grad():
        np.testing.assert_array_equal(log.features("body.0", 0), plain.body[0](x[:5]))
    assert log.attributes(0)["precision"] == ["float32"]


def test_a_failure_of_ours_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_recorders(monkeypatch, "batch", "state_dict")
    expected = state_of(train(tmp_path / "plain", None, WithoutIds())[0])
    with told() as messages:
        callback = in_band_callback(tmp_path / "run", on_error="warn")
        model, _ = train(tmp_path, callback, WithoutIds())
    assert_same_training(state_of(model), expected)
    for part in ("scalars of", "ids cannot be read", "loss cannot be read", "checkpoint lacks"):
        assert part in " ".join(messages)


def test_after_an_exception_the_run_can_be_closed_and_the_model_is_free(tmp_path: Path) -> None:
    class Failing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    model = WithoutIds()
    callback = in_band_callback(tmp_path / "run")
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=Rows(), callbacks=[callback, Failing()]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    callback.close()
    # A callback of transformers hears of no exception, and the one here was caught.
    assert_closed(tmp_path / "run", 3, model, "finished")


def test_a_position_as_id_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"`id_key` \(=2\) must be a name"):
        SondeCallback(tmp_path / "run", id_key=2)
