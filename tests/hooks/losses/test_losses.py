"""Losses of examples alone, against a loop over them in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import exp

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sonde.hooks.losses import float64_heads
from sonde.hooks.losses import per_example as losses
from sonde.hooks.losses.per_example import Loss, example_losses

NUM_EXAMPLES, NUM_CLASSES, NUM_TOKENS = 6, 10, 7
WEIGHT = torch.rand(NUM_CLASSES, generator=torch.manual_seed(0)) + 0.5
POSITIVE = torch.rand(NUM_CLASSES, generator=torch.manual_seed(1)) + 0.5


def wrapped(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def classes(margin: float) -> tuple[Tensor, Tensor]:
    """Scores of which the true class's is larger by about a margin, and the true classes."""
    scores = torch.randn(NUM_EXAMPLES, NUM_CLASSES, generator=torch.manual_seed(0))
    targets = torch.arange(NUM_EXAMPLES) % NUM_CLASSES
    scores[torch.arange(NUM_EXAMPLES), targets] += margin
    return scores, targets


def tokens(margin: float) -> tuple[Tensor, Tensor]:
    """The same for positions, [examples, classes, positions], of which some are ignored."""
    generator = torch.manual_seed(0)
    scores = torch.randn(NUM_EXAMPLES, NUM_CLASSES, NUM_TOKENS, generator=generator)
    targets = torch.randint(NUM_CLASSES, (NUM_EXAMPLES, NUM_TOKENS), generator=generator)
    scores.scatter_add_(1, targets[:, None], torch.full((NUM_EXAMPLES, 1, NUM_TOKENS), margin))
    targets[0, 0], targets[1, 3:] = -100, -100
    return scores, targets


def labels(margin: float) -> tuple[Tensor, Tensor]:
    """Scores of labels that are all right by about a margin, and the labels."""
    generator = torch.manual_seed(0)
    targets = (torch.rand(NUM_EXAMPLES, NUM_CLASSES, generator=generator) > 0.5).float()
    noise = torch.randn(NUM_EXAMPLES, NUM_CLASSES, generator=generator)
    return (2 * targets - 1) * margin + noise, targets


CASES: dict[str, tuple[Loss, Callable[[float], tuple[Tensor, Tensor]]]] = {
    "cross entropy": (F.cross_entropy, classes),
    "its module": (nn.CrossEntropyLoss(), classes),
    "its sum, weighted": (partial(F.cross_entropy, weight=WEIGHT, reduction="sum"), classes),
    "its mean, weighted": (nn.CrossEntropyLoss(WEIGHT), tokens),
    "smoothed": (partial(F.cross_entropy, label_smoothing=0.1, weight=WEIGHT), tokens),
    "another target ignored": (nn.CrossEntropyLoss(ignore_index=3), classes),
    "a function of it": (wrapped, classes),
    "of tokens": (wrapped, tokens),
    "cast to float32 inside": (lambda out, y: F.cross_entropy(out.float(), y, WEIGHT), classes),
    "NLL of log-softmax": (lambda out, y: F.nll_loss(out.log_softmax(1), y, WEIGHT), classes),
    "logarithm of softmax": (lambda out, y: F.nll_loss(out.softmax(1).log(), y), classes),
    "binary with logits": (
        lambda out, y: F.binary_cross_entropy_with_logits(out, y, pos_weight=POSITIVE),
        labels,
    ),
    "binary of sigmoid": (lambda out, y: F.binary_cross_entropy(out.sigmoid(), y), labels),
    "binary by hand": (
        lambda out, y: -(y * out.sigmoid().log() + (1 - y) * (1 - out.sigmoid()).log()).mean(),
        labels,
    ),
    "squares": (F.mse_loss, labels),
    "with a matrix in float32": (
        lambda out, y: ((out - y) @ torch.ones(NUM_CLASSES, 2)).square().sum(),
        labels,
    ),
}


