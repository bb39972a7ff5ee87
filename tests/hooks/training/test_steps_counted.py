"""A step is an update of the weights, however an optimizer comes to it: counted by the weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

import sonde
from sonde.exceptions import InvalidInputError, SondeWarning
from sonde.hooks.training.optimizer_steps import SkippedUpdates, StepCalls

INPUTS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % 3


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def backward(model: nn.Module, scaler: Any = None, factor: float = 1.0) -> None:
    loss = F.cross_entropy(model(INPUTS), TARGETS) * factor
    (loss if scaler is None else scaler.scale(loss)).backward()


class Updates:
    """Counts how often the weights have changed, by their values."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self.values = self._copies()
        self.number = 0

    def look(self) -> None:
        self.number += not all(map(torch.equal, self.values, self._copies()))
        self.values = self._copies()

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]


def counted(
    path: Path,
    make: Callable[[nn.Module], tuple[Any, Callable[[nn.Module], None]]],
    num_rounds: int = 4,
) -> tuple[sonde.Recorder, int]:
    """Train; return the recorder, closed, and how often the weights have changed.

    Args:
        path: Where the run is written.
        make: Returns what is attached, and what does one round of the training.
        num_rounds: How many rounds there are.
    """
    model = make_model()
    attached, train = make(model)
    measures = [
        sonde.Scalars(),
        sonde.Predictions(INPUTS),
        sonde.Activations(sonde.TRAINING),
    ]
    recorder = sonde.Recorder(path, model, measures, when=sonde.every(1), on_error="raise")
    recorder.attach(attached)
    updates = Updates(model)
    for _ in range(num_rounds):
        train(model)
        updates.look()
        assert recorder.num_steps == updates.number
    recorder.close()
    return recorder, updates.number


def plain_round(optimizer: Any) -> Callable[[nn.Module], None]:
    def train(model: nn.Module) -> None:
        optimizer.zero_grad()
        backward(model)
        optimizer.step()

    return train


class Derived(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class DerivedAgain(Derived):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Holding(torch.optim.Optimizer):
    """A wrapper that is an optimizer itself, with hooks of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al., 2021, 2010.01412), as it is often written."""

    def __init__(self, parameters: Any, radius: float = 0.05) -> None:
        super().__init__(parameters, {"radius": radius})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)
        self.param_groups = self.base_optimizer.param_groups

    def _all(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm() for p in self._all()]).norm()
        for p in self._all():
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad * 0.05 / norm)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self._all():
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> Any:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.mark.parametrize("kind", [Derived, DerivedAgain])
def test_a_step_that_calls_its_parents_is_counted_once(kind: Any, tmp_path: Path) -> None:
    # Only once one was made does the parent's step call hooks.
    torch.optim.Adam([nn.Parameter(torch.ones(1))])
    Derived([nn.Parameter(torch.ones(1))])

    def make(model: nn.Module) -> tuple[Any, Callable[[nn.Module], None]]:
        optimizer = kind(model.parameters(), lr=0.01)
        return optimizer, plain_round(optimizer)

    recorder, number = counted(tmp_path / "run", make)
    assert number == recorder.num_steps == 4
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("predictions") == [0, 1, 2, 3, 4]
    assert run.steps("activations") == [0, 1, 2, 3]


def test_a_step_that_calls_the_held_optimizers_is_counted_once(tmp_path: Path) -> None:
    def make(model: nn.Module) -> tuple[Any, Callable[[nn.Module], None]]:
        optimizer = Holding(torch.optim.SGD(model.parameters(), lr=0.1))
        return optimizer, plain_round(optimizer)

    recorder, number = counted(tmp_path / "run", make)
    assert number == recorder.num_steps == 4


