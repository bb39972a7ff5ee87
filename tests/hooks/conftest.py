"""Models and data the hook tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.hooks.losses.per_example import Loss


class ConvNet(nn.Sequential):
    """Convolution, BatchNorm, in-place ReLU and dropout: everything that makes recording hard."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(6 * 16, 5),
        )


@pytest.fixture
def images() -> Tensor:
    return torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def classes() -> Tensor:
    return torch.arange(24) % 5


@pytest.fixture
def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    classes: Tensor,
    *,
    num_steps: int = 6,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """An ordinary loop that draws its batches at random; returns the losses."""
    losses = []
    for step in range(1, num_steps + 1):
        batch = torch.randperm(len(images))[:8]
        loss = F.cross_entropy(model(images[batch]), classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after_step(step)
    return losses


def loop_gram(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> Tensor:
    """The Gram matrix of per-example gradients the slow way: one backward pass per example."""
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for row in range(len(inputs)):
        value = loss(model(inputs[row : row + 1]), targets[row : row + 1])
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(gradients, parameters, strict=True)
                ]
            )
        )
    stacked = torch.stack(rows).double()
    return stacked @ stacked.T


def everything(images: Tensor, classes: Tensor) -> list[sonde.hooks.Measure]:
    """Measures of every kind, of one probe."""
    probe = sonde.Probe(images, classes, batch_size=10)
    return [
        sonde.Activations(probe),
        sonde.ExampleGradients(probe, F.cross_entropy),
        sonde.Predictions(probe),
        sonde.DecisionPlanes(images, classes, triplets=3, resolution=6),
        sonde.Scalars(),
    ]
