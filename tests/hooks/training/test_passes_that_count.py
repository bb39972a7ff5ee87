"""Only passes whose gradients reach the step are recorded; what was thrown away is dropped."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.exceptions import SondeWarning
from tests.hooks.gradients.live_loop import features

N = 6
GONE = "their gradients were set to None or zero before the optimizer stepped"
NOT_UPDATED = "their gradients came to no parameter that the attached optimizer updates"


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)


def loop_gram(model: nn.Module, *batches: int) -> Tensor:
    """Inner products of the gradients of each example's own loss, in float64."""
    model = copy.deepcopy(model).double()
    rows = []
    for x, y in (batch(number) for number in batches):
        for row in range(N):
            loss = F.cross_entropy(model(x[row : row + 1].double()), y[row : row + 1])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    truth = torch.stack(rows)
    return truth @ truth.T


class Loop:
    """A training, recorded or not."""

    def __init__(self, path: Path | None, model: nn.Module, optimizer: Any, **options: Any) -> None:
        self.model, self.optimizer = model, optimizer
        self.recorder: sonde.Recorder | None = None
        if path is not None:
            measures = [
                sonde.Activations(sonde.TRAINING, store=sonde.Full()),
                sonde.OutputGradients(sonde.TRAINING, store=sonde.Full()),
                sonde.ExampleGradients(sonde.TRAINING),
            ]
            self.recorder = sonde.Recorder(
                path, model, measures, when=sonde.every(1), on_error="raise", **options
            ).attach(optimizer)

    def backward(self, number: int, scaler: Any = None, factor: float = 1.0) -> None:
        x, y = batch(number)
        loss = F.cross_entropy(self.model(x), y)
        if self.recorder is not None:
            self.recorder.batch(ids=torch.arange(N) + 10 * number, targets=y, loss=loss)
        loss = loss * factor
        (loss if scaler is None else scaler.scale(loss)).backward()

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()


def zero(loop: Loop, to_none: bool) -> None:
    loop.optimizer.zero_grad(set_to_none=to_none)


def clear(loop: Loop) -> None:
    for parameter in loop.model.parameters():
        parameter.grad = None


def thrown_away_by(how: Callable[[Loop], None]) -> Callable[[Loop], None]:
    def train(loop: Loop) -> None:
        loop.backward(1)
        how(loop)
        loop.backward(2)
        loop.optimizer.step()

    return train


def skipped(factor: float, *, clips: bool = False, to_none: bool = True) -> Callable[[Loop], None]:
    """A GradScaler skips the first update."""

    def train(loop: Loop) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for number in (1, 2):
            loop.optimizer.zero_grad(set_to_none=to_none)
            loop.backward(number, scaler, factor if number == 1 else 1.0)
            if clips:
                scaler.unscale_(loop.optimizer)
                torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
            scaler.step(loop.optimizer)
            scaler.update()

    return train


