from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import sonde
from sonde.exceptions import InvalidInputError
from sonde.hooks import Probe
from sonde.hooks.examples.probe import undisturbed
from sonde.log.format.inputs import same_inputs


class Noisy(TensorDataset):
    """A dataset that augments with random numbers."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = self.tensors[0][index], self.tensors[1][index]
        return x + torch.randn_like(x) + random.random() + float(np.random.rand()), y


class Meddling(nn.Module):
    """A model that changes everything it can in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3, max_norm=0.1)
        self.dropout = nn.Dropout()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("bound", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("count").add_(1)
        self.bound = self.get_buffer("bound") * 2
        random.random()
        np.random.rand()
        return torch.as_tensor(self.embedding(x) + torch.rand(3))


def random_states() -> list[object]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


def test_undisturbed_restores_modes_module_by_module() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    with undisturbed(model):
        assert [module.training for module in model] == [False, False]
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


def test_undisturbed_restores_buffers_weights_and_random_states() -> None:
    model = Meddling()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = random_states()
    with undisturbed(model), torch.no_grad():
        model(torch.tensor([0, 1]))
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert random_states() == states


def test_undisturbed_restores_after_a_failure() -> None:
    model = Meddling()
    states = random_states()
    model.embedding.weight.data = torch.zeros(5, 2)  # So that the forward pass fails.
    with undisturbed(model), pytest.raises(RuntimeError, match="must match"):
        model(torch.tensor([0]))
    assert model.training
    assert random_states() == states


def test_undisturbed_draws_the_same_numbers_each_time() -> None:
    drawn = []
    for _ in range(2):
        with undisturbed(nn.Identity()):
            drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
        torch.rand(3)
    assert drawn[0] == drawn[1]


def test_a_dataset_is_read_in_order_without_touching_random_states() -> None:
    dataset = Noisy(torch.arange(6.0)[:, None], torch.arange(6))
    states = random_states()
    first, second = Probe(dataset), Probe(dataset)
    assert random_states() == states
    assert first.targets is not None
    assert first.targets.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(torch.as_tensor(first.inputs), torch.as_tensor(second.inputs))


def test_a_loader_lends_its_batch_size_but_not_its_order() -> None:
    dataset = TensorDataset(torch.arange(5.0), torch.arange(5))
    probe = Probe(DataLoader(dataset, batch_size=2, shuffle=True))
    batches = [inputs.tolist() for inputs, _ in probe.batches(torch.device("cpu"))]  # type: ignore[union-attr] # one tensor
    assert batches == [[0.0, 1.0], [2.0, 3.0], [4.0]]


def test_a_subset_is_identified_by_its_indices() -> None:
    dataset = TensorDataset(torch.arange(5.0), torch.arange(5))
    assert Probe(Subset(dataset, [4, 1])).ids.tolist() == [4, 1]


def test_dict_inputs_become_keyword_arguments() -> None:
    probe = Probe({"a": torch.ones(3, 2), "b": torch.zeros(3)}, batch_size=2)
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in inputs.items()}  # type: ignore[union-attr] # a dict
        for inputs, _ in probe.batches(torch.device("cpu"))
    ]
    assert shapes == [{"a": (2, 2), "b": (2,)}, {"a": (1, 2), "b": (1,)}]


def test_a_probe_stays_as_it_was_made() -> None:
    data = torch.ones(3, 2)
    probe = Probe(data, torch.arange(3))
    data.zero_()
    assert torch.equal(torch.as_tensor(probe.inputs), torch.ones(3, 2))


