"""Trainings of Lightning's `Trainer`, recorded by its callback."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

import sonde
from sonde.exceptions import RunExistsError, SondeWarning
from sonde.integrations.lightning import SondeCallback

from .trainings import (
    NUM_EXAMPLES,
    alone,
    assert_same_log,
    assert_same_training,
    body,
    data,
    measures,
    smooth_body,
    state_of,
)

pytestmark = pytest.mark.filterwarnings(
    # Lightning's own way with torch of today; then advice on speed and on what is left out.
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:You defined a `validation_step` but have no",
    "ignore:.*does not have many workers",
    "ignore:.*The number of training batches",
    "ignore:.*Checkpoint directory",
    "ignore:.*callbacks used to create the checkpoint",
)


def order() -> Tensor:
    """The order of the examples, the same in each epoch."""
    return torch.randperm(NUM_EXAMPLES, generator=torch.Generator().manual_seed(0))


class Loader:
    """Batches that go on where a state says."""

    def __init__(self, *, as_tuples: bool = False) -> None:
        self.inputs, self.classes = data()
        self.start = self.position = 0
        self.as_tuples = as_tuples

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        batches = order().split(4)
        start, self.start = self.start, 0
        for position in range(start, len(batches)):
            self.position = (position + 1) % len(batches)
            rows = batches[position]
            batch = {"x": self.inputs[rows], "y": self.classes[rows], "ids": rows + 100}
            yield tuple(batch.values()) if self.as_tuples else batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]


class Module(LightningModule):
    """A module whose training calls it, or only a part of it."""

    def __init__(self, *, smooth: bool = False, calls: str = "itself") -> None:
        super().__init__()
        self.body = smooth_body() if smooth else body()
        self.calls = calls
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch[:2]
        loss = F.cross_entropy(self(x) if self.calls == "itself" else self.body(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch["x"]), batch["y"]), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def in_band(path: Path, **options: Any) -> SondeCallback:
    return SondeCallback(
        path,
        **{
            "measures": measures(probe=False),
            "when": sonde.every(1),
            "id_key": "ids",
            "reduction": "mean",
            "on_error": "raise",
            **options,
        },
    )


def train(
    path: Path,
    *callbacks: Callback,
    module: Module | None = None,
    loader: Any = None,
    validate: bool = False,
    resume: Path | None = None,
    half: bool = False,
    **options: Any,
) -> Module:
    if half:  # By its name, Lightning refuses it on the CPU.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    seed_everything(5, verbose=False)
    module = Module() if module is None else module
    trainer = Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": path,
            **options,
        },
        callbacks=list(callbacks),
    )
    trainer.fit(
        module,
        Loader() if loader is None else loader,
        Loader() if validate else None,
        ckpt_path=resume,
        weights_only=True if resume else None,
    )
    return module


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [
        ({}, 12),
        ({"accumulate_grad_batches": 4}, 4),
        ({"precision": "bf16-mixed"}, 12),
        ({"half": True}, 12),
        ({"gradient_clip_val": 0.1}, 12),
        ({"validate": True, "val_check_interval": 2}, 12),
        ({"module": "part"}, 12),
    ],
    ids=["plain", "accumulated", "bf16", "fp16", "clipped", "validated", "part"],
)
def test_training_is_bit_identical_with_and_without_the_callback(
    tmp_path: Path, options: dict[str, Any], num_steps: int
) -> None:
    def module() -> Module:
        return Module(calls="a part" if options.get("module") else "itself")

    plain = train(tmp_path, **{**options, "module": module()})
    expected = state_of(plain)
    recorded = train(tmp_path, in_band(tmp_path / "run"), **{**options, "module": module()})
    assert_same_training(state_of(recorded), expected)
    assert recorded.losses == plain.losses
    run = sonde.open_run(tmp_path / "run")
    assert run.state == "finished"
    assert run.steps("activations") == list(range(num_steps))
    # Neither a validation nor the sanity check is taken for the training.
    sizes = [run.activations.attributes(step)["micro_batches"] for step in range(num_steps)]
    assert [size for step in sizes for size in step] == [4, 4, 4, 4, 4, 2] * 2
    assert len(run.layers) == 5


def test_training_is_bit_identical_with_a_probe(tmp_path: Path) -> None:
    plain = train(tmp_path)
    expected = state_of(plain)
    callback = SondeCallback(
        tmp_path / "run", measures=measures(), when=sonde.every(1), on_error="raise"
    )
    recorded = train(tmp_path, callback)
    assert_same_training(state_of(recorded), expected)
    assert recorded.losses == plain.losses
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("example_gradients") == list(range(13))
    assert run.steps("activations", source="probe") == [0, 6, 12]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-4), ({"precision": "bf16-mixed"}, 3e-2), ({"half": True}, 1e-2)],
)
def test_gradients_in_band_are_those_of_each_example_alone(
    tmp_path: Path, options: dict[str, Any], tolerance: float
) -> None:
    module = Module(smooth=True)
    inputs, classes = data()
    expected = alone(module.body, module.body[0], inputs[order()], classes[order()]).numpy()
    measure = sonde.OutputGradients(sonde.TRAINING, "body.0", sonde.Full())
    callback = in_band(tmp_path / "run", measures=[measure])
    # The last micro-batch is the one that is computed inside the optimizer's step.
    train(
        tmp_path,
        callback,
        module=module,
        max_epochs=1,
        accumulate_grad_batches=6,
        **options,
    )
    log = sonde.open_run(tmp_path / "run")["output_gradients"]
    found = log["body.0"].features(0)
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    assert log.attributes(0)["micro_batches"] == [4, 4, 4, 4, 4, 2]
    ids = log.ids_at(0)
    assert ids is not None
    assert ids.tolist() == (order() + 100).tolist()


def test_ids_may_be_at_a_position_of_the_batch(tmp_path: Path) -> None:
    train(tmp_path, in_band(tmp_path / "run", id_key=2), loader=Loader(as_tuples=True))
    ids = sonde.open_run(tmp_path / "run").activations.ids_at(0)
    assert ids is not None
    assert ids.tolist() == (order()[:4] + 100).tolist()


def test_without_a_reduction_gradients_keep_their_scale(tmp_path: Path) -> None:
    train(tmp_path, in_band(tmp_path / "run", reduction=None))
    log = sonde.open_run(tmp_path / "run")["output_gradients"]
    assert log.attributes(0)["scale"].startswith("unknown")


@pytest.mark.parametrize("half", [False, True])
def test_the_loss_and_what_the_module_logs_are_recorded(tmp_path: Path, half: bool) -> None:
    callback = in_band(tmp_path / "run", measures=[sonde.Scalars()])
    module = train(tmp_path, callback, validate=True, accumulate_grad_batches=2, half=half)
    log = sonde.open_run(tmp_path / "run")["scalars"]
    for step in range(1, 7):  # The loss of the latest micro-batch before the step.
        assert log.array("loss", step) == pytest.approx(module.losses[2 * step - 1], rel=1e-3)
    assert log.steps_of("val_loss", None) == [4, 5, 6]
    assert log.array("learning_rate", 2) == 0.01


# Six steps an epoch: in the middle of one, at its end, and in the middle of the last.
@pytest.mark.parametrize(("every", "at"), [("steps", 2), ("steps", 6), ("steps", 8), ("epoch", 6)])
def test_a_resumed_training_leaves_the_log_of_an_uninterrupted_one(
    tmp_path: Path, every: str, at: int
) -> None:
    x, y = data()
    when = sonde.epochs(1) | sonde.every(5)
    in_all: list[sonde.hooks.Measure] = [
        sonde.Activations(sonde.TRAINING, when=when),
        sonde.OutputGradients(sonde.TRAINING, "*0"),
        sonde.Scalars(),
        sonde.Predictions(sonde.Probe(x[:5], y[:5]), when=sonde.epochs(1)),
    ]
    for name, resume in (("whole", None), ("cut", None), ("cut", at)):
        path = tmp_path / name
        checkpoints = ModelCheckpoint(
            path / "checkpoints",
            filename="{step}",
            save_top_k=-1,
            every_n_train_steps=2 if every == "steps" else None,
            every_n_epochs=1 if every == "epoch" else None,
        )
        checkpoint = None if resume is None else path / f"checkpoints/step={resume}.ckpt"
        module = train(
            path,
            in_band(path / "run", measures=in_all),
            checkpoints,
            module=Module(smooth=True),  # Checkpoints of Lightning hold no random states.
            resume=checkpoint,
        )
        if name == "whole":
            expected = state_of(module)
    assert_same_training(state_of(module), expected)
    run = sonde.open_run(tmp_path / "cut/run")
    assert [attempt["resume_step"] for attempt in run.attempts] == [0, at + 1]
    assert run.steps("predictions") == [0, 6, 12]
    assert_same_log(tmp_path / "cut/run", tmp_path / "whole/run", ["scalars", "activations"])


def test_a_checkpoint_that_was_written_without_the_callback_is_gone_on_with(
    tmp_path: Path,
) -> None:
    checkpoints = ModelCheckpoint(
        tmp_path / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=8
    )
    train(tmp_path, checkpoints)
    callback = in_band(tmp_path / "run")
    train(tmp_path, callback, resume=tmp_path / "checkpoints/step=8.ckpt")
    assert sonde.open_run(tmp_path / "run").steps("activations") == [8, 9, 10, 11]
    assert callback.recorder is not None
    assert callback.recorder.num_epochs == 2


def test_a_run_that_exists_is_refused_before_the_training_begins(tmp_path: Path) -> None:
    train(tmp_path, in_band(tmp_path / "run"))
    module = Module()
    with pytest.raises(RunExistsError, match="already holds a run"):
        train(tmp_path, in_band(tmp_path / "run"), module=module)
    assert module.losses == []


def test_a_trainer_that_trains_on_goes_on_with_the_run(tmp_path: Path) -> None:
    callback = in_band(tmp_path / "run")
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
        train(tmp_path, in_band(tmp_path / "run"), Failing(), module=module)
    run = sonde.open_run(tmp_path / "run")
    assert (run.state, run.steps("activations")) == ("finished", [0, 1, 2])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_failure_of_ours_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    expected = state_of(train(tmp_path, validate=True))
    for name in ("batch", "state_dict"):
        monkeypatch.setattr(sonde.Recorder, name, fail)
    monkeypatch.setattr(sonde.Scalars, "record", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoints = ModelCheckpoint(tmp_path / "checkpoints")
        callback = in_band(tmp_path / "run", on_error="warn")
        module = train(tmp_path, callback, checkpoints, validate=True)
    assert_same_training(state_of(module), expected)
    told = " ".join(str(w.message) for w in caught if w.category is SondeWarning)
    for part in ("scalars of", "ids cannot be read", "loss cannot be read", "checkpoint lacks"):
        assert part in told


@pytest.fixture
def of_one_process() -> Iterator[str]:
    """A strategy that wraps the model; what Lightning leaves of it is cleared away."""
    environment = dict(os.environ)
    yield "ddp"
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


def test_under_a_wrapper_that_redirects_the_forward_the_step_runs_once(
    tmp_path: Path, of_one_process: str
) -> None:
    options: dict[str, Any] = {"strategy": of_one_process}
    plain = train(tmp_path, **options)
    expected = state_of(plain)
    with pytest.warns(SondeWarning, match="its forward was replaced"):
        recorded = train(tmp_path, in_band(tmp_path / "run"), **options)
    assert_same_training(state_of(recorded), expected)
    assert recorded.losses == plain.losses
    run = sonde.open_run(tmp_path / "run")
    assert run.layers == ["body.0", "body.1", "body.2", "body.3", "body.4"]
    assert run.activations.ids_at(11) is not None


def test_without_the_package_one_line_names_the_extra() -> None:
    code = "import sys; sys.modules['lightning'] = None; import sonde.integrations.lightning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "sonde.exceptions.MissingExtraError: sonde.integrations.lightning needs lightning; "
        "install it by: pip install 'sonde[lightning]'"
    )