@pytest.mark.parametrize("form", ["two steps", "closure"])
@pytest.mark.parametrize("which", ["outer", "base"])
def test_an_update_of_sam_is_one_step(form: str, which: str, tmp_path: Path) -> None:
    def make(model: nn.Module) -> tuple[Any, Callable[[nn.Module], None]]:
        optimizer = SAM(model.parameters())

        def in_two_steps(model: nn.Module) -> None:
            for half in (optimizer.first_step, optimizer.second_step):
                backward(model)
                half()

        def by_closure(model: nn.Module) -> None:
            backward(model)
            optimizer.step(lambda: backward(model))

        attached = optimizer if which == "outer" else optimizer.base_optimizer
        return attached, in_two_steps if form == "two steps" else by_closure

    recorder, number = counted(tmp_path / "run", make)
    assert number == recorder.num_steps == 4
    log = sonde.open_run(tmp_path / "run")["activations", "training"]
    assert [log.attributes(step)["micro_batches"] for step in log.steps] == [[8]] * 4


def test_a_step_that_fails_is_no_step_and_the_next_one_is(tmp_path: Path) -> None:
    torch.optim.Adam([nn.Parameter(torch.ones(1))])

    def make(model: nn.Module) -> tuple[Any, Callable[[nn.Module], None]]:
        optimizer = DerivedAgain(model.parameters(), lr=0.01)

        def failing() -> float:
            raise ValueError("no data")

        def train(model: nn.Module) -> None:
            with pytest.raises(ValueError, match="no data"):
                optimizer.step(failing)
            plain_round(optimizer)(model)

        return optimizer, train

    recorder, number = counted(tmp_path / "run", make)
    assert number == recorder.num_steps == 4


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_a_scaler_skips_is_no_step(fused: bool, tmp_path: Path) -> None:
    def make(model: nn.Module) -> tuple[Any, Callable[[nn.Module], None]]:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        factors = iter([1.0, 1.0, float("inf"), float("nan"), 1.0, 1.0])

        def train(model: nn.Module) -> None:
            optimizer.zero_grad()
            backward(model, scaler, next(factors))
            scaler.step(optimizer)
            scaler.update()

        return optimizer, train

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SondeWarning)
        recorder, number = counted(tmp_path / "run", make, num_rounds=6)
    assert number == recorder.num_steps == 4
    assert sonde.open_run(tmp_path / "run").steps("predictions") == [0, 1, 2, 3, 4]


class _Device:
    type = "cuda"


class OnDevice:
    """Stands for a `found_inf` on an accelerator: notes when its value is waited for."""

    def __init__(self, value: float, waits: list[int], clock: list[int]) -> None:
        self.device = _Device()
        self.value, self._waits, self._clock = value, waits, clock

    def detach(self) -> OnDevice:
        return self

    def clamp(self, max: float) -> OnDevice:
        return OnDevice(min(self.value, max), self._waits, self._clock)

    def __add__(self, other: OnDevice) -> OnDevice:
        return OnDevice(self.value + other.value, self._waits, self._clock)

    def __bool__(self) -> bool:
        return float(self) != 0

    def __float__(self) -> float:
        self._waits.append(self._clock[-1])
        return self.value


