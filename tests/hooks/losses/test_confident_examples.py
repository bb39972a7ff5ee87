"""Gradients of examples that a model is sure of, against a loop over the model in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.hooks.losses import float64_heads
from sonde.hooks.losses import per_example as losses
from sonde.hooks.losses.float64_heads import Float64Heads
from sonde.hooks.losses.per_example import Loss
from tests.hooks.gradients.gradient_loop import kinds, loop_gradients, rows_of

NUM_EXAMPLES, NUM_CLASSES, NUM_TOKENS = 8, 5, 6
# The margin of the true class to the next; float32 rounds to 0 from 17 on, float64 from 37.
LEAST, MOST = 18.0, 28.0


class Body(nn.Module):
    """Hidden layers, an attention over parts of the input, and scores of classes."""

    def __init__(self, num_out: int = NUM_CLASSES) -> None:
        super().__init__()
        self.hidden, self.scores = nn.Linear(12, 12), nn.Linear(12, num_out)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.hidden(x).tanh().unflatten(-1, (3, 4))
        mixed = torch.softmax(parts @ parts.mT, -1) @ parts
        scores: Tensor = self.scores((parts + mixed).flatten(-2))
        return scores


class Ending(nn.Module):
    """A model that ends in a function, of scores or of scores and targets."""

    def __init__(self, end: Callable[..., Tensor], num_out: int = NUM_CLASSES) -> None:
        super().__init__()
        self.body, self.end = Body(num_out), end

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        scores = self.body(x)
        return self.end(scores) if y is None else self.end(scores, y)


def focal(scores: Tensor, y: Tensor) -> Tensor:
    shares = torch.sigmoid(scores).clamp(1e-30, 1)
    missed = (1 - shares) * y + shares * (1 - y)
    return (missed * F.binary_cross_entropy_with_logits(scores, y, reduction="none")).mean()


def token_loss(scores: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), y.flatten())


@dataclass(frozen=True)
class Case:
    """A model, its loss, and the kind of its targets."""

    end: Callable[..., Tensor]
    loss: Loss | None
    kind: str = "classes"


CASES = {
    "scores": Case(lambda z: z, F.cross_entropy),
    "log_softmax": Case(lambda z: F.log_softmax(z, 1), F.nll_loss),
    "Tensor.log_softmax": Case(lambda z: z.log_softmax(-1), F.nll_loss),
    "LogSoftmax": Case(nn.LogSoftmax(1), F.nll_loss),
    "special.log_softmax": Case(lambda z: torch.special.log_softmax(z, 1), F.nll_loss),
    "log of softmax": Case(lambda z: torch.log(F.softmax(z, 1)), F.nll_loss),
    "log of clamped softmax": Case(lambda z: z.softmax(1).clamp(min=1e-30).log(), F.nll_loss),
    "softmax": Case(nn.Softmax(1), lambda out, y: F.nll_loss(out.log(), y)),
    "sigmoid": Case(torch.sigmoid, F.binary_cross_entropy, "labels"),
    "sigmoid of one": Case(lambda z: z.sigmoid().squeeze(1), F.binary_cross_entropy, "label"),
    "tanh": Case(lambda z: (z / 2).tanh(), lambda out, y: F.mse_loss(out, 2 * y - 1), "labels"),
    "logits": Case(lambda z: z, F.binary_cross_entropy_with_logits, "labels"),
    "logsigmoid": Case(lambda z: z, lambda z, y: -F.logsigmoid((2 * y - 1) * z).mean(), "labels"),
    "focal": Case(lambda z: z, focal, "labels"),
    "tokens": Case(lambda z: z, token_loss, "tokens"),
    "own loss": Case(F.cross_entropy, None),
    "own loss of log_softmax": Case(lambda z, y: F.nll_loss(F.log_softmax(z, 1), y), None),
    "own loss of softmax": Case(
        lambda z, y: -z.softmax(1).gather(1, y[:, None]).log().mean(), None
    ),
    "own loss of logits": Case(F.binary_cross_entropy_with_logits, None, "labels"),
    "own loss of sigmoid": Case(
        lambda z, y: F.binary_cross_entropy(z.sigmoid(), y), None, "labels"
    ),
    "own loss of tokens": Case(token_loss, None, "tokens"),
}


NUM_OUT = {"label": 1, "labels": 2}


def made(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    """A model that is sure of all targets, its inputs, and the targets."""
    torch.manual_seed(0)
    model = Ending(case.end, NUM_OUT.get(case.kind, NUM_CLASSES)).eval()
    pool = torch.randn(4000, 12)
    with torch.no_grad():
        scores = model.body(pool)
        if case.kind in NUM_OUT:
            margins, y = scores.abs(), (scores > 0).float()
        else:
            best = scores.topk(2).values
            margins, y = best[:, :1] - best[:, 1:], scores.argmax(1)
        scale = 24 / margins.median()
        for tensor in model.body.scores.parameters():
            tensor.mul_(scale)
    is_sure = ((scale * margins > LEAST) & (scale * margins < MOST)).all(1)
    number = NUM_EXAMPLES * (NUM_TOKENS if case.kind == "tokens" else 1)
    rows = is_sure.nonzero()[:number, 0]
    x, y = pool[rows], y[rows]
    if case.kind == "tokens":
        x, y = x.unflatten(0, (-1, NUM_TOKENS)), y.unflatten(0, (-1, NUM_TOKENS))
    return model, x, y.squeeze(1) if case.kind == "label" else y


def expected_rows(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradients of a loop over the model in the type of the inputs, [examples, parameters]."""
    if case.loss is None:
        gradients = loop_gradients(model, lambda out, _: out, (x, y), y)
    else:
        gradients = loop_gradients(model, case.loss, x, y)
    return rows_of(gradients)


