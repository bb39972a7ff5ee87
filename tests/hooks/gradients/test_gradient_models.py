"""Per-example gradients of whole models: every parameter is covered, and as the loop has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.hooks.losses.per_example import Loss
from tests.hooks.devices import DEVICES
from tests.hooks.models import GPT, LSTMClassifier, Mixer

from .gradient_loop import (
    TOLERANCE,
    as_double,
    assert_same_gradients,
    assert_same_gram,
    kinds,
    loop_gradients,
    map_inputs,
    num_examples_of,
)

pytest.importorskip("torchvision")
from torchvision import models
from torchvision.models.swin_transformer import SwinTransformer

NUM_EXAMPLES = 4


@dataclass(frozen=True)
class Case:
    """A model, and one batch for it; a rule covers each of its parameters."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    loss: Loss = F.cross_entropy
    is_slow: bool = False


def images(*size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(NUM_EXAMPLES, *size)


def words(num: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 11, (NUM_EXAMPLES, num))


def token_loss(outputs: Tensor, _: Tensor) -> Tensor:
    targets = torch.arange(outputs.shape[1], device=outputs.device) % outputs.shape[2]
    targets = targets.expand(len(outputs), -1)
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def pixel_loss(outputs: Tensor, _: Tensor) -> Tensor:
    return outputs.square().mean()


def trained_batch_norm(model: nn.Module) -> nn.Module:
    """Statistics that are not those of a new layer."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 2)
    return model


class UNet(nn.Module):
    """An encoder, a decoder that upsamples by transposed convolutions, and paths between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down_1, self.down_2 = self.block(1, 4), self.block(4, 8)
        self.middle = self.block(8, 8)
        self.up_2 = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.merge_2 = self.block(16, 4)
        self.up_1 = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1)
        self.merge_1 = self.block(8, 4)
        self.head = nn.Conv2d(4, 2, 1)

    @staticmethod
    def block(channels: int, width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(2, width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect"),
            nn.PReLU(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.down_1(x)
        second = self.down_2(F.max_pool2d(first, 2))
        x = self.middle(F.max_pool2d(second, 2))
        x = self.merge_2(torch.cat([self.up_2(x), second], 1))
        x = self.merge_1(torch.cat([self.up_1(x), first], 1))
        return torch.as_tensor(self.head(x))


CASES = {
    "ResNet-18 with GroupNorm": Case(
        lambda: models.resnet18(num_classes=5, norm_layer=partial(nn.GroupNorm, 8)),
        images(3, 32, 32),
        is_slow=True,
    ),
    "ResNet-18 with BatchNorm": Case(
        lambda: trained_batch_norm(models.resnet18(num_classes=5)), images(3, 32, 32), is_slow=True
    ),
    "vision transformer": Case(
        lambda: models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=5), images(3, 16, 16)
    ),
    "Swin": Case(
        lambda: SwinTransformer([2, 2], 8, [2, 2], [2, 2], [2, 2], num_classes=5),
        images(3, 16, 16),  # Windows have as many tokens as there are examples.
    ),
    "ConvNeXt": Case(
        lambda: models.ConvNeXt(
            [
                models.convnext.CNBlockConfig(8, 16, 1),
                models.convnext.CNBlockConfig(16, None, 1),
            ],
            num_classes=5,
        ),
        images(3, 16, 16),
    ),
    "MobileNetV3": Case(
        lambda: trained_batch_norm(models.mobilenet_v3_small(num_classes=5)),
        images(3, 32, 32),
        is_slow=True,
    ),
    "GPT with tied weights": Case(GPT, words(6), token_loss),
    "GPT with as many tokens as examples": Case(GPT, words(NUM_EXAMPLES), token_loss),
    "Mixer": Case(Mixer, images(3, 8, 8)),
    "LSTM classifier": Case(LSTMClassifier, images(5, 4)),
    "U-Net": Case(UNet, images(1, 8, 8), pixel_loss),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_every_parameter_of_a_model_is_covered(name: str, device: str, is_full: bool) -> None:
    case = CASES[name]
    if case.is_slow and device == "cpu" and not is_full:
        pytest.skip("takes seconds: run with --full")
    torch.manual_seed(0)
    model = case.build().double().eval().to(device)
    inputs = map_inputs(as_double(case.inputs()), lambda x: x.to(device))
    targets = torch.arange(num_examples_of(inputs), device=device) % 5
    full = sonde.example_gradients(model, case.loss, inputs, targets, store=sonde.Full())
    assert kinds(full) == {}
    expected = loop_gradients(model, case.loss, inputs, targets)
    assert_same_gradients(full, expected)
    gram = sonde.example_gradients(model, case.loss, inputs, targets, batch_size=3)
    assert_same_gram(gram.total, expected)


def test_single_precision_is_close() -> None:
    torch.manual_seed(0)
    model, inputs, targets = UNet().eval(), torch.randn(6, 1, 8, 8), torch.arange(6)
    full = sonde.example_gradients(model, pixel_loss, inputs, targets, store=sonde.Full())
    gram = sonde.example_gradients(model, pixel_loss, inputs, targets)
    expected = loop_gradients(model.double(), pixel_loss, inputs.double(), targets)
    assert_same_gradients(full, expected, 1e-5)
    assert_same_gram(gram.total, expected, tolerance=1e-5)


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if name == "GPT-2":
        config = transformers.GPT2Config(
            vocab_size=11,
            n_positions=8,
            n_embd=8,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        model: nn.Module = transformers.GPT2LMHeadModel(config)
        return model
    small: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 8,
    }
    if name == "Llama":
        llama: nn.Module = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**small, num_key_value_heads=1)
        )
        return llama
    bert: nn.Module = transformers.BertForSequenceClassification(
        transformers.BertConfig(**small, num_labels=3)
    )
    return bert


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama"])
@pytest.mark.parametrize("num_tokens", [NUM_EXAMPLES, 6])
def test_models_that_return_their_loss(name: str, num_tokens: int) -> None:
    torch.manual_seed(0)
    model = hugging_face(name).double().eval()
    tokens = torch.randint(1, 11, (NUM_EXAMPLES, num_tokens))
    labels = torch.arange(NUM_EXAMPLES) % 3 if name == "BERT" else tokens
    mask = torch.ones_like(tokens)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    full = sonde.example_gradients(model, None, inputs, store=sonde.Full())
    assert kinds(full) == {}
    expected = loop_gradients(model, lambda outputs, _: outputs.loss, inputs, tokens)
    # The loss of language models is of float32 logits, in the loop in float32, too.
    assert_same_gradients(full, expected, TOLERANCE if name == "BERT" else 1e-6)
