"""Trainings of Lightning's `Trainer` that go on, or end otherwise than they should."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import sonde
from sonde.exceptions import RunExistsError

from .lightning_trainings import Loader, Module, in_band_callback, quiet, train
from .outcomes import assert_closed, assert_resumes, assert_same_training, state_of
from .trainings import break_recorders, told

pytestmark = quiet


# Six steps an epoch: in the middle of one, at its end, and in the middle of the last.
@pytest.mark.parametrize(("every", "at"), [("steps", 2), ("steps", 6), ("steps", 8), ("epoch", 6)])
def test_a_resumed_training_leaves_the_log_of_an_uninterrupted_one(
    tmp_path: Path, every: str, at: int
) -> None:
    def run(path: Path, in_all: Sequence[sonde.hooks.Measure], resume: int | None) -> nn.Module:
        checkpoints = ModelCheckpoint(
            path / "checkpoints",
            filename="{step}",
            save_top_k=-1,
            every_n_train_steps=2 if every == "steps" else None,
            every_n_epochs=1 if every == "epoch" else None,
        )
        return train(
            path,
            in_band_callback(path / "run", measures=in_all),
            checkpoints,
            module=Module(smooth=True),  # Checkpoints of Lightning hold no random states.
            resume=None if resume is None else path / f"checkpoints/step={resume}.ckpt",
        )

    assert_resumes(tmp_path, at, run)


def test_a_checkpoint_that_was_written_without_the_callback_is_gone_on_with(
    tmp_path: Path,
) -> None:
    checkpoints = ModelCheckpoint(
        tmp_path / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=8
    )
    train(tmp_path, checkpoints)
    callback = in_band_callback(tmp_path / "run")
    train(tmp_path, callback, resume=tmp_path / "checkpoints/step=8.ckpt")
    assert sonde.open_run(tmp_path / "run").steps("activations") == [8, 9, 10, 11]
    assert callback.recorder is not None
    assert callback.recorder.num_epochs == 2


def test_a_run_that_exists_is_refused_before_the_training_begins(tmp_path: Path) -> None:
    train(tmp_path, in_band_callback(tmp_path / "run"))
    module = Module()
    with pytest.raises(RunExistsError, match="already holds a run"):
        train(tmp_path, in_band_callback(tmp_path / "run"), module=module)
    assert module.losses == []


def test_a_trainer_that_trains_on_goes_on_with_the_run(tmp_path: Path) -> None:
    callback = in_band_callback(tmp_path / "run")
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    module = Module()
    trainer.fit(module, Loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, Loader())
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("activations") == list(range(12))
    assert callback.recorder is not None
    assert callback.recorder.num_epochs == 2


def test_an_exception_closes_the_run_and_leaves_the_model_free(tmp_path: Path) -> None:
    class Failing(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("out of memory")

    module = Module()
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tmp_path, in_band_callback(tmp_path / "run"), Failing(), module=module)
    assert_closed(tmp_path / "run", 3, module)


def test_a_failure_of_ours_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = state_of(train(tmp_path, validate=True))
    break_recorders(monkeypatch, "batch", "state_dict")
    with told() as messages:
        checkpoints = ModelCheckpoint(tmp_path / "checkpoints")
        callback = in_band_callback(tmp_path / "run", on_error="warn")
        module = train(tmp_path, callback, checkpoints, validate=True)
    assert_same_training(state_of(module), expected)
    for part in ("scalars of", "ids cannot be read", "loss cannot be read", "checkpoint lacks"):
        assert part in " ".join(messages)
