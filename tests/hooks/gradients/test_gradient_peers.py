"""Per-example gradients against those of Opacus and BackPACK, on the layers these support."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde

from .gradient_loop import kinds

NUM_EXAMPLES = 5


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 3, stride=2, dilation=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 169, 5),
        nn.Sigmoid(),
        nn.Linear(5, 3, bias=False),
    )


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(2),
        nn.LayerNorm(49),
        nn.Flatten(),
        nn.Linear(4 * 49, 3),
    )


def batch_norm() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(162, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 2)
    return model.eval()


class Words(nn.Module):
    """Embedded tokens, summed over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)  # Opacus knows no padding_idx.
        self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.out(self.mix(self.embedding(tokens)).tanh().sum(1)))


IMAGES = torch.randn(NUM_EXAMPLES, 2, 9, 9, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(NUM_EXAMPLES * 4).reshape(NUM_EXAMPLES, 4) % 9
TARGETS = torch.arange(NUM_EXAMPLES) % 3


def ours(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    result = sonde.example_gradients(
        model, F.cross_entropy, inputs, TARGETS, store=sonde.Full(), batch_size=3
    )
    assert kinds(result) == {}
    return result.parameters


@pytest.mark.parametrize(
    ("build", "inputs"),
    [(conv_net, IMAGES.double()), (norms, IMAGES.double()), (Words, TOKENS)],
    ids=["convolutions", "norms", "words"],
)
def test_opacus_agrees(build: type[nn.Module], inputs: Tensor) -> None:
    opacus = pytest.importorskip("opacus")
    torch.manual_seed(0)
    model = build().double()
    expected = ours(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Its own, about hooks of torch.
        peer = opacus.GradSampleModule(model, loss_reduction="sum", strict=False)
        F.cross_entropy(peer(inputs), TARGETS, reduction="sum").backward()
    for name, parameter in model.named_parameters():
        theirs: Tensor = vars(parameter)["grad_sample"]
        torch.testing.assert_close(expected[name], theirs, msg=name)


@pytest.mark.parametrize("build", [conv_net, batch_norm], ids=["convolutions", "batch norm"])
def test_backpack_agrees(build: type[nn.Module]) -> None:
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import BatchGrad

    torch.manual_seed(0)
    model, inputs = build().double(), IMAGES.double()
    expected = ours(model, inputs)
    extended = backpack.extend(model)
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    with warnings.catch_warnings(), backpack.backpack(BatchGrad()):
        warnings.simplefilter("ignore")  # Its own, about hooks of torch.
        loss(extended(inputs), TARGETS).backward()
    for name, parameter in model.named_parameters():
        theirs: Tensor = vars(parameter)["grad_batch"]
        torch.testing.assert_close(expected[name], theirs, msg=name)