class Fused(torch.optim.Optimizer):
    """Looks after `found_inf` by itself."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.found_inf: Any = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            parameter -= 0.1 * parameter.grad * (self.found_inf.value == 0)


def test_the_device_is_waited_for_only_where_a_step_may_be_due(tmp_path: Path) -> None:
    model = make_model()
    optimizer = Fused(model.parameters())
    skipped = {3, 4, 11}  # Updates, counted from 1.
    measures = [sonde.Predictions(INPUTS)]
    recorder = sonde.Recorder(
        tmp_path / "run", model, measures, when=sonde.at(0, 8, 14), on_error="raise"
    ).attach(optimizer)
    expected = {0: model(INPUTS)}
    waits: list[int] = []
    clock = [0]
    for update in range(1, 20):
        clock.append(update)
        optimizer.found_inf = OnDevice(2.0 * (update in skipped), waits, clock)
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        expected[update - sum(one <= update for one in skipped)] = model(INPUTS)
    # In the 8th and the 16th it turns out that the step that is due has not come yet.
    assert set(waits) == {8, 10, 16, 17}
    assert recorder.num_steps == 16
    recorder.close()
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("predictions") == [0, 8, 14]
    for step in (0, 8, 14):
        found = torch.tensor(run["predictions"].array("logits", step))
        torch.testing.assert_close(found, expected[step].detach())


def test_skipped_updates_are_handed_out_once() -> None:
    skipped = SkippedUpdates()
    for value in (0.0, 1.0, 3.0, 0.0):  # Of three devices, each found one.
        skipped.add(torch.tensor([value]))
    assert [skipped.take(), skipped.take()] == [2, 0]


def test_a_call_that_ended_unnoted_does_not_stay() -> None:
    calls = StepCalls()
    assert calls.enter()
    assert calls.enter()  # The first one has raised: nothing runs.
    assert calls.leave()
    assert not calls.leave()


class Lookahead(torch.optim.Optimizer):
    """Without the base class's __init__: no place for hooks, as many are written."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer = inner
        self.param_groups = inner.param_groups


class Scheduled:
    """A wrapper that is no optimizer."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.wrapped = inner


def private(inner: torch.optim.Optimizer) -> DPOptimizer:
    return DPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (Lookahead, r"is a Lookahead, which has no hooks.*attach the SGD.*`optimizer.optimizer`"),
        (private, r"is a DPOptimizer, which has no hooks.*`optimizer.original_optimizer`"),
        (Scheduled, r"is a Scheduled; expected a torch.optim.Optimizer.*`optimizer.wrapped`"),
        (lambda _: "adam", r"is a str; expected .* or call recorder.step\(\) after each step"),
    ],
)
def test_what_calls_no_hooks_is_refused_before_a_directory_is_made(
    wrap: Any, message: str, tmp_path: Path
) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match=message):
        sonde.attach(model, wrap(optimizer), tmp_path / "run", probe=INPUTS)
    assert not (tmp_path / "run").exists()
    recorder = sonde.attach(model, optimizer, tmp_path / "run", probe=INPUTS)
    with pytest.raises(InvalidInputError, match="attached already"):
        recorder.attach(optimizer)
    recorder.close()


class Unnamed(torch.optim.Optimizer):
    """Updates by a method of its own, through nothing that it holds."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def update(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= 0.1 * parameter.grad

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("updates", [True, False])
def test_steps_that_are_never_seen_are_warned_of_at_the_end(updates: bool, tmp_path: Path) -> None:
    model = make_model()
    optimizer = Unnamed(model.parameters())
    recorder = sonde.Recorder(tmp_path / "run", model, [sonde.Scalars()]).attach(optimizer)
    backward(model)
    if updates:
        optimizer.update()
        with pytest.warns(SondeWarning, match=r"step\(\) of the Unnamed that is attached was nev"):
            recorder.close()
    recorder.close()  # Nothing is said of a training that has made no step.
    notes = [note for note in sonde.open_run(tmp_path / "run").notes if note["event"] == "missed"]
    assert ["no step was counted" in note["reason"] for note in notes] == [True] * updates


def test_a_step_is_counted_that_was_under_way_when_it_was_attached(tmp_path: Path) -> None:
    """As an optimizer with a closure runs the first forward pass within its step."""
    torch.optim.Adam([nn.Parameter(torch.ones(1))])
    model = make_model()
    optimizer = DerivedAgain(model.parameters())
    recorder = sonde.Recorder(tmp_path / "run", model, [sonde.Scalars()])

    def closure() -> float:
        if not recorder.is_attached:
            recorder.attach(optimizer)
        return 0.0

    for number in (1, 2, 3):
        optimizer.step(closure)
        assert recorder.num_steps == number
    recorder.close()
