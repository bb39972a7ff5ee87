"""Outputs with several rows of each example, as windows of images: recorded as the example's own.

What is recorded of an example is held against that example run alone, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.exceptions import SondeWarning
from tests.hooks.gradients.live_loop import record as record_training

N, BATCH, WIDTH, CLASSES = 7, 3, 6, 3
Array = npt.NDArray[Any]


class Windows(nn.Module):
    """Attention in shifted windows of an image, [n · 4, 16, features] or [4 · n, 16, features]."""

    def __init__(self, *, in_turn: bool = False, num_heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(1, WIDTH, 1)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.Identity()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.in_turn, self.num_heads = in_turn, num_heads

    def rows(self, by_example: Tensor) -> Tensor:
        """Bring [n, k, …] into one axis."""
        return (by_example.transpose(0, 1) if self.in_turn else by_example).flatten(0, 1)

    def by_example(self, rows: Tensor, num_examples: int) -> Tensor:
        if self.in_turn:
            return torch.as_tensor(rows.unflatten(0, (-1, num_examples)).transpose(0, 1))
        return torch.as_tensor(rows.unflatten(0, (num_examples, -1)))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).roll((1, 1), (2, 3))
        windows = x.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 3, 5, 1)
        rows = self.mix(self.rows(windows.flatten(3, 4).flatten(1, 2)))  # [rows, 16, features]
        heads = rows.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        weights = self.heads((heads @ heads.mT).softmax(-1))  # [rows, heads, 16, 16]
        rows = self.norm(rows + (weights @ heads).transpose(1, 2).flatten(2))
        return torch.as_tensor(self.head(self.by_example(rows, len(images)).mean((1, 2))))


ROWS = ("mix", "heads", "norm")


def images(number: int = N) -> Tensor:
    return torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def alone(model: nn.Module, inputs: Tensor, names: tuple[str, ...] = ROWS) -> dict[str, Array]:
    """Run a model on one example after the other, in float64: features, [examples, features]."""
    wide = copy.deepcopy(model).double().eval()
    found: dict[str, list[Array]] = {name: [] for name in names}
    for name in names:
        wide.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: found[name].append(output.flatten().numpy().copy())
        )
    with torch.no_grad():
        for example in inputs:
            wide(example[None].double() if example.is_floating_point() else example[None])
    return {name: np.stack(rows) for name, rows in found.items()}


def alone_with_gradients(model: nn.Module, example: Tensor, target: Tensor) -> dict[str, Array]:
    """Run a model on an example forward and backward, in float64."""
    wide = copy.deepcopy(model).double()
    outputs: dict[str, Tensor] = {}
    for name in ROWS:
        wide.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: outputs.update({name: output})
        )
    loss = F.cross_entropy(wide(example[None].double()), target[None])
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    found = {name: output.detach().flatten().numpy() for name, output in outputs.items()}
    own = zip(outputs, gradients, strict=True)
    return found | {f"d {name}": gradient.flatten().numpy() for name, gradient in own}


def record(
    path: Path,
    model: nn.Module,
    probe: sonde.Probe,
    store: Any = None,
    *,
    layers: Any = None,
    lacks: bool = False,
) -> sonde.Run:
    measure = sonde.Activations(probe, layers, store or sonde.Full())
    recorder = sonde.Recorder(path, model, [measure], on_error="raise")
    if lacks:
        with pytest.warns(SondeWarning, match="lacks"):
            recorder.measure()
    else:
        recorder.measure()
    recorder.close()
    return sonde.open_run(path)


def reasons_of(run: sonde.Run) -> dict[str, str]:
    return {note["name"]: note["reason"] for note in run.notes if note["event"] == "missing"}


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Count how many examples each pass of a model sees."""
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    yield sizes
    handle.remove()


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize(
    ("num_examples", "batch_size"), [(N, BATCH), (N, 2), (N, 1), (N, 99), (2, 2), (2, 99), (4, 4)]
)
@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_rows_of_an_example_are_its_features(
    in_turn: bool, num_heads: int, num_examples: int, batch_size: int, tmp_path: Path
) -> None:
    model = Windows(in_turn=in_turn, num_heads=num_heads)
    inputs = images(num_examples)
    run = record(tmp_path / "run", model, sonde.Probe(inputs, batch_size=batch_size))
    assert run.layers == ["embed", "mix", "heads", "norm", "head"]
    for name, expected in alone(model, inputs).items():
        found = np.asarray(run.activations[name].features())
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=name)
    layers = [note for note in run.notes if "feature_shapes" in note]
    assert layers[-1]["feature_shapes"]["heads"] == [4 * num_heads, 16, 16]