WAYS: dict[str, Callable[[Loop], None]] = {
    "set to None": thrown_away_by(lambda loop: zero(loop, True)),
    "set to zero": thrown_away_by(lambda loop: zero(loop, False)),
    "by the model": thrown_away_by(lambda loop: loop.model.zero_grad()),
    "each": thrown_away_by(clear),
    "infinite": skipped(float("inf")),
    "no number": skipped(float("nan"), to_none=False),
    "clipped": skipped(float("inf"), clips=True),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_was_thrown_away_is_dropped_and_said(way: str, fused: bool, tmp_path: Path) -> None:
    def train(path: Path | None) -> tuple[Loop, nn.Module]:
        model = make_model()
        untrained = copy.deepcopy(model)
        loop = Loop(path, model, torch.optim.Adam(model.parameters(), lr=0.01, fused=fused))
        WAYS[way](loop)
        return loop, untrained

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SondeWarning)
        loop, untrained = train(tmp_path / "run")
        loop.close()
    said = [str(one.message) for one in caught]
    assert len(said) == 1
    assert f"at step 0 leave out a batch that passed through the model, because {GONE}" in said[0]
    bare, _ = train(None)
    assert all(map(torch.equal, loop.model.parameters(), bare.model.parameters()))

    run = sonde.open_run(tmp_path / "run")
    for measure in ("activations", "output_gradients", "example_gradients"):
        log = run[measure]
        assert log.steps == [0]
        assert log.attributes(0)["micro_batches"] == [N]
        assert log.attributes(0)["dropped"] == {GONE: 1}
        np.testing.assert_array_equal(log.ids_at(0), np.arange(N) + 20)
    x, _ = batch(2)
    np.testing.assert_array_equal(
        features(run, "activations", "0"), untrained.get_submodule("0")(x).detach()
    )
    gram = run["example_gradients"].gram(0)
    np.testing.assert_allclose(gram, loop_gram(untrained, 2), rtol=1e-4, atol=1e-6)
    (coverage,) = [note for note in run.notes if note["event"] == "coverage"]
    assert set(coverage["parameters"].values()) == {"exact"}
    assert [note["passes"] for note in run.notes if note["event"] == "dropped"] == [1]


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("scales", [False, True])
def test_passes_that_count_are_kept(clips: bool, scales: bool, tmp_path: Path) -> None:
    """Accumulated, unscaled, clipped: changed, but there."""
    model = make_model()
    untrained = copy.deepcopy(model)
    loop = Loop(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scales else None
    loop.optimizer.zero_grad(set_to_none=False)
    for number in (1, 2, 3):
        loop.backward(number, scaler)
        if clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    if scaler is None:
        loop.optimizer.step()
    else:
        scaler.unscale_(loop.optimizer)
        scaler.step(loop.optimizer)
    loop.close()
    log = sonde.open_run(tmp_path / "run")["example_gradients"]
    assert log.attributes(0)["micro_batches"] == [N] * 3
    assert "dropped" not in log.attributes(0)
    np.testing.assert_allclose(log.gram(0), loop_gram(untrained, 1, 2, 3), rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_zero_has_not_been_thrown_away(tmp_path: Path) -> None:
    """A ReLU that no example passes: its weights' gradients are zero all the time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(-100.0)
    loop = Loop(tmp_path / "run", model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    for number in (1, 2):
        loop.backward(number)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    loop.optimizer.step()
    loop.close()
    log = sonde.open_run(tmp_path / "run")["activations"]
    assert log.attributes(0)["micro_batches"] == [N, N]


def test_a_gradient_that_is_only_asked_for_says_nothing(tmp_path: Path) -> None:
    """A loop that adds up what autograd.grad hands out: no `.grad` is there in between."""
    model = make_model()
    untrained = copy.deepcopy(model)
    loop = Loop(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert loop.recorder is not None
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for number in (1, 2):
        x, y = batch(number)
        loss = F.cross_entropy(model(x), y)
        loop.recorder.batch(loss=loss)
        for added, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            added += gradient
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    loop.optimizer.step()
    loop.close()
    log = sonde.open_run(tmp_path / "run")["example_gradients"]
    assert log.attributes(0)["micro_batches"] == [N, N]
    np.testing.assert_allclose(log.gram(0), loop_gram(untrained, 1, 2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at_step", [False, True])
def test_a_parameter_whose_gradient_is_gone_is_named(at_step: bool, tmp_path: Path) -> None:
    model = make_model()
    loop = Loop(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.1))
    weight = model.get_parameter("0.weight")
    loop.backward(1)
    if not at_step:
        weight.grad = None
    loop.backward(2)
    if at_step:
        assert weight.grad is not None
        weight.grad.zero_()
    with pytest.warns(SondeWarning, match=r"0\.weight: its gradients of [12] of 2 micro-batches"):
        loop.optimizer.step()
    loop.close()
    run = sonde.open_run(tmp_path / "run")
    (coverage,) = [note for note in run.notes if note["event"] == "coverage"]
    unsupported = [name for name, how in coverage["parameters"].items() if how != "exact"]
    assert unsupported == ["0.weight"]
    assert run["activations"].attributes(0)["micro_batches"] == [N, N]


def test_where_nothing_counts_nothing_is_recorded(tmp_path: Path) -> None:
    model = make_model()
    loop = Loop(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.1))
    loop.backward(1)
    loop.optimizer.zero_grad()
    with pytest.warns(SondeWarning) as caught:
        loop.optimizer.step()
    said = [str(one.message) for one in caught]
    assert sum("no pass counted, as their gradients were gone" in one for one in said) == 3
    assert sum("leave out a batch" in one for one in said) == 1
    loop.backward(2)
    loop.optimizer.step()
    loop.close()
    assert sonde.open_run(tmp_path / "run")["activations"].steps == [1]


class GAN(nn.Module):
    """Two networks, each trained by an optimizer of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        self.critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def critic_loss(gan: GAN, x: Tensor, z: Tensor) -> Tensor:
    real, made = gan.critic(x), gan.critic(gan.generator(z).detach())
    ones = torch.ones(len(x), 1)
    loss: Tensor = F.binary_cross_entropy_with_logits(real, ones) + made.exp().mean()
    return loss


def generator_loss(gan: GAN, z: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(gan.critic(gan.generator(z)), torch.ones(len(z), 1))


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("recorded", ["critic", "generator of all"])
def test_a_pass_of_the_other_network_of_a_gan_does_not_count(
    recorded: str, to_none: bool, tmp_path: Path
) -> None:
    """The generator's loss leaves gradients in the critic, which are thrown away."""
    gan, num_rounds = GAN(), 3
    of_generator = torch.optim.SGD(gan.generator.parameters(), lr=0.1)
    of_critic = torch.optim.SGD(gan.critic.parameters(), lr=0.1)
    is_critic = recorded == "critic"
    measures = [sonde.Activations(sonde.TRAINING, store=sonde.Full())]
    expected = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SondeWarning)
        with sonde.Recorder(
            tmp_path / "run",
            gan.critic if is_critic else gan,
            measures,
            when=sonde.every(1),
            on_error="raise",
        ) as recorder:
            recorder.attach(of_critic if is_critic else of_generator)
            for number in range(num_rounds):
                x, z = batch(number)[0], batch(number + 9)[0][:, :3]
                before = copy.deepcopy(gan)
                of_critic.zero_grad(to_none)
                critic_loss(gan, x, z).backward()
                of_critic.step()
                if not is_critic:
                    before = copy.deepcopy(gan)
                seen = x if is_critic else before.generator(z)
                expected.append(before.critic[0](seen).detach())
                of_generator.zero_grad(to_none)
                generator_loss(gan, z).backward()
                of_generator.step()
            assert recorder.num_steps == num_rounds
    log = sonde.open_run(tmp_path / "run")["activations"]
    assert log.steps == list(range(num_rounds))
    layer = "0" if is_critic else "critic.0"
    for step in log.steps:
        np.testing.assert_array_equal(log[layer].features(step), expected[step])
        has_dropped = step > 0 if is_critic else True
        reason = GONE if is_critic else NOT_UPDATED
        assert log.attributes(step).get("dropped") == ({reason: 1} if has_dropped else None)
    (said,) = [str(one.message) for one in caught if "leave out a batch" in str(one.message)]
    assert (GONE if is_critic else NOT_UPDATED) in said


@pytest.mark.parametrize("to_none", [True, False])
def test_a_first_pass_that_only_moves_the_weights_is_dropped(tmp_path: Path, to_none: bool) -> None:
    """Sharpness-aware minimization by hand, with its inner optimizer attached."""
    model = make_model()
    loop = Loop(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.1))
    loop.backward(1)
    moves = [0.05 * p.grad for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        for parameter, move in zip(model.parameters(), moves, strict=True):
            parameter.add_(move)
    zero(loop, to_none)
    expected = loop_gram(model, 2)
    loop.backward(2)
    with torch.no_grad():
        for parameter, move in zip(model.parameters(), moves, strict=True):
            parameter.sub_(move)
    with pytest.warns(SondeWarning, match=GONE):
        loop.optimizer.step()
    loop.close()
    run = sonde.open_run(tmp_path / "run")
    log = run["example_gradients", "training"]
    ids = log.ids_at(0)
    assert ids is not None
    assert ids.tolist() == list(range(20, 20 + N))
    assert log.attributes(0)["dropped"] == {GONE: 1}
    assert torch.allclose(torch.from_numpy(log.gram(0)), expected, rtol=1e-4, atol=1e-7)
