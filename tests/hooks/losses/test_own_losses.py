"""Losses that are no mean over examples: over labelled tokens, weights, or all examples at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.hooks.losses.graphs import shown_loss

_WEIGHT = torch.tensor([1.0, 5.0, 0.2, 2.0, 1.0])


class Tokens(nn.Module):
    """Returns its loss over labelled tokens, of a branch that hardly counts, as at its start."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.branch, self.out = nn.Linear(8, 8), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.full((8,), 1e-6))
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = x + self.scale * self.branch(x)
        return self.loss(self.out(hidden).flatten(0, 1), labels.flatten())


def masked(logits: Tensor, labels: Tensor) -> Tensor:
    """Divide by the number of labelled tokens by hand."""
    each = F.cross_entropy(logits, labels, reduction="none")
    return each.sum() / (labels != -100).sum()


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": F.cross_entropy,
    "weights": lambda z, y: F.cross_entropy(z, y, weight=_WEIGHT.to(z)),
    "smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "nll": lambda z, y: F.nll_loss(z.log_softmax(1), y),
    "by hand": masked,
}


def tokens(num_labelled: list[int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, labels = torch.randn(len(num_labelled), 7, 8), torch.randint(5, (len(num_labelled), 7))
    for row, number in zip(labels, num_labelled, strict=True):
        row[number:] = -100
    return x, labels


def of_each_alone(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return gradients from a loop in float64."""
    model = copy.deepcopy(model).double()
    rows = []
    for at in range(len(x)):
        loss = model(x[at : at + 1].double(), labels[at : at + 1])
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    names = [name for name, _ in model.named_parameters()]
    return {name: torch.stack(of) for name, of in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("kind", _LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_of_own_losses_in_every_batch(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Tokens(_LOSSES[kind]).to(dtype)
    # The first batch is of full length, and says nothing of those that follow.
    x, labels = tokens([7, 7, 7, 7, 7, 5, 2, 1])
    result = sonde.example_gradients(
        model, None, (x.to(dtype), labels), store=sonde.Full(), batch_size=4
    )
    again = sonde.example_gradients(model, None, (x[4:].to(dtype), labels[4:]), store=sonde.Full())
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    for name, expected in of_each_alone(model, x.to(dtype), labels).items():
        allowed = tolerance * expected.flatten(1).norm(dim=1)
        for rows, right in (
            (result.parameters[name], expected),
            (again.parameters[name], expected[4:]),
        ):
            distance = (rows.double() - right).flatten(1).norm(dim=1)
            assert bool((distance <= allowed[-len(right) :]).all()), name
    if kind != "by hand":
        assert set(result.coverage.values()) == {"exact"}
    else:
        (coverage,) = set(result.coverage.values())
        assert "the loss is a mean over something other than examples" in coverage


def test_wrong_scales_of_small_gradients_are_found() -> None:
    # The graph of a loss by hand does not show what examples weigh, and rounding hides nothing.
    torch.manual_seed(0)
    x, labels = tokens([7, 6, 5, 4])
    model = Tokens(masked)
    result = sonde.example_gradients(model, None, (x, labels), layers=["branch"])
    assert all(of.startswith("fallback") for of in result.coverage.values())


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    """Tell each example from the others."""
    z, other = F.normalize(outputs, dim=1), F.normalize(targets, dim=1)
    return F.cross_entropy(z @ other.T / 0.5, torch.arange(len(z)))


def centred(outputs: Tensor, _: Tensor) -> Tensor:
    return ((outputs - outputs.mean(0)) ** 2).mean()


def ranked(outputs: Tensor, targets: Tensor) -> Tensor:
    order = targets[:, 0].argsort()
    return F.softplus(outputs[order[:-1], 0] - outputs[order[1:], 0]).sum()


@pytest.mark.parametrize("loss", [contrastive, centred, ranked])
def test_losses_that_couple_examples_are_refused_by_name(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x, targets = torch.randn(8, 6), torch.randn(8, 3)
    for _ in range(2):
        coverage = sonde.example_gradients(model, loss, x, targets).coverage
        assert set(coverage.values()) == {"unsupported: the loss couples the examples"}


def test_models_whose_own_loss_couples_examples_are_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor, targets: Tensor) -> Tensor:
            return contrastive(self.layer(x), targets)

    torch.manual_seed(0)
    model, examples = Own(), (torch.randn(8, 6), torch.randn(8, 3))
    for _ in range(2):
        coverage = sonde.example_gradients(model, None, examples).coverage
        assert all("the loss couples the examples" in of for of in coverage.values())
        assert all(of.startswith("unsupported") for of in coverage.values())


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.cross_entropy(z, y, weight=_WEIGHT[:3].to(z)),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
        lambda z, y: (z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]).mean(),
        lambda z, y: (z - F.one_hot(y, 3)).square().mean().sqrt(),
    ],
)
def test_losses_of_single_examples_are_not_refused(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    result = sonde.example_gradients(nn.Linear(4, 3), loss, x, y)
    assert set(result.coverage.values()) == {"exact"}


def recorded_scale(path: Path, loss: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> str:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    measure = sonde.ExampleGradients(sonde.TRAINING)
    recorder = sonde.Recorder(path, model, [measure], when=sonde.every(1)).attach(optimizer)
    value = loss(model(torch.randn(6, 4)), y)
    recorder.batch(ids=torch.arange(6), loss=value)
    value.backward()
    optimizer.step()
    recorder.close()
    return str(sonde.open_run(path)["example_gradients", "training"].attributes(0)["scale"])


_Y = torch.tensor([0, 1, 2, 0, 1, 2])
_IGNORED = torch.tensor([0, 1, -100, 0, 1, 2])


@pytest.mark.parametrize(
    ("loss", "y", "is_own"),
    [
        (F.cross_entropy, _Y, True),
        (lambda z, y: F.mse_loss(z, F.one_hot(y, 3).float()), _Y, True),
        (F.cross_entropy, _IGNORED, False),
        (lambda z, y: F.cross_entropy(z, y, weight=_WEIGHT[:3]), _Y, False),
        (lambda z, y: F.cross_entropy(z, y, reduction="sum"), _Y, False),
        (lambda z, y: F.cross_entropy(z, y) / (y != 0).sum(), _Y, False),
        (lambda z, y: F.cross_entropy(z @ z.T, torch.arange(6)), _Y, False),
        (lambda z, y: F.cross_entropy(z - z.mean(0), y), _Y, False),
        (lambda z, y: F.nll_loss(z.log_softmax(0), y), _Y, False),
    ],
)
def test_in_band_a_row_is_called_of_its_own_loss_only_where_that_shows(
    tmp_path: Path, loss: Callable[[Tensor, Tensor], Tensor], y: Tensor, is_own: bool
) -> None:
    scale = recorded_scale(tmp_path / "run", loss, y)
    expected = "gradient of one example's loss" if is_own else "contribution to the batch's loss"
    assert scale.startswith(expected)


def test_shares_are_those_of_the_weights() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    shown = shown_loss(F.cross_entropy(logits, _IGNORED[:4], weight=_WEIGHT[:3]))
    assert shown is not None
    shares = shown.shares(4)
    assert shares is not None
    # Weights 1, 5, 0 and 1, of 7 in all: 7 / (4 · 1), 7 / (4 · 5), none, 7 / (4 · 1).
    torch.testing.assert_close(shares, torch.tensor([1.75, 0.35, 0.0, 1.75]).double())
