"""Cross entropy over classes: of each position alone, and without losing what is close to 1.

In float32 the gradient softmax − one-hot rounds the true class's entry to 0 where the model is
sure of it, from a margin of about 17 on, while the entries of the other classes keep their digits.
With z the logit of the true class y and r = logsumexp of the other logits,

    loss = softplus(r − z),  1 − p_y = sigmoid(r − z),  p_k = (1 − p_y) · softmax(others)_k,

so the true class's entry −(1 − p_y) is made from the others, and nothing cancels: in float64 at any
margin, where softmax − one-hot itself rounds to 0 from 37 on, and in float32 up to 1e-5 of the
norm of the gradient, for margins up to 80.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ClassLoss:
    """The options of a cross entropy, as `F.cross_entropy` has them.

    Attributes:
        weight: The weight of each class, [classes]; None is 1.
        ignore_index: The target that is left out.
        label_smoothing: The share of the target that is spread over all classes.
        reduction: `mean`, `sum` or `none`.
    """

    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"

    def of_positions(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each position, times the weight of its class; 0 of what is ignored.

        It takes the memory of some four tensors like `logits`, of float32 at least.

        Args:
            logits: [examples, classes, …].
            targets: A class for each position, [examples, …].
        """
        is_counted = targets != self.ignore_index
        return self._each(logits, targets.where(is_counted, 0)).where(is_counted, 0)

    def _each(self, logits: Tensor, classes: Tensor) -> Tensor:
        wide = logits.float() if logits.dtype.itemsize < 4 else logits
        at = classes.unsqueeze(1)
        own = wide.gather(1, at)
        # An infinite logit is no certainty: torch's own loss is no number either.
        own = own.masked_fill(own == math.inf, math.nan)
        # Not -inf, of which logsumexp has no gradient where all other classes are masked by it.
        lowest = torch.finfo(wide.dtype).min
        rest = wide.scatter(1, at, lowest).logsumexp(1, keepdim=True)
        each = F.softplus(rest - own)
        losses = each.squeeze(1)
        if self.weight is not None:
            losses = losses * self.weight.to(wide.dtype)[classes]
        if self.label_smoothing:
            spread = self._spread(wide, own + each)
            losses = losses + self.label_smoothing * (spread - losses)
        return losses

    def _spread(self, logits: Tensor, total: Tensor) -> Tensor:
        """Return the mean over the classes of their losses, given the logsumexp of the logits."""
        weight = logits.new_ones(logits.shape[1]) if self.weight is None else self.weight
        along = weight.to(logits.dtype).reshape(-1, *(1,) * (logits.ndim - 2))
        return (along * (total - logits)).mean(1)

    def weights(self, targets: Tensor, like: Tensor) -> Tensor:
        """Return what a mean divides by: the weight of each position, of which ignored have 0."""
        is_counted = targets != self.ignore_index
        if self.weight is None:
            return is_counted.to(like.dtype)
        return self.weight.to(like.dtype)[targets.where(is_counted, 0)] * is_counted

    def reduced(self, losses: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of all positions together; each by itself, if that is the reduction."""
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        return losses.sum() / self.weights(targets, losses).sum()

    def of_examples(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, [examples], as of a batch that holds it alone.

        The mean over one example that is ignored is 0 / 0, here too.
        """
        if targets.ndim == 1 and self.weight is None and self.reduction == "mean":
            is_counted = targets != self.ignore_index
            # What takes a few operations less; to ask a GPU would wait for it.
            are_all = targets.is_cpu and bool(is_counted.all())
            classes = targets if are_all else targets.where(is_counted, 0)
            if self.label_smoothing or logits.dtype != torch.float64:
                losses = self._each(logits, classes)
            else:
                losses = _FromOthers.apply(logits, classes)
            return losses if are_all else losses.where(is_counted, math.nan)
        losses = self.of_positions(logits, targets)
        total = losses.flatten(1).sum(1) if losses.ndim > 1 else losses
        if self.reduction == "sum":
            return total
        weights = self.weights(targets, losses)
        return total / (weights.flatten(1).sum(1) if weights.ndim > 1 else weights)


class _FromOthers(torch.autograd.Function):
    """Cross entropy, [examples], of few operations, as those of a small model take no longer.

    Its own value is rounded to 1e-16, so it is for float64 only.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor) -> Tensor:
        logs = logits.log_softmax(1)
        ctx.save_for_backward(logs, classes)
        return F.nll_loss(logs, classes, reduction="none")

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        logs, classes = ctx.saved_tensors
        at = classes[:, None]
        shares = logs.exp().scatter_(1, at, 0)
        shares = shares.scatter_(1, at, shares.sum(1, keepdim=True).neg_())
        return shares.mul_(gradients[0][:, None]), None


_PLAIN = ClassLoss()
_OPTIONS = frozenset(["weight", "ignore_index", "label_smoothing", "reduction"])


def class_loss_of(loss: Any) -> ClassLoss | None:
    """Return the options of a loss that is a cross entropy; None if it is not known to be one.

    Args:
        loss: `F.cross_entropy`, a partial of it with options by name, or `nn.CrossEntropyLoss`.
    """
    if loss is F.cross_entropy:
        return _PLAIN
    if type(loss) is nn.CrossEntropyLoss:
        if loss._forward_hooks or loss._forward_pre_hooks:
            return None
        return ClassLoss(loss.weight, loss.ignore_index, loss.label_smoothing, loss.reduction)
    if type(loss) is partial and loss.func is F.cross_entropy and not loss.args:
        return ClassLoss(**loss.keywords) if _OPTIONS.issuperset(loss.keywords) else None
    return None


def class_loss_of_call(args: tuple[Any, ...], named: dict[str, Any]) -> ClassLoss | None:
    """Return the options that `F.cross_entropy` is called with; None if one is of older times."""
    names = ("weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    options = dict(zip(names, args[2:], strict=False))
    options |= {name: value for name, value in named.items() if name not in ("input", "target")}
    older = [options.pop(name, None) for name in ("size_average", "reduce")]
    return ClassLoss(**options) if older == [None, None] else None


def are_classes(logits: Any, targets: Any) -> bool:
    """Tell whether there are scores of classes, [n, classes, …], and a class for each position."""
    if type(logits) is not Tensor or not isinstance(targets, Tensor) or logits.ndim < 2:
        return False
    if targets.is_floating_point() or logits.shape[1] < 2:
        return False
    return targets.shape == (logits.shape[0], *logits.shape[2:])
