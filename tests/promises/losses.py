"""Losses as trainings write them, and beside each the loss of one example, written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import NUM_CLASSES, NUM_TOKENS, VOCABULARY

IGNORED = -100
WEIGHTS = torch.tensor([1.0, 5.0, 0.2, 2.0])
WORD_WEIGHTS = torch.linspace(0.2, 3.0, VOCABULARY)
Kind = Literal["class", "ignored", "weighted", "many", "values", "tokens"]


@dataclass(frozen=True)
class LossCase:
    """A loss, and what it is of one example.

    Attributes:
        given: The loss of a batch, as a training has it.
        own: The loss of one example, of its float64 scores and its target. None where it has none,
            as the loss couples the examples.
        kind: The targets that it takes.
        reduction: What a user would tell of it.
        is_mean_of_own: The loss of a batch is the mean or sum, by `reduction`, of the own ones.
    """

    given: Callable[[Any, Any], Tensor]
    own: Callable[[Tensor, Tensor], Tensor] | None
    kind: Kind = "class"
    reduction: Literal["mean", "sum"] = "mean"
    is_mean_of_own: bool = True


def surprise(scores: Tensor, target: Tensor) -> Tensor:
    """−log p of a class; 0 / 0 if it is left out of a mean."""
    if int(target) == IGNORED:
        return (scores * torch.nan).sum()
    true = int(target)
    others = torch.cat([scores[:true], scores[true + 1 :]])
    # As it is written here, nothing is lost however sure a model is: no 1 − p is formed.
    return torch.log1p(torch.exp(others - scores[true]).sum())


def weighted_surprise(scores: Tensor, target: Tensor) -> Tensor:
    return WEIGHTS.double()[int(target)] * surprise(scores, target)


def sample_weighted(scores: Tensor, target: Tensor) -> Tensor:
    return target[1] * surprise(scores, target[0])


def smoothed(scores: Tensor, target: Tensor) -> Tensor:
    shares = torch.full((len(scores),), 0.1 / len(scores), dtype=torch.float64)
    shares[int(target)] += 0.9
    return torch.logsumexp(scores, 0) - (shares * scores).sum()


def binary(scores: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    positive = target.double() * (1 if weight is None else weight.double())
    # log(1 + exp(z)) − z is −log σ(z), and without the z −log σ(−z).
    none = torch.zeros_like(scores)
    losses = [
        p * torch.logaddexp(none, -scores) + (1 - t) * torch.logaddexp(none, scores)
        for p, t in [(positive, target.double())]
    ]
    return losses[0].mean()


def squared(scores: Tensor, target: Tensor) -> Tensor:
    return ((scores - target.double()) ** 2).mean()


def focal(scores: Tensor, target: Tensor) -> Tensor:
    loss = surprise(scores, target)
    return (1 - torch.exp(-loss)) ** 2 * loss


def of_tokens(scores: Tensor, labels: Tensor, *, is_sum: bool = False) -> Tensor:
    """The mean, or sum, over the labelled tokens of one example."""
    losses = [surprise(s, t) for s, t in zip(scores, labels, strict=True) if int(t) != IGNORED]
    return torch.stack(losses).sum() if is_sum else torch.stack(losses).mean()


def of_weighted_tokens(scores: Tensor, labels: Tensor) -> Tensor:
    pairs = [(s, t) for s, t in zip(scores, labels, strict=True) if int(t) != IGNORED]
    weights = torch.stack([WORD_WEIGHTS.double()[int(t)] for _, t in pairs])
    return (weights * torch.stack([surprise(s, t) for s, t in pairs])).sum() / weights.sum()


def given_focal(scores: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(scores, target, reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def given_sample_weights(scores: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(scores, target[:, 0].long(), reduction="none")
    return (target[:, 1] * losses).mean()


def given_tokens(scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), **options)


def contrastive(outputs: Tensor, target: Tensor) -> Tensor:
    """Every example against all others of its batch, as NT-Xent and CLIP have it."""
    rows = F.normalize(outputs, dim=1)
    others = F.normalize(outputs.roll(1, 1), dim=1)
    return F.cross_entropy(rows @ others.T / 0.5, torch.arange(len(rows), device=rows.device))


def triplets(outputs: Tensor, target: Tensor) -> Tensor:
    """Every example against two others of its batch."""
    return F.triplet_margin_loss(outputs, outputs.roll(1, 0), outputs.roll(3, 0))


CLASS_LOSSES = {
    "cross entropy": LossCase(F.cross_entropy, surprise),
    "cross entropy, sum": LossCase(
        partial(F.cross_entropy, reduction="sum"), surprise, reduction="sum"
    ),
    "nll of log-softmax": LossCase(lambda o, t: F.nll_loss(o.log_softmax(1), t), surprise),
    "class weights": LossCase(nn.CrossEntropyLoss(weight=WEIGHTS), surprise, is_mean_of_own=False),
    "class weights, sum": LossCase(
        nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"), weighted_surprise, reduction="sum"
    ),
    "ignored": LossCase(F.cross_entropy, surprise, "ignored", is_mean_of_own=False),
    "label smoothing": LossCase(nn.CrossEntropyLoss(label_smoothing=0.1), smoothed),
    "sample weights": LossCase(given_sample_weights, sample_weighted, "weighted"),
    "focal": LossCase(given_focal, focal),
    "bce": LossCase(F.binary_cross_entropy_with_logits, binary, "many"),
    "bce, weighted": LossCase(
        nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), partial(binary, weight=WEIGHTS), "many"
    ),
    "squares": LossCase(F.mse_loss, squared, "values"),
}
TOKEN_LOSSES = {
    "token mean": LossCase(given_tokens, of_tokens, "tokens", is_mean_of_own=False),
    "token sum": LossCase(
        partial(given_tokens, reduction="sum"),
        partial(of_tokens, is_sum=True),
        "tokens",
        reduction="sum",
    ),
    "token mean, weighted": LossCase(
        lambda o, t: given_tokens(o, t, weight=WORD_WEIGHTS.to(o.dtype)),
        of_weighted_tokens,
        "tokens",
        is_mean_of_own=False,
    ),
}
COUPLED_LOSSES = {
    "contrastive": LossCase(contrastive, None, is_mean_of_own=False),
    "triplets": LossCase(triplets, None, is_mean_of_own=False),
}
OWN_LOSS = LossCase(lambda o, _: o, of_tokens, "tokens", is_mean_of_own=False)
"""Of a model that returns its loss."""

LOSSES = CLASS_LOSSES | TOKEN_LOSSES | COUPLED_LOSSES | {"its own": OWN_LOSS}


def draw_targets(kind: Kind, num: int, seed: int = 2) -> Tensor:
    """Draw one target per example; where some are left out, more in later examples."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(NUM_CLASSES, (num,), generator=generator)
    if kind == "ignored":
        places = torch.arange(num)
        return torch.where((places >= num // 2) & (places % 3 == 0), IGNORED, classes)
    if kind == "weighted":
        return torch.stack([classes.float(), 0.2 + 2 * torch.rand(num, generator=generator)], 1)
    if kind == "many":
        return torch.randint(2, (num, NUM_CLASSES), generator=generator).float()
    if kind == "values":
        return torch.randn(num, NUM_CLASSES, generator=generator)
    if kind == "tokens":
        labels = torch.randint(VOCABULARY, (num, NUM_TOKENS), generator=generator)
        return without_padding(labels)
    return classes


def without_padding(labels: Tensor) -> Tensor:
    """Leave out the ends of later examples: the first half is of full length."""
    num = len(labels)
    lengths = [NUM_TOKENS if i < num // 2 else 1 + i % NUM_TOKENS for i in range(num)]
    places = torch.arange(labels.shape[1])
    return torch.where(places < torch.tensor(lengths)[:, None], labels, IGNORED)
