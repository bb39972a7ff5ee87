"""Trainings of Ignite engines, recorded by a handler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver
from torch import Tensor, nn

import sonde
from sonde.exceptions import RunExistsError, SondeWarning
from sonde.integrations.ignite import SondeHandler

from .outcomes import (
    assert_closed,
    assert_gradients,
    assert_recorded_every_batch,
    assert_resumes,
    assert_same_training,
    state_of,
)
from .trainings import (
    NUM_EXAMPLES,
    alone,
    body,
    break_recorders,
    data,
    in_band,
    measures,
    smooth_body,
    told,
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
        chosen = in_band("ids" if named else 2, **options)
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
    assert sonde.open_run(tmp_path / "run").state == "finished"
    assert_recorded_every_batch(tmp_path / "run", num_steps)


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
    expected = alone(model, model[0], *data())
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
    ids = range(100, 100 + NUM_EXAMPLES)
    assert_gradients(tmp_path / "run", "0", expected, tolerance, ids)


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

    def run(path: Path, in_all: Sequence[sonde.hooks.Measure], resume: int | None) -> nn.Module:
        model, _ = train(
            path / "run",
            model=smooth_body(),
            measures=in_all,
            setup=checkpoints(path / "checkpoints", resume),
            start=(resume or 0) % 6,
        )
        return model

    assert_resumes(tmp_path, at, run)


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
    assert_closed(tmp_path / "run", 3, model)


def test_a_failure_of_ours_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = state_of(train(None)[0])
    break_recorders(monkeypatch, "batch", "log")
    with told() as messages:
        model, _ = train(tmp_path / "run", on_error="warn")
    assert_same_training(state_of(model), expected)
    for part in ("scalars of", "ids cannot be read", "loss cannot be read", "engine puts out"):
        assert part in " ".join(messages)
