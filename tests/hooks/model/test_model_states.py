"""What a pass of sonde's may change of a model is put back, or named."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.hooks.model import state as model_states
from sonde.hooks.model.kept_tensors import KeptTensor


class Stateful(nn.Module):
    """Keeps states of its own, in ways that are no buffers, and computes with them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 4)
        self.torch_generator = torch.Generator().manual_seed(0)
        self.numpy_generator = np.random.default_rng(0)
        self.python_generator = random.Random(0)
        self.average = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.torch_generator)
        scale = self.numpy_generator.random() + self.python_generator.random()
        y = self.mix(x + 0.1 * scale * noise)
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        self.latest: Tensor = y.detach()
        return torch.as_tensor(y + self.average)


class Codebook(nn.Module):
    """Moves a frozen parameter in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 4)
        self.codes = nn.Parameter(torch.randn(3, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x)
        nearest = torch.cdist(y, self.codes).argmin(1)
        with torch.no_grad():
            self.codes[nearest] = 0.9 * self.codes[nearest] + 0.1 * y
        return torch.as_tensor(y + self.codes[nearest])


class Cached(nn.Module):
    """Makes a table for the longest batch so far, keeps a state, and counts, sums and lists."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 4)
        self.num_cached = 0
        self.state: Tensor | None = None
        self.losses: list[Tensor] = []
        self.sums = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.num_cached:
            self.num_cached = len(x)
            self.table = torch.linspace(0, 1, len(x))[:, None]
        y = self.mix(x) + self.table[: len(x)]
        self.state = y.detach() if self.state is None else 0.5 * (self.state + y.detach())
        self.losses.append(y.square().mean())
        self.sums["calls"] += 1
        return torch.as_tensor(y + self.state + 0.01 * self.sums["calls"])


class Writing(nn.Module):
    """Writes into a tensor of its own in each pass."""

    count: Tensor
    table: Tensor

    def __init__(self, writes: str, *, is_parameter: bool = False) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 4)
        self.writes = writes
        if is_parameter:
            self.count = nn.Parameter(torch.zeros(1), requires_grad=False)
        else:
            self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.writes in WRITES:
            WRITES[self.writes](self.count)
        return torch.as_tensor(self.mix(x) + self.count.sum())


def _point_elsewhere(tensor: Tensor) -> None:
    tensor.data = torch.cat([tensor, tensor]) + 1


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda tensor: tensor.add_(1),
    ".data": lambda tensor: tensor.data.add_(1),
    "by NumPy": lambda tensor: np.add(tensor.numpy(), 1, out=tensor.numpy()),
    "detached": lambda tensor: tensor.detach().add_(1),
    "other memory": _point_elsewhere,
}


class Growing(nn.Module):
    """Makes a layer in its first pass."""

    late: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Linear(4, 4)
        return torch.as_tensor(self.late(self.mix(x)))


INPUTS = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(8) % 4
MEASURES: dict[str, Any] = {
    "nothing": lambda: [],
    "on a probe": lambda: [
        sonde.Activations(sonde.Probe(INPUTS)),
        sonde.ExampleGradients(sonde.Probe(INPUTS, TARGETS), F.cross_entropy),
    ],
    "in band": lambda: [
        sonde.Activations(sonde.TRAINING),
        sonde.ExampleGradients(sonde.TRAINING),
    ],
}


def trained(path: Path, model: Stateful, measures: list[sonde.hooks.Measure]) -> Stateful:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    recorder = None
    if measures:
        recorder = sonde.Recorder(path, model, measures, when=sonde.every(1))
        recorder.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(INPUTS), TARGETS).backward()
        optimizer.step()
    if recorder is not None:
        recorder.close()
    return model


# Its own noise differs for an example alone, so that it has no gradients of its own.
@pytest.mark.filterwarnings("ignore::sonde.exceptions.SondeWarning")
@pytest.mark.parametrize("kind", ["on a probe", "in band"])
def test_states_that_are_no_buffers_are_put_back(kind: str, tmp_path: Path) -> None:
    found = []
    for name in ("nothing", kind):
        torch.manual_seed(0)
        found.append(trained(tmp_path / name, Stateful(), MEASURES[name]()))
    alone, recorded = found
    assert torch.equal(alone.mix.weight, recorded.mix.weight)
    assert torch.equal(alone.average, recorded.average)
    assert torch.equal(alone.latest, recorded.latest)
    assert alone.torch_generator.get_state().equal(recorded.torch_generator.get_state())
    assert alone.numpy_generator.random() == recorded.numpy_generator.random()
    assert alone.python_generator.random() == recorded.python_generator.random()


@pytest.mark.parametrize("kind", ["on a probe", "in band"])
def test_caches_and_lists_are_those_of_the_training(kind: str, tmp_path: Path) -> None:
    found = []
    for name in ("nothing", kind):
        torch.manual_seed(0)
        model = Cached()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A probe of such a model has no gradients.
            recorder = sonde.Recorder(
                tmp_path / name, model, MEASURES[name]() or [sonde.Scalars()], when=sonde.every(1)
            ).attach(optimizer)
            for rows in (8, 8, 8):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(INPUTS[:rows]), TARGETS[:rows])
                (loss + sum(model.losses)).backward()
                model.losses.clear()
                optimizer.step()
            recorder.close()
        found.append(model)
    alone, recorded = found
    assert torch.equal(alone.mix.weight, recorded.mix.weight)
    assert alone.sums == recorded.sums
    assert alone.num_cached == recorded.num_cached