class OneTensor(TensorDataset):
    """A dataset whose collated batch is its own memory."""

    @staticmethod
    def collate(items: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        whole = items[0][0]._base
        assert whole is not None
        return whole[: len(items)], torch.zeros(len(items), dtype=torch.int64)


@pytest.mark.parametrize("kind", ["tensors", "probe", "dataset"])
def test_a_model_that_works_in_place_does_not_change_its_inputs(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    inputs = torch.randn(4, 3)
    before = inputs.clone()
    source: Probe | Tensor = inputs
    if kind == "probe":
        source = Probe(inputs)
    if kind == "dataset":
        loader = DataLoader(OneTensor(inputs), batch_size=4, collate_fn=OneTensor.collate)
        source = Probe(loader, in_memory=False)
    sonde.example_gradients(model, lambda outputs, _: outputs.sum(), source)
    assert torch.equal(inputs, before)
    if isinstance(source, Probe):
        again, _ = source.rows(slice(0, 4), torch.device("cpu"))
        assert isinstance(again, Tensor)
        assert torch.equal(again, before)


def test_digests_tell_inputs_and_ids_apart() -> None:
    x = torch.ones(2, 2)
    facts = [
        Probe(x).describe(),
        Probe(x, ids=[5, 6]).describe(),
        Probe(x * 2).describe(),
    ]
    assert len({fact["id_digest"] for fact in facts}) == 2
    assert len({fact["input_digest"] for fact in facts}) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": torch.ones(3, 2), "targets": [1, 2]}, "`targets` has 2 examples, `inputs` 3"),
        ({"inputs": (torch.ones(3), torch.ones(2))}, "with the same number of examples"),
        ({"inputs": torch.ones(0, 2)}, "at least one"),
        ({"inputs": torch.ones(2), "ids": [7, 7]}, "`ids` repeats 7"),
        ({"inputs": torch.ones(2), "ids": [1.5, 2.0]}, "expected one integer for each of the 2"),
        (
            {"inputs": torch.ones(2), "batch_size": 0},
            r"`batch_size` \(=0\) must be a whole number >= 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Probe(**arguments)  # type: ignore[arg-type] # wrong on purpose


def test_a_stream_without_order_is_refused() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield torch.ones(1)

    with pytest.raises(InvalidInputError, match="Stream has no fixed order"):
        Probe(Stream())


def test_targets_beside_a_dataset_are_refused() -> None:
    dataset = TensorDataset(torch.arange(5.0), torch.arange(5))
    with pytest.raises(InvalidInputError, match="the dataset brings its own"):
        Probe(dataset, torch.arange(5))


def test_a_dataset_that_is_not_held_is_read_the_same_each_time(
    tmp_path: Path, images: Tensor, classes: Tensor, conv_net: nn.Module
) -> None:
    dataset = Noisy(images, classes)
    held = Probe(dataset, batch_size=5, name="held")
    streamed = Probe(dataset, batch_size=5, name="streamed", in_memory=False)
    state = torch.get_rng_state()
    measures = [
        measure
        for probe in (held, streamed)
        for measure in (
            sonde.Activations(probe),
            sonde.ExampleGradients(probe, F.cross_entropy),
            sonde.Predictions(probe),
        )
    ]
    with sonde.Recorder(tmp_path / "run", conv_net, measures, on_error="raise") as recorder:
        recorder.measure()
    assert torch.equal(state, torch.get_rng_state())
    run = sonde.open_run(tmp_path / "run")
    for measure in ("activations", "example_gradients"):
        for layer in run[measure, "held"].layers:
            np.testing.assert_array_equal(
                run[measure, "held"].gram(layer=layer), run[measure, "streamed"].gram(layer=layer)
            )
    np.testing.assert_array_equal(run["predictions", "streamed"].targets, classes)
    with pytest.raises(InvalidInputError, match="is not held in memory"):
        _ = streamed.inputs


def test_tensors_cannot_be_read_again(images: Tensor) -> None:
    with pytest.raises(InvalidInputError, match="`in_memory=False` needs a dataset"):
        Probe(images, in_memory=False)


class Rows(Dataset[Any]):
    """A dataset of the given items."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def _time_first(rows: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([row for row, _ in rows], 1), torch.zeros(len(rows))


@pytest.mark.parametrize("kind", ["one tensor", "two tensors", "time first"])
def test_digests_do_not_depend_on_how_examples_are_read(kind: str) -> None:
    x = torch.arange(42.0).reshape(7, 6)
    items: list[Any] = [((row, 2 * row), 0) if kind == "two tensors" else (row, 0) for row in x]
    source: Any = Rows(items)
    batch_dim = 0
    if kind == "time first":
        source = DataLoader(source, collate_fn=_time_first)
        batch_dim = 1
    probes = [
        Probe(source, batch_dim=batch_dim),
        Probe(source, batch_dim=batch_dim, in_memory=False, batch_size=3),
        Probe(source, batch_dim=batch_dim, in_memory=False, batch_size=7),
    ]
    facts = [probe.describe() for probe in probes]
    assert [same_inputs(facts[0], other) for other in facts[1:]] == [True, True]


def test_a_digest_read_in_batches_tells_other_inputs_apart() -> None:
    x = torch.arange(42.0).reshape(7, 6)
    facts = [
        Probe(TensorDataset(values, x), in_memory=False, batch_size=3).describe()
        for values in (x, x + 1)
    ]
    assert same_inputs(*facts) is False


def test_a_probe_says_that_its_ids_are_positions() -> None:
    x = torch.ones(4, 2)
    subset = Subset(TensorDataset(x, x), [3, 1])
    kinds = [p.describe().get("ids") for p in (Probe(x), Probe(x, ids=[3, 1, 4, 2]), Probe(subset))]
    assert kinds == ["positions", None, None]


def test_ids_that_int64_cannot_hold_are_refused() -> None:
    ids = np.array([1, 2**64 - 1], dtype=np.uint64)
    with pytest.raises(InvalidInputError, match=r"`ids` holds 18446744073709551615; the log holds"):
        Probe(torch.ones(2, 2), ids=ids)


def test_large_ids_that_int64_holds_are_kept() -> None:
    probe = Probe(torch.ones(1, 2), ids=np.array([2**63 - 1], dtype=np.uint64))
    assert probe.ids.tolist() == [2**63 - 1]