def own_gradients(loss: Loss, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of examples alone, and their gradients with respect to the outputs."""
    outputs = outputs.clone().requires_grad_()
    found = example_losses(loss, outputs, targets, len(targets))
    return found.detach(), torch.autograd.grad(found.sum(), outputs)[0]


def loop(loss: Loss, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same in a loop in float64, where weights of the loss are float64, too."""
    targets = targets.double() if targets.is_floating_point() else targets
    outputs = outputs.double().requires_grad_()
    found = []
    for row in range(len(targets)):
        rows = slice(row, row + 1)
        found.append(in_double(loss)(outputs[rows], targets[rows]))
    total = torch.stack(found)
    return total.detach(), torch.autograd.grad(total.sum(), outputs)[0]


def in_double(loss: Loss) -> Loss:
    """A loss with its weights in float64; those that were cases are written out."""
    doubles: dict[Loss, Loss] = {
        CASES["its sum, weighted"][0]: partial(
            F.cross_entropy, weight=WEIGHT.double(), reduction="sum"
        ),
        CASES["its mean, weighted"][0]: nn.CrossEntropyLoss(WEIGHT.double()),
        CASES["smoothed"][0]: partial(F.cross_entropy, label_smoothing=0.1, weight=WEIGHT.double()),
        CASES["cast to float32 inside"][0]: lambda x, y: F.cross_entropy(x, y, WEIGHT.double()),
        CASES["NLL of log-softmax"][0]: lambda x, y: F.nll_loss(
            x.log_softmax(1), y, WEIGHT.double()
        ),
        CASES["binary with logits"][0]: lambda x, y: F.binary_cross_entropy_with_logits(
            x, y, pos_weight=POSITIVE.double()
        ),
        CASES["with a matrix in float32"][0]: lambda x, y: (
            ((x - y) @ torch.ones(NUM_CLASSES, 2).double()).square().sum()
        ),
    }
    return doubles.get(loss, loss)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Each example agrees, relative to its own norm; one that is ignored has none."""
    difference = (actual.double() - expected).reshape(len(actual), -1).norm(dim=1)
    norms = expected.reshape(len(actual), -1).norm(dim=1)
    is_there = ~norms.isnan()
    assert float((difference / norms.clamp(min=1e-300))[is_there].max()) < tolerance


def rounding_of(margin: float) -> float:
    """How far softmax − one-hot in float64 itself is off: 1 − p is exp(−margin) or so."""
    return 2.0**-52 * exp(margin + 4)


@pytest.mark.parametrize("margin", [1.0, 17.0, 25.0])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_of_float32_outputs_are_those_of_float64(
    name: str, margin: float
) -> None:
    loss, make = CASES[name]
    outputs, targets = make(margin)

    actual = own_gradients(loss, outputs, targets)
    expected = loop(loss, outputs, targets)

    # One rounding to float32, 6e-8, of each entry of a gradient.
    assert_close(actual[1], expected[1], 2e-7 + rounding_of(margin))
    is_cast = name == "cast to float32 inside"
    assert (actual[0].dtype == torch.float64) != is_cast
    assert_close(actual[0], expected[0], (1e-6 if is_cast else 1e-12) + rounding_of(margin))


@pytest.mark.parametrize("margin", [1.0, 17.0, 25.0])
@pytest.mark.parametrize("name", CASES)
def test_the_same_where_float64_is_dear(
    name: str, margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, make = CASES[name]
    outputs, targets = make(margin)
    for module in (float64_heads, losses):
        monkeypatch.setattr(module, "WIDE_BYTES", 100)

    actual = own_gradients(loss, outputs, targets)
    expected = loop(loss, outputs, targets)

    # Cross entropy in float32: the other classes' shares are exp of a number of the margin's size,
    # which is rounded to 2e-6 of it at most.
    assert_close(actual[1], expected[1], 1e-5 + rounding_of(margin))
    assert_close(actual[0], expected[0], 1e-5 + rounding_of(margin))


def test_half_precision_outputs_are_seen_in_float64() -> None:
    outputs, targets = classes(20)
    halves = outputs.bfloat16()

    actual = own_gradients(F.cross_entropy, halves, targets)
    expected = loop(F.cross_entropy, halves, targets)

    assert_close(actual[0], expected[0], rounding_of(20))
    assert_close(actual[1], expected[1], 5e-3)  # bfloat16 keeps 8 bits.


def test_the_loss_of_a_confident_example_is_not_zero() -> None:
    outputs = torch.tensor([[20.7233, 0.0]])  # exp(-20.7233) = 1e-9
    targets = torch.tensor([0])

    assert F.cross_entropy(outputs, targets).item() == 0
    assert example_losses(F.cross_entropy, outputs, targets, 1).item() == pytest.approx(1e-9, 1e-4)
    assert example_losses(wrapped, outputs, targets, 1).item() == pytest.approx(1e-9, 1e-4)


@pytest.mark.parametrize("margin", [50.0, 80.0])
def test_cross_entropy_keeps_its_digits_where_float64_itself_rounds(margin: float) -> None:
    outputs, targets = classes(0)
    outputs[torch.arange(NUM_EXAMPLES), targets] = margin

    _, actual = own_gradients(F.cross_entropy, outputs, targets)

    # By hand: exp(x_k − margin) of the others, and minus their sum.
    shares = (outputs.double() - margin).exp()
    shares[torch.arange(NUM_EXAMPLES), targets] = 0
    shares[torch.arange(NUM_EXAMPLES), targets] = -shares.sum(1)
    assert_close(actual, shares, 2e-7)


@pytest.mark.parametrize("lowest", [-float("inf"), 0.0])
def test_masked_classes_have_no_gradient(lowest: float) -> None:
    outputs = torch.tensor([[3.0, lowest, -float("inf")]])

    _, actual = own_gradients(F.cross_entropy, outputs, torch.tensor([0]))

    _, expected = loop(F.cross_entropy, outputs, torch.tensor([0]))
    torch.testing.assert_close(actual.double(), expected)


def test_a_diverged_example_is_not_taken_for_a_certain_one() -> None:
    outputs = torch.tensor([[float("inf"), 0.0, 1.0]])

    found, gradient = own_gradients(F.cross_entropy, outputs, torch.tensor([0]))

    assert bool(found.isnan().all())
    assert bool(gradient.isnan().any())


def test_a_loss_that_takes_float32_only_sees_the_outputs_as_they_are() -> None:
    def only_float32(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.dtype != torch.float32:
            raise TypeError("expected float32")
        return F.mse_loss(outputs, targets)

    outputs, targets = labels(1)
    heads = float64_heads.Float64Heads()

    found = example_losses(only_float32, outputs, targets, NUM_EXAMPLES, heads=heads)

    torch.testing.assert_close(found, (outputs - targets).square().mean(1))
    assert heads.refusal == "expected float32"


def test_cross_entropy_gives_what_it_gives_of_each_example_alone() -> None:
    outputs = torch.randn(6, 5, generator=torch.manual_seed(0), requires_grad=True)
    targets = torch.tensor([0, 4, -100, 2, 2, 1])  # The third is ignored: 0 / 0.

    at_once = example_losses(F.cross_entropy, outputs, targets, len(targets))

    assert at_once.isnan().tolist() == [False, False, True, False, False, False]
    torch.testing.assert_close(
        at_once,
        example_losses(wrapped, outputs, targets, len(targets)),
        rtol=1e-12,
        atol=0,
        equal_nan=True,
    )


def test_probabilities_and_positions_of_an_example_are_averaged_alone() -> None:
    outputs = torch.randn(3, 5, 4, generator=torch.manual_seed(0))
    targets = torch.randint(5, (3, 4), generator=torch.manual_seed(1))
    soft = torch.softmax(outputs[..., 0], 1)

    of_positions = example_losses(F.cross_entropy, outputs, targets, len(targets))
    of_soft = example_losses(F.cross_entropy, outputs[..., 0], soft, 3)

    expected = [F.cross_entropy(outputs[n : n + 1], targets[n : n + 1]) for n in range(3)]
    torch.testing.assert_close(of_positions.float(), torch.stack(expected))
    expected = [F.cross_entropy(outputs[n : n + 1, :, 0], soft[n : n + 1]) for n in range(3)]
    torch.testing.assert_close(of_soft.float(), torch.stack(expected))