def sonde_rows(case: Case, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    inputs = (x, y) if case.loss is None else x
    targets = None if case.loss is None else y
    full = sonde.example_gradients(model, case.loss, inputs, targets, store=sonde.Full())
    assert kinds(full) == {}
    return rows_of(full.parameters)


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the norm of the example's gradient."""
    expected = expected.double()
    return float(((actual.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


def in_double(model: nn.Module, x: Tensor, y: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    wide = y.double() if y.is_floating_point() else y
    return copy.deepcopy(model).double(), x.double(), wide


# Logits of 30 are rounded to 1e-6 in float32, and so are their exponentials, of several layers.
TOLERANCE = 3e-4


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_model_in_float64(name: str) -> None:
    case = CASES[name]
    model, x, y = made(case)

    actual = sonde_rows(case, model, x, y)

    assert error(actual, expected_rows(case, *in_double(model, x, y))) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if name != "logsigmoid"])
def test_the_same_loop_in_float32_is_far_off(name: str) -> None:
    # Or the tests here would show nothing.
    case = CASES[name]
    model, x, y = made(case)

    narrow = expected_rows(case, model, x, y)

    assert not error(narrow, expected_rows(case, *in_double(model, x, y))) < 0.5


@pytest.mark.parametrize("name", CASES)
def test_the_same_where_float64_is_dear(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model, x, y = made(case)
    for module in (float64_heads, losses):
        monkeypatch.setattr(module, "WIDE_BYTES", 64)

    actual = sonde_rows(case, model, x, y)

    assert error(actual, expected_rows(case, *in_double(model, x, y))) < TOLERANCE


def test_a_head_in_bfloat16_keeps_the_true_class() -> None:
    case = CASES["scores"]
    model, x, y = made(case)
    model.bfloat16()

    full = sonde.example_gradients(
        model, F.cross_entropy, x.bfloat16(), y, store=sonde.Full(torch.float32)
    )
    gradients = full.parameters["body.scores.bias"].float()

    own = gradients[torch.arange(len(y)), y]
    others = gradients.sum(1) - own
    torch.testing.assert_close(own, -others, rtol=2e-2, atol=0)  # bfloat16 keeps 8 bits.


class Doubled(nn.Module):
    """A layer for whose parameter there is no rule, as two examples would not do alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 12, scale_grad_by_freq=True)
        self.body = Body()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.body(x + self.table(x[:, 0].long().clamp(0, 3)))
        return scores


def test_the_fallback_has_the_same_head() -> None:
    model, x, y = made(CASES["scores"])
    doubled = Doubled().eval()
    doubled.body = model.body  # type: ignore[assignment]  # A module.
    nn.init.zeros_(doubled.table.weight)

    full = sonde.example_gradients(doubled, F.cross_entropy, x, y, store=sonde.Full())

    assert full.coverage["table.weight"].startswith("fallback")
    expected = loop_gradients(copy.deepcopy(doubled).double(), F.cross_entropy, x.double(), y)
    assert error(
        full.parameters["table.weight"].flatten(1), expected["table.weight"].flatten(1)
    ) < (TOLERANCE)


def test_what_a_model_computes_stays_bit_for_bit() -> None:
    model, x, _ = made(CASES["softmax"])

    with Float64Heads():
        within = model(x)

    assert torch.equal(within, model(x))


def test_log_softmax_keeps_its_type_and_value() -> None:
    scores = torch.randn(4, 5, generator=torch.manual_seed(0), requires_grad=True)

    with Float64Heads():
        within = scores.log_softmax(1)

    assert within.dtype == torch.float32
    torch.testing.assert_close(within, scores.log_softmax(1), rtol=2e-7, atol=0)


def shares_missed(scores: Tensor, y: Tensor) -> Tensor:
    """1 − p of the true class, by hand, [examples]."""
    others = scores.double().scatter(1, y[:, None], -float("inf"))
    rest = others.logsumexp(1) - scores.double().gather(1, y[:, None])[:, 0]
    return torch.sigmoid(rest)


class End(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x)


MARGINS = torch.tensor([5.0, 14, 16, 17, 19, 25, 40, 200])


def rows_of_margin() -> tuple[Tensor, Tensor]:
    y = torch.arange(len(MARGINS)) % NUM_CLASSES
    return F.one_hot(y, NUM_CLASSES) * MARGINS[:, None], y


@pytest.mark.parametrize(
    ("end", "loss"),
    [
        (lambda z: z, F.cross_entropy),
        (lambda z: z, partial(F.cross_entropy)),
        (lambda z: z.log_softmax(1), F.nll_loss),
        (lambda z: z.softmax(1), lambda out, y: F.nll_loss(out.log(), y)),
    ],
)
def test_examples_that_float32_saturates_are_counted(
    end: Callable[[Tensor], Tensor], loss: Loss
) -> None:
    x, y = rows_of_margin()
    x, y = x[:-2], y[:-2]  # What is not cross entropy loses the others in float64.
    layer = nn.Linear(NUM_CLASSES, NUM_CLASSES, bias=False)
    nn.init.eye_(layer.weight)
    model = nn.Sequential(layer, End(end))

    result = sonde.example_gradients(model, loss, x, y)

    assert result.saturated is not None
    assert result.saturated.tolist() == (shares_missed(x, y) < 2**-24).tolist()
    assert result.saturated.tolist() == [False, False, False, False, True, True]


def test_a_gradient_that_is_zero_is_not_called_saturated() -> None:
    x, y = rows_of_margin()
    model = nn.Linear(NUM_CLASSES, NUM_CLASSES, bias=False)
    nn.init.eye_(model.weight)

    result = sonde.example_gradients(model, F.cross_entropy, x, y)

    assert result.saturated is not None
    # exp(-200) is zero in float32, in which the gradient comes back to the outputs.
    assert result.saturated.tolist() == [False] * 4 + [True] * 3 + [False]
    assert (result.norms == 0).tolist() == [False] * 7 + [True]


def test_tokens_are_saturated_if_their_mean_is() -> None:
    x, y = rows_of_margin()
    tokens = torch.stack([x[[5, 5, 5]], x[[5, 5, 0]]])
    targets = torch.stack([y[[5, 5, 5]], y[[5, 5, 0]]])
    model = nn.Linear(NUM_CLASSES, NUM_CLASSES, bias=False)
    nn.init.eye_(model.weight)

    result = sonde.example_gradients(model, token_loss, tokens, targets)

    assert result.saturated is not None
    assert result.saturated.tolist() == [True, False]


def identity() -> nn.Linear:
    model = nn.Linear(NUM_CLASSES, NUM_CLASSES, bias=False)
    nn.init.eye_(model.weight)
    return model


def test_a_record_says_which_examples_are_saturated(tmp_path: Path) -> None:
    x, y = rows_of_margin()
    measure = sonde.ExampleGradients(sonde.Probe(x, y), F.cross_entropy)

    recorder = sonde.Recorder(tmp_path, identity(), [measure])
    recorder.measure()
    recorder.close()

    log = sonde.open_run(tmp_path).example_gradients
    assert log.array("is_saturated").tolist() == [False] * 4 + [True] * 3 + [False]
    about = {"head": "float64", "num_saturated": 3, "num_zero_gradients": 1}
    assert log.attributes().items() >= about.items()


def train_once(folder: Path, model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> sonde.Run:
    """Record a step of a training in band, whose loss is a mean."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    recorder = sonde.Recorder(folder, model, [sonde.ExampleGradients(sonde.TRAINING)])
    recorder.attach(optimizer)
    value = loss(model(x), y)
    recorder.batch(targets=y, loss=value)
    value.backward()
    optimizer.step()
    recorder.close()
    return sonde.open_run(folder)


@pytest.mark.parametrize(
    ("end", "loss"),
    [(lambda z: z, F.cross_entropy), (lambda z: z.log_softmax(1), F.nll_loss)],
)
def test_saturated_examples_of_a_training_are_counted_and_warned_of(
    end: Callable[[Tensor], Tensor], loss: Loss, tmp_path: Path
) -> None:
    x, y = rows_of_margin()
    model = nn.Sequential(identity(), End(end))

    with pytest.warns(sonde.SondeWarning, match="at step 0: 3 of 8 examples are saturated: their"):
        run = train_once(tmp_path, model, loss, x, y)

    log = run.example_gradients
    assert log.array("is_saturated", 0).tolist() == [False] * 4 + [True] * 3 + [False]
    attributes = log.attributes(0)
    assert (attributes["head"], attributes["num_saturated"]) == ("the training's own", 3)
    assert [note["event"] for note in run.notes].count("saturated") == 1


def test_a_training_that_is_not_sure_says_nothing(tmp_path: Path) -> None:
    x, y = rows_of_margin()

    run = train_once(tmp_path, identity(), F.cross_entropy, x / 40, y)

    assert not np.any(run.example_gradients.array("is_saturated", 0))
