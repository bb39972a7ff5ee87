"""Models and layers whose per-example gradients are measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


@dataclass(frozen=True)
class Subject:
    """A model and a batch.

    Attributes:
        model: The model.
        inputs: What it is called with, [examples, …].
        targets: A class for each example.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Subject:
        """Return it on a device."""
        return Subject(self.model.to(device), self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class LayerSubject:
    """A layer and a batch.

    Attributes:
        layer: The layer of torch's.
        inputs: What it is called with, [examples, …].
        stand_in: The name of what Opacus has in its place, in `opacus.layers`.
        options: What both are made with.
    """

    layer: nn.Module
    inputs: Tensor
    stand_in: str | None = None
    options: tuple[int, ...] = ()

    def to(self, device: torch.device) -> LayerSubject:
        """Return it on a device."""
        moved = self.layer.to(device), self.inputs.to(device)
        return LayerSubject(*moved, self.stand_in, self.options)


def mlp() -> nn.Module:
    """Return four hidden layers of 512."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(512, 512), nn.ReLU())]
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), *hidden, nn.Linear(512, 10))


def cnn() -> nn.Module:
    """Return three convolutions of 3 × 3, pooled, for images of 32 × 32."""
    layers: list[nn.Module] = []
    for num_in, num_out in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(num_in, num_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))


def resnet() -> nn.Module:
    """Return a ResNet-18 with GroupNorm, as BatchNorm couples the examples."""
    return torchvision.models.resnet18(num_classes=10, norm_layer=partial(nn.GroupNorm, 8))


def vit() -> nn.Module:
    """Return a ViT-tiny for images of 32 × 32."""
    return torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=4,
        num_layers=12,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        num_classes=10,
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-512⁴-10": (mlp, (128, 784)),
    "CNN, 3 convolutions": (cnn, (64, 3, 32, 32)),
    "ResNet-18, GroupNorm": (resnet, (32, 3, 32, 32)),
    "ViT-tiny": (vit, (32, 3, 32, 32)),
}
"""How each model is made, and the shape of its batch, [examples, …]."""


def make_subject(name: str) -> Subject:
    """Return a model and a batch of random inputs."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    return Subject(make().train(), torch.randn(shape), torch.arange(shape[0]) % 10)


class _OutOfPlaceBlock(BasicBlock):
    """A block of a ResNet, without operations in place."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def without_in_place(model: nn.Module) -> nn.Module:
    """Return a copy without operations in place, which hooks on modules do not allow."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
        elif isinstance(module, BasicBlock):
            module.__class__ = _OutOfPlaceBlock
    return model


class FirstOutput(nn.Module):
    """The first output of a layer that has several; of attention, to itself."""

    def __init__(self, layer: nn.Module, *, is_attention: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.is_attention = is_attention

    def forward(self, x: Tensor) -> Tensor:
        """Return the first output."""
        output: Tensor = (self.layer(x, x, x) if self.is_attention else self.layer(x))[0]
        return output


def make_layers() -> dict[str, LayerSubject]:
    """Return the kinds of layers that Opacus measures itself, on 64 examples each."""
    torch.manual_seed(0)
    sequence = torch.randn(64, 32, 100)
    recurrent = {
        kind.__name__: LayerSubject(
            FirstOutput(kind(100, 100, batch_first=True)),
            sequence,
            f"DP{kind.__name__}",
            (100, 100),
        )
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
    }
    attention = FirstOutput(nn.MultiheadAttention(100, 4, batch_first=True), is_attention=True)
    return {
        "Linear": LayerSubject(nn.Linear(512, 512), torch.randn(64, 512)),
        "Conv1d": LayerSubject(nn.Conv1d(64, 64, 3), torch.randn(64, 64, 128)),
        "Conv2d": LayerSubject(nn.Conv2d(32, 64, 3), torch.randn(64, 32, 16, 16)),
        "Embedding": LayerSubject(nn.Embedding(2000, 100), torch.randint(2000, (64, 64))),
        "LayerNorm": LayerSubject(nn.LayerNorm(256), torch.randn(64, 64, 256)),
        "GroupNorm": LayerSubject(nn.GroupNorm(16, 256), torch.randn(64, 256, 8, 8)),
        "InstanceNorm": LayerSubject(
            nn.InstanceNorm2d(256, affine=True), torch.randn(64, 256, 8, 8)
        ),
        "MultiheadAttention": LayerSubject(
            attention, torch.randn(64, 32, 100), "DPMultiheadAttention", (100, 4)
        ),
        **recurrent,
    }
