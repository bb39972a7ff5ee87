from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sonde.hooks.losses import example_losses


def wrapped(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def test_cross_entropy_gives_what_it_gives_of_each_example_alone() -> None:
    outputs = torch.randn(6, 5, generator=torch.manual_seed(0), requires_grad=True)
    targets = torch.tensor([0, 4, -100, 2, 2, 1])  # The third is ignored: 0 / 0.

    at_once = example_losses(F.cross_entropy, outputs, targets, len(targets))

    assert at_once.isnan().tolist() == [False, False, True, False, False, False]
    torch.testing.assert_close(
        at_once,
        example_losses(wrapped, outputs, targets, len(targets)),
        rtol=1e-6,
        atol=0,
        equal_nan=True,
    )


def test_the_gradient_of_cross_entropy_is_that_of_each_example_alone() -> None:
    outputs = torch.randn(6, 5, generator=torch.manual_seed(0), requires_grad=True)
    targets = torch.arange(6) % 5

    (at_once,) = torch.autograd.grad(
        example_losses(F.cross_entropy, outputs, targets, len(targets)).sum(), outputs
    )
    (alone,) = torch.autograd.grad(example_losses(wrapped, outputs, targets, 6).sum(), outputs)

    torch.testing.assert_close(at_once, alone, rtol=1e-5, atol=1e-7)


def test_probabilities_and_positions_of_an_example_are_averaged_alone() -> None:
    outputs = torch.randn(3, 5, 4, generator=torch.manual_seed(0))
    targets = torch.randint(5, (3, 4), generator=torch.manual_seed(1))
    soft = torch.softmax(outputs[..., 0], 1)

    of_positions = example_losses(F.cross_entropy, outputs, targets, len(targets))
    of_soft = example_losses(F.cross_entropy, outputs[..., 0], soft, 3)

    expected = [F.cross_entropy(outputs[n : n + 1], targets[n : n + 1]) for n in range(3)]
    torch.testing.assert_close(of_positions, torch.stack(expected))
    expected = [F.cross_entropy(outputs[n : n + 1, :, 0], soft[n : n + 1]) for n in range(3)]
    torch.testing.assert_close(of_soft, torch.stack(expected))