def test_a_table_that_an_inference_pass_made_is_no_obstacle(tmp_path: Path) -> None:
    model = Cached()
    with torch.inference_mode():
        model(INPUTS)
    model.state = None
    measures = [sonde.Activations(sonde.Probe(INPUTS))]
    with sonde.Recorder(tmp_path / "run", model, measures, on_error="raise") as recorder:
        recorder.measure()
    assert sonde.open_run(tmp_path / "run").layers == ["mix"]


def test_attributes_that_a_pass_makes_are_gone_after_it() -> None:
    model = Stateful()
    sonde.example_gradients(model, F.cross_entropy, INPUTS, TARGETS)
    assert not hasattr(model, "latest")


def test_a_parameter_that_passes_change_is_put_back_the_first_time() -> None:
    torch.manual_seed(0)
    model = Codebook()
    before = model.codes.clone()
    for _ in range(2):
        sonde.example_gradients(model, F.cross_entropy, INPUTS, TARGETS)
        assert torch.equal(model.codes, before)


@pytest.mark.parametrize("writes", ["in place", ".data"])
def test_what_is_too_large_to_copy_is_named_once_and_put_back_from_then_on(
    writes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_states, "_FIRST_COPY_BYTES", 0)
    model = Writing(writes, is_parameter=True)
    with pytest.warns(sonde.SondeWarning, match="modifies `count` of Writing in place"):
        sonde.example_gradients(model, F.cross_entropy, INPUTS, TARGETS)
    before = model.count.clone()
    sonde.example_gradients(model, F.cross_entropy, INPUTS, TARGETS)
    assert torch.equal(model.count, before)


@pytest.mark.parametrize("is_parameter", [False, True])
@pytest.mark.parametrize("writes", [*WRITES])
def test_no_way_of_writing_to_a_tensor_escapes(writes: str, is_parameter: bool) -> None:
    model = Writing(writes, is_parameter=is_parameter)
    before, memory = model.count.clone(), model.count.data_ptr()
    sonde.example_gradients(model, F.cross_entropy, INPUTS, TARGETS)
    assert torch.equal(model.count, before)
    assert model.count.data_ptr() == memory


def test_tensors_in_lists_are_put_back() -> None:
    model = Cached()
    model.losses = [torch.zeros(2)]
    kept = model.losses[0]

    def add(*_: Any) -> None:
        kept.add_(1)

    model.register_forward_hook(add)
    sonde.example_gradients(model, F.cross_entropy, INPUTS, TARGETS)
    assert len(model.losses) == 1
    assert torch.equal(kept, torch.zeros(2))


def test_memory_that_cannot_be_written_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "table.npy"
    np.save(file, np.arange(4, dtype=np.float32))
    model = Writing("not at all")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of memory that is read-only.
        model.register_buffer("table", torch.from_numpy(np.load(file, mmap_mode="r")))
    sonde.example_gradients(model, F.cross_entropy, INPUTS, TARGETS)
    assert model.table.tolist() == [0, 1, 2, 3]


def test_a_kept_tensor_gets_back_its_bits() -> None:
    values = torch.tensor([0.0, -0.0, float("nan"), 1.0])
    for tensor in (values.clone(), values.half(), values.to(torch.complex64), values > 0):
        kept = KeptTensor(tensor)
        before = tensor.numpy().tobytes()
        assert not kept.restore()
        tensor.data.copy_(tensor.flip(0))
        assert kept.restore()
        assert tensor.numpy().tobytes() == before


def test_an_expanded_tensor_is_kept() -> None:
    expanded = torch.zeros(3).expand(2, 3)
    kept = KeptTensor(expanded)
    expanded[0].add_(1)
    assert kept.restore()
    assert torch.equal(expanded, torch.zeros(2, 3))


def test_what_a_pass_adds_goes_as_a_whole() -> None:
    model = Growing()
    with pytest.raises(sonde.SondeError, match=r"parameters in its first forward pass \(late"):
        sonde.example_gradients(model, F.cross_entropy, INPUTS, TARGETS)
    assert [name for name, _ in model.named_modules()] == ["", "mix"]
    model(INPUTS)
    assert sonde.example_gradients(model, F.cross_entropy, INPUTS, TARGETS).norms.shape == (8,)


def test_an_embedding_that_rescales_its_rows_is_put_back_whenever_it_does() -> None:
    embedding = nn.Embedding(6, 4, max_norm=1.0)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(8, 4))
    with torch.no_grad():
        embedding.weight.mul_(0.1)  # Nothing to rescale as yet.
    tokens = torch.randint(6, (8, 2), generator=torch.Generator().manual_seed(0))
    sonde.example_gradients(model, F.cross_entropy, tokens, TARGETS)
    with torch.no_grad():
        embedding.weight.mul_(100)
    before = embedding.weight.detach().clone()
    sonde.example_gradients(model, F.cross_entropy, tokens, TARGETS)
    assert torch.equal(embedding.weight, before)
