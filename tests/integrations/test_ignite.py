"""Trainings of Ignite engines, recorded by a handler."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver
from torch import Tensor, nn

import sonde
from sonde.exceptions import RunExistsError, SondeWarning
from sonde.integrations.ignite import SondeHandler

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

Setup = Callable[[Engine, nn.Module, torch.optim.Optimizer, "SondeHandler | None"], object]


def batches(*, named: bool = False) -> list[Any]:
    inputs, classes = data()
    rows = torch.arange(NUM_EXAMPLES).split(4)
    parts = [(inputs[r], classes[r], r + 100) for r in rows]
    return [{"x": x, "y": y, "ids": ids} if named else (x, y, ids) for x, y, ids in parts]


class Batches:
    """Batches that are gone through from a position on, and later from the first one."""

    def __init__(self, batches: list[Any], start: int) -> None:
        self.batches, self.start = batches, start

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        return iter(self.batches[start:])


def train(
    path: Path | None,
    *,
    model: nn.Module | None = None,
    named: bool = False,
    amp: bool = False,
    accumulated: int = 1,
    max_epochs: int = 2,
    start: int = 0,
    setup: Setup = lambda *_: None,
    **options: Any,
) -> tuple[nn.Module, list[float]]:
    """Train, recorded into a path if one is given; return the model and the losses."""
    torch.manual_seed(3)
    model = body() if model is None else model
    torch.manual_seed(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    handler = None
    loss: Callable[..., Tensor] = F.cross_entropy
    if path is not None:
        chosen: dict[str, Any] = {
            "measures": measures(probe=False),
            "when": sonde.every(1),
            "id_key": "ids" if named else 2,
            "reduction": "mean",
            "on_error": "raise",
            **options,
        }
        handler = SondeHandler(path, model, optimizer, **chosen)
        loss = handler.watch_loss(F.cross_entropy)

    def prepare(batch: Any, device: Any, non_blocking: bool) -> tuple[Tensor, Tensor]:
        return (batch["x"], batch["y"]) if named else batch[:2]

    trainer = create_supervised_trainer(
        model,
        optimizer,
        loss,
        device="cpu",
        prepare_batch=prepare,
        gradient_accumulation_steps=accumulated,
        model_fn=(lambda net, x: autocast(net, x)) if amp else (lambda net, x: net(x)),
    )
    losses: list[float] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output)
    )
    if handler is not None:
        handler.attach(trainer)
    setup(trainer, model, optimizer, handler)
    trainer.run(Batches(batches(named=named), start), max_epochs=max_epochs)
    return model, losses


def autocast(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.as_tensor(model(inputs))


def evaluate(engine: Engine, model: nn.Module, *_: Any) -> None:
    def run(_: Engine) -> None:
        model.eval()
        with torch.no_grad():
            model(data()[0])
        model.train()

    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), run)


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [({}, 12), ({"accumulated": 3}, 4), ({"amp": True}, 12), ({"setup": evaluate}, 12)],
    ids=["plain", "accumulated", "bf16", "evaluated"],
)
def test_training_is_bit_identical_with_and_without_the_handler(
    tmp_path: Path, options: dict[str, Any], num_steps: int
) -> None:
    plain, losses = train(None, **options)
    expected = state_of(plain)
    recorded, recorded_losses = train(tmp_path / "run", **options)
    assert_same_training(state_of(recorded), expected)
    assert recorded_losses == losses
    run = sonde.open_run(tmp_path / "run")
    assert run.state == "finished"
    assert run.steps("activations") == list(range(num_steps))
    # An evaluation is not taken for the training.
    sizes = [run.activations.attributes(step)["micro_batches"] for step in range(num_steps)]
    assert [size for step in sizes for size in step] == [4, 4, 4, 4, 4, 2] * 2


def test_training_is_bit_identical_with_a_probe(tmp_path: Path) -> None:
    plain, losses = train(None)
    expected = state_of(plain)
    recorded, recorded_losses = train(tmp_path / "run", measures=measures())
    assert_same_training(state_of(recorded), expected)
    assert recorded_losses == losses
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("example_gradients") == list(range(13))
    assert run.steps("activations", source="probe") == [0, 6, 12]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("amp", "tolerance"), [(False, 1e-4), (True, 3e-2)])
def test_gradients_in_band_are_those_of_each_example_alone(
    tmp_path: Path, named: bool, amp: bool, tolerance: float
) -> None:
    model = smooth_body()
    expected = alone(model, model[0], *data()).numpy()
    measure = sonde.OutputGradients(sonde.TRAINING, "0", sonde.Full())
    train(
        tmp_path / "run",
        model=model,
        measures=[measure],
        accumulated=6,
        max_epochs=1,
        named=named,
        amp=amp,
    )
    log = sonde.open_run(tmp_path / "run")["output_gradients"]
    found = log["0"].features(0)
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    ids = log.ids_at(0)
    assert ids is not None
    assert ids.tolist() == list(range(100, 100 + NUM_EXAMPLES))


def test_without_a_reduction_gradients_keep_their_scale(tmp_path: Path) -> None:
    train(tmp_path / "run", reduction=None)
    log = sonde.open_run(tmp_path / "run")["output_gradients"]
    assert log.attributes(0)["scale"].startswith("unknown")


def test_what_the_engine_puts_out_is_recorded(tmp_path: Path) -> None:
    _, losses = train(tmp_path / "run", measures=[sonde.Scalars()])
    log = sonde.open_run(tmp_path / "run")["scalars"]
    # What is put out after a step is there from the next one on.
    assert [float(log.array("loss", step)) for step in range(2, 13)] == losses[:11]


# Six steps an epoch: in the middle of one, at its end, and in the middle of the last.
@pytest.mark.parametrize("at", [2, 6, 8])
def test_a_resumed_training_leaves_the_log_of_an_uninterrupted_one(tmp_path: Path, at: int) -> None:
    x, y = data()
    in_all: list[sonde.hooks.Measure] = [
        sonde.Activations(sonde.TRAINING, when=sonde.epochs(1) | sonde.every(5)),
        sonde.OutputGradients(sonde.TRAINING, "0"),
        sonde.Scalars(),
        sonde.Predictions(sonde.Probe(x[:5], y[:5]), when=sonde.epochs(1)),
    ]

    def checkpoints(folder: Path, resume: int | None) -> Setup:
        def setup(
            engine: Engine,
            model: nn.Module,
            optimizer: torch.optim.Optimizer,
            handler: SondeHandler | None,
        ) -> None:
            parts: dict[str, Any] = {"trainer": engine, "model": model, "optimizer": optimizer}
            parts["sonde"] = handler
            saver = Checkpoint(parts, DiskSaver(str(folder), require_empty=False), n_saved=None)
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), saver)
            if resume is not None:
                Checkpoint.load_objects(parts, torch.load(folder / f"checkpoint_{resume}.pt"))

        return setup

    for name, resume in (("whole", None), ("cut", None), ("cut", at)):
        path = tmp_path / name
        model, _ = train(
            path / "run",
            model=smooth_body(),
            measures=in_all,
            setup=checkpoints(path / "checkpoints", resume),
            start=(resume or 0) % 6,
        )
        if name == "whole":
            expected = state_of(model)
    assert_same_training(state_of(model), expected)
    assert_same_log(tmp_path / "cut/run", tmp_path / "whole/run", ["scalars", "activations"])
    run = sonde.open_run(tmp_path / "cut/run")
    assert [attempt["resume_step"] for attempt in run.attempts] == [0, at + 1]
    assert run.steps("predictions") == [0, 6, 12]


def test_a_checkpoint_that_was_written_without_the_handler_is_warned_of(tmp_path: Path) -> None:
    def setup(engine: Engine, *_: Any) -> None:
        engine.load_state_dict({"iteration": 6, "epoch_length": 6, "max_epochs": 2})

    with pytest.warns(SondeWarning, match="holds no state of the handler"):
        train(tmp_path / "run", setup=setup)
    assert sonde.open_run(tmp_path / "run").steps("activations") == list(range(6, 12))


def test_a_run_that_exists_is_refused_before_the_training_begins(tmp_path: Path) -> None:
    train(tmp_path / "run")
    model = body()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(RunExistsError, match="already holds a run"):
        train(tmp_path / "run", model=model)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("is_handled", [False, True])
def test_an_exception_closes_the_run_and_goes_on_as_without_the_handler(
    tmp_path: Path, is_handled: bool
) -> None:
    model = body()
    handled: list[BaseException] = []

    def setup(engine: Engine, *_: Any) -> None:
        @engine.on(Events.ITERATION_COMPLETED(once=3))
        def fail(_: Engine) -> None:
            raise RuntimeError("out of memory")

        if is_handled:

            @engine.on(Events.EXCEPTION_RAISED)
            def handle(engine: Engine, error: BaseException) -> None:
                handled.append(error)
                engine.terminate()

    if is_handled:
        train(tmp_path / "run", model=model, setup=setup)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            train(tmp_path / "run", model=model, setup=setup)
    assert bool(handled) is is_handled
    run = sonde.open_run(tmp_path / "run")
    assert (run.state, run.steps("activations")) == ("finished", [0, 1, 2])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failure_of_ours_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    expected = state_of(train(None)[0])
    for name in ("batch", "log"):
        monkeypatch.setattr(sonde.Recorder, name, fail)
    monkeypatch.setattr(sonde.Scalars, "record", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = train(tmp_path / "run", on_error="warn")
    assert_same_training(state_of(model), expected)
    told = " ".join(str(w.message) for w in caught if w.category is SondeWarning)
    for part in ("scalars of", "ids cannot be read", "loss cannot be read", "engine puts out"):
        assert part in told


def test_without_the_package_one_line_names_the_extra() -> None:
    code = "import sys; sys.modules['ignite'] = None; import sonde.integrations.ignite"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "sonde.exceptions.MissingExtraError: sonde.integrations.ignite needs pytorch-ignite; "
        "install it by: pip install 'sonde[ignite]'"
    )