@pytest.mark.parametrize("in_turn", [False, True])
def test_every_store_keeps_them(in_turn: bool, tmp_path: Path) -> None:
    model, inputs = Windows(in_turn=in_turn), images()
    expected = alone(model, inputs)
    stores = {
        "gram": sonde.Gram(),
        "block": sonde.Gram(block=4),
        "sketch": sonde.Sketch(16),
        "pooled": sonde.Full(pool="mean"),
    }
    runs = {
        name: record(tmp_path / name, model, sonde.Probe(inputs, batch_size=BATCH), store)
        for name, store in stores.items()
    }
    for name, features in expected.items():
        gram = features @ features.T
        found = runs["gram"].activations[name].gram()
        np.testing.assert_allclose(found, gram, rtol=1e-5, atol=1e-5, err_msg=name)
        blocks = runs["block"].activations.gram_blocks(name)
        np.testing.assert_allclose(blocks[0], gram[:4, :4], rtol=1e-5, atol=1e-5, err_msg=name)
        sketch = sonde.Sketch(16).project(torch.from_numpy(features)).numpy()
        found = runs["sketch"].activations[name].array("sketch")
        np.testing.assert_allclose(found, sketch, rtol=1e-4, atol=1e-4, err_msg=name)
        # Over the positions of each row, as of examples of one row.
        rows = features.reshape(N, 4, 16 if name != "heads" else 2, -1)
        pooled = runs["pooled"].activations[name].features()
        np.testing.assert_allclose(pooled, rows.mean(3).reshape(N, -1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("in_turn", [False, True])
def test_cka_is_that_of_the_examples_features(in_turn: bool, tmp_path: Path) -> None:
    model, inputs = Windows(in_turn=in_turn), images()
    run = record(tmp_path / "run", model, sonde.Probe(inputs, batch_size=BATCH), sonde.Gram())
    expected = alone(model, inputs, ("mix", "norm"))
    one, other = (features - features.mean(0) for features in expected.values())
    cross, own = np.linalg.norm(one.T @ other) ** 2, np.linalg.norm(one.T @ one)
    value = cross / (own * np.linalg.norm(other.T @ other))
    found = float(sonde.analysis.cka(run, unbiased=False).sel(layer="mix", other_layer="norm"))
    assert found == pytest.approx(value, rel=1e-5)
    assert found < 0.999


class Views(nn.Module):
    """A model that takes two views of each example as one batch, [2 · n, …], and time first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.head = nn.Linear(WIDTH, 4), nn.Linear(4, CLASSES)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        mixed = self.mix(torch.cat([one, other], 1).mean(0)).tanh()
        return torch.as_tensor(self.head(mixed.unflatten(0, (2, -1)).mean(0)))


def test_two_views_along_another_axis_of_the_inputs(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model, views = Views(), (torch.randn(5, N, WIDTH), torch.randn(5, N, WIDTH))
    run = record(tmp_path / "run", model, sonde.Probe(views, batch_size=BATCH, batch_dim=1))
    with torch.no_grad():
        expected = torch.stack([model.mix(view.mean(0)) for view in views], 1).flatten(1)
    found = run.activations["mix"].features()
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("in_turn", [False, True])
def test_rows_in_band_and_the_gradients_that_come_back_to_them(
    in_turn: bool, tmp_path: Path
) -> None:
    model, given = Windows(in_turn=in_turn), images(2 * N).split(N)
    targets = torch.arange(N) % CLASSES
    expected: dict[str, list[Array]] = {}
    for batch in given:
        for example, target in zip(batch, targets, strict=True):
            for name, values in alone_with_gradients(model, example, target).items():
                expected.setdefault(name, []).append(values)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in given:
            loss = F.cross_entropy(model(batch), targets)
            recorder.batch(loss=loss, ids=torch.arange(N))
            (loss / len(given)).backward()
        optimizer.step()

    measures = [
        sonde.Activations(sonde.TRAINING, store=sonde.Full()),
        sonde.OutputGradients(sonde.TRAINING, store=sonde.Full()),
    ]
    run = record_training(tmp_path, model, measures, loop, when=sonde.at(0))
    for name in ROWS:
        found = run.activations[name].features(0)
        np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-6)
        found = run.output_gradients[name].features(0)
        np.testing.assert_allclose(found, expected[f"d {name}"], rtol=1e-3, atol=1e-6)


class Tokens(nn.Module):
    """A layer that sees the tokens of all examples as rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.out = nn.Linear(WIDTH, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.out(self.mix(x.flatten(0, 1)).view(*x.shape[:2], 4).mean(1)))


def test_batches_of_other_lengths_in_band(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tokens()
    given = [torch.randn(N, length, WIDTH) for length in (4, 6, 4, 5)]
    expected = []

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in given:
            with torch.no_grad():
                expected.append(model.mix(batch).flatten(1).numpy().copy())
            F.cross_entropy(model(batch), torch.arange(N) % CLASSES).backward()
            optimizer.step()

    measure = sonde.Activations(sonde.TRAINING, store=sonde.Full())
    run = record_training(tmp_path, model, [measure], loop)
    for step in range(len(given)):
        found = run.activations["mix"].features(step)
        np.testing.assert_allclose(found, expected[step], rtol=1e-5, atol=1e-6)


class Ragged(Tokens):
    """As many tokens of an example are taken as its first feature says."""

    def forward(self, x: Tensor) -> Tensor:
        is_there = torch.arange(x.shape[1]) < x[:, :1, 0].detach()
        mixed = x.new_zeros(*x.shape[:2], 4)
        mixed[is_there] = self.mix(x[is_there])
        return torch.as_tensor(self.out(mixed.mean(1)))


class Sorted(Tokens):
    """The examples are sorted by their first feature."""

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0, 0].detach().argsort(stable=True)
        return super().forward(x[order])[order.argsort()]


class Experts(Tokens):
    """Half of the tokens are taken, of whichever example."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        taken = tokens[:, 0].topk(len(tokens) // 2).indices
        mixed = x.new_zeros(len(tokens), 4).index_add(0, taken, self.mix(tokens[taken]))
        return torch.as_tensor(self.out(mixed.view(*x.shape[:2], 4).mean(1)))


class Backwards(Tokens):
    """The last example comes first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(0)).flip(0)


class Between(Tokens):
    """Rows of examples between halves of the time, [2, n, 2, …]."""

    def forward(self, x: Tensor) -> Tensor:
        halves = x.unflatten(1, (2, -1)).transpose(0, 1)
        mixed = self.mix(halves.flatten(0, 2)).view(*halves.shape[:3], 4)
        return torch.as_tensor(self.out(mixed.transpose(0, 1).mean((1, 2))))


class Coupled(Tokens):
    """A row holds what all examples have in common."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Positions(Tokens):
    """A layer sees the positions only, [n · k, …] the same ones for each example."""

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.linspace(0, 1, x.shape[1] * WIDTH).view(-1, WIDTH)
        mixed = self.mix(positions.expand(len(x), -1, -1).flatten(0, 1))
        return torch.as_tensor(self.out(mixed.view(*x.shape[:2], 4).mean(1) + x.mean()))


class Sparse(Tokens):
    """Only the first row of each example is its own."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.linspace(0, 1, x.shape[1])[:, None].expand(len(x), -1, WIDTH)
        return super().forward(torch.cat([x[:, :1], rows[:, 1:]], 1))


class Pairs(Tokens):
    """Fails on three examples."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) % 2:
            raise ValueError("no pairs")
        return super().forward(x)


COUNTS = [2, 2, 2, 1, 3, 2]

REFUSED: list[tuple[type[Tokens], str]] = [
    (Ragged, "rows were sorted or selected before it, so that a few examples do not speak"),
    (Sorted, "rows were sorted or selected before it"),
    (Experts, "rows were sorted or selected before it"),
    (Backwards, "they are in an order of their own"),
    (Between, "they are in an order of their own"),
    (Coupled, "a row depends on several examples"),
    (Positions, "they do not change with each example"),
    (Sparse, "too few of them change with the examples"),
    (Pairs, "the model fails on 3 of them: ValueError"),
]


def tokens() -> Tensor:
    inputs = torch.randn(6, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    inputs[:, 0, 0] = torch.tensor(COUNTS)
    return inputs


@pytest.mark.parametrize(("kind", "reason"), REFUSED)
@pytest.mark.parametrize("batch_size", [6, 4])
def test_rows_that_are_not_known_to_be_whose_are_named(
    kind: type[Tokens], reason: str, batch_size: int, tmp_path: Path
) -> None:
    probe = sonde.Probe(tokens(), batch_size=batch_size)
    run = record(tmp_path / "run", kind(), probe, layers="mix", lacks=True)
    assert reason in reasons_of(run)["mix"]
    assert run.measures == []


@pytest.mark.parametrize(("kind", "reason"), REFUSED)
def test_rows_in_band_that_are_not_known_to_be_whose_are_named(
    kind: type[Tokens], reason: str, tmp_path: Path
) -> None:
    model, inputs = kind(), tokens()

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        F.cross_entropy(model(inputs), torch.arange(6) % CLASSES).backward()
        with pytest.warns(SondeWarning, match="lacks"):
            optimizer.step()

    measure = sonde.Activations(sonde.TRAINING, "mix", sonde.Full())
    run = record_training(tmp_path, model, [measure], loop)
    assert reason in reasons_of(run)["mix"]


def test_examples_that_are_alike_show_nothing(tmp_path: Path) -> None:
    probe = sonde.Probe(tokens()[:1].expand(6, -1, -1))
    run = record(tmp_path / "run", Tokens(), probe, layers="mix", lacks=True)
    assert reasons_of(run)["mix"] == (
        "it cannot be told which rows of its output [24, 4] belong to which of 6 examples: "
        "they are alike"
    )


def test_weights_that_are_zero_as_yet_are_looked_at_again(tmp_path: Path) -> None:
    model, inputs = Tokens(), tokens()
    nn.init.zeros_(model.mix.weight)
    measures = [
        sonde.Activations(sonde.Probe(inputs), "mix", sonde.Full()),
        sonde.Activations(sonde.TRAINING, "mix", sonde.Full()),
    ]
    expected = []

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            with torch.no_grad():
                expected.append(model.mix(inputs).flatten(1).numpy().copy())
            F.cross_entropy(model(inputs), torch.arange(6) % CLASSES).backward()
            optimizer.step()

    with pytest.warns(SondeWarning, match="all of them are the same as yet"):
        run = record_training(tmp_path, model, measures, loop)
    for source in ("probe", "training"):
        found = run["activations", source]["mix"].features(1)
        np.testing.assert_allclose(found, expected[1], rtol=1e-4, atol=1e-6)


class Table(nn.Module):
    """An even number of positions, which do not grow with the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.out = nn.Linear(1, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        table = self.positions(torch.linspace(0, 1, x.shape[1])[:, None])
        return torch.as_tensor(self.out((x + table).mean(1)))


@pytest.mark.parametrize(
    ("model", "inputs", "extra"),
    [
        # What is needed for two examples, and nothing else.
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)), images(), []),
        (nn.Linear(WIDTH, CLASSES), tokens(), []),
        (Table(), tokens(), [3]),
        (Windows(), images(), [3, 3, 3, 3]),
    ],
)
def test_only_what_has_such_rows_is_run_more_often(
    model: nn.Module, inputs: Tensor, extra: list[int], tmp_path: Path
) -> None:
    with counted(model) as sizes:
        measure = sonde.Activations(sonde.Probe(inputs, batch_size=BATCH), store=sonde.Sketch(4))
        recorder = sonde.Recorder(tmp_path / "run", model, [measure])
        lacks = isinstance(model, Table)
        with pytest.warns(SondeWarning) if lacks else nullcontext():
            recorder.measure()
            recorder.step()
            recorder.measure()
        recorder.close()
    batches = [min(BATCH, len(inputs) - start) for start in range(0, len(inputs), BATCH)]
    assert sizes == [2, *extra, *batches, *batches]


def test_a_vision_transformer_with_shifted_windows(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, num_channels=1, embed_dim=8, depths=[2], num_heads=[2]
    )
    config.window_size = 4
    model, inputs = transformers.SwinModel(config), torch.randn(N, 1, 16, 16)
    run = record(tmp_path / "run", model, sonde.Probe(inputs, batch_size=BATCH), lacks=True)
    # The same positions for every window of every image.
    positions = "no axis of its output [1, 2, 16, 16] is the batch of 3"
    assert set(reasons_of(run).values()) == {positions}
    once = {name for name in run.layers if f"{name}#1" not in run.layers}
    names = [name for name, _ in model.named_modules() if name in once]
    assert sum("attention" in name for name in names) >= 8
    for name, expected in alone(model, inputs, tuple(names)).items():
        found = np.asarray(run.activations[name].features())
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5, err_msg=name)
