"""Small models of the kinds that people train, and examples for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_CLASSES, NUM_FEATURES = 4, 6
VOCABULARY, NUM_TOKENS, WIDTH = 11, 5, 8


class Classifier(nn.Module):
    """Scores of classes, times a gain that makes a model as sure as a case wants it.

    Args:
        body: What makes features of the inputs, [examples, width].
        width: Their number.
    """

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, NUM_CLASSES)
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.gain * self.head(self.body(x))
        return scores


class LastState(nn.Module):
    """The last state of an LSTM over the columns of images, or of features."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(2, 7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.recurrent(x.unflatten(1, (3, 2)))[0]
        return states[:, -1]


class Branched(nn.Module):
    """A residual branch behind LayerScale, at its usual start of 1e-6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Linear(NUM_FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).tanh()
        branched: Tensor = h + self.scale * self.branch(h)
        return branched


class _ByHand(torch.autograd.Function):
    """x @ w, written by hand: neither a rule nor torch.func can look into it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradients[0] @ weight.T, x.T @ gradients[0]


class ByHand(nn.Module):
    """A layer behind an autograd function, and one of which a script uses the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_FEATURES, WIDTH) / 2)
        self.mixing = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = _ByHand.apply(x, self.weight)
        turned: Tensor = h.tanh() @ torch.linalg.matrix_exp(self.mixing - self.mixing.T)
        return turned.tanh()


class Gpt(nn.Module):
    """A decoder written by hand, whose head is its embedding: scores [examples, tokens, words]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.randn(NUM_TOKENS, WIDTH))
        self.before, self.mixing = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.after, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain = 1.0

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids) + self.places[: ids.shape[1]]
        query, key, value = self.mixing(self.before(h)).chunk(3, -1)
        near = query @ key.mT / WIDTH**0.5
        causal = torch.ones(near.shape[-2:], dtype=torch.bool, device=ids.device).tril()
        h = h + self.out(near.masked_fill(~causal, float("-inf")).softmax(-1) @ value)
        scores = F.linear(self.after(h), self.words.weight) / WIDTH**0.5
        return torch.mul(scores, self.gain)


class OwnLoss(nn.Module):
    """A language model that returns its loss, the mean over labelled tokens; alone or in a dict."""

    def __init__(self, *, in_dict: bool) -> None:
        super().__init__()
        self.gpt, self.in_dict = Gpt(), in_dict

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        scores = self.gpt(ids)
        loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return {"loss": loss, "logits": scores} if self.in_dict else loss


class Hidden(nn.Module):
    """Returns hidden features before the scores, as (hidden, scores) or in a dict."""

    def __init__(self, model: Classifier, *, in_dict: bool) -> None:
        super().__init__()
        self.model, self.in_dict = model, in_dict

    def forward(self, x: Tensor) -> Any:
        hidden = self.model.body(x)
        scores = self.model.gain * self.model.head(hidden)
        return {"hidden": hidden, "logits": scores} if self.in_dict else (hidden, scores)


def make_model(name: str, seed: int = 0) -> nn.Module:
    """Make a model by its name, in float32 and eval mode."""
    torch.manual_seed(seed)
    images = nn.Sequential(
        nn.Conv2d(1, 6, 2, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten()
    )
    kinds: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: Classifier(nn.Sequential(nn.Linear(NUM_FEATURES, 10), nn.Tanh()), 10),
        "cnn": lambda: Classifier(nn.Sequential(nn.Unflatten(1, (1, 2, 3)), *images), 6 * 12),
        "lstm": lambda: Classifier(LastState(), 7),
        "batchnorm": lambda: Classifier(
            nn.Sequential(nn.Linear(NUM_FEATURES, 9), nn.BatchNorm1d(9), nn.ReLU()), 9
        ),
        "layerscale": lambda: Classifier(Branched(), WIDTH),
        "by hand": lambda: Classifier(ByHand(), WIDTH),
        "gpt": Gpt,
        "own loss": lambda: OwnLoss(in_dict=False),
        "own loss in a dict": lambda: OwnLoss(in_dict=True),
    }
    made = kinds[name]()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm1d):  # As after some training.
            module.running_mean = torch.randn(module.num_features) / 3
            module.running_var = 0.5 + torch.rand(module.num_features)
    return made.eval()


CLASSIFIERS = ("mlp", "cnn", "lstm", "batchnorm", "layerscale", "by hand")
LANGUAGE_MODELS = ("gpt", "own loss", "own loss in a dict")


def draw_inputs(model: str, num: int, seed: int = 1) -> Tensor:
    """Draw examples: features [examples, 6], or tokens [examples, 5]."""
    generator = torch.Generator().manual_seed(seed)
    if model in LANGUAGE_MODELS:
        return torch.randint(VOCABULARY, (num, NUM_TOKENS), generator=generator)
    return torch.randn(num, NUM_FEATURES, generator=generator)
