"""Ids of examples, as they reach a recorder from what a model is called with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import sonde
from sonde.exceptions import InvalidInputError, SondeWarning
from sonde.integrations._batches import find_ids, tell_batches

IDS = [[7, 3, 5, 1], [2, 4, 6, 8], [9, 11, 10, 12]]


class Net(nn.Module):
    """Takes inputs by name, and no ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(inputs))


class NetOfBatches(Net):
    """Takes a mapping."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]  # Another call.
        return super().forward(batch["inputs"])


class NetOfIds(Net):
    """Takes the ids, too."""

    def forward(self, inputs: Tensor, ids: Tensor | None = None) -> Tensor:
        assert ids is not None
        return super().forward(inputs)


class NetOfAnything(Net):
    """Takes whatever it is given."""

    def forward(self, inputs: Tensor, **others: Any) -> Tensor:
        assert "ids" in others
        return super().forward(inputs)


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"inputs": torch.randn(4, 4), "ids": torch.tensor(ids)} for ids in IDS]


def record(
    path: Path,
    model: nn.Module,
    call: Callable[[dict[str, Tensor]], Tensor],
    *,
    when: sonde.hooks.Schedule | None = None,
    per_step: int = 1,
) -> sonde.Run:
    """Train a few steps, with a validation before each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sonde.Recorder(
        path, model, [sonde.Activations(sonde.TRAINING)], when=when or sonde.every(1)
    ).attach(optimizer)
    end = tell_batches(recorder, model, "ids")
    data = batches()
    for start in range(0, len(data), per_step):
        with torch.no_grad():
            call(data[-1])
        for batch in data[start : start + per_step]:
            F.cross_entropy(call(batch), batch["ids"] % 3).backward()
        optimizer.step()
    end()
    recorder.close()
    assert not model._forward_pre_hooks
    return sonde.open_run(path)


def ids_of(run: sonde.Run) -> list[list[int]]:
    log = run.activations
    return [
        [] if (ids := log.ids_at(step)) is None else ids.tolist()
        for step in run.steps("activations")
    ]


@pytest.mark.parametrize("kind", [Net, NetOfIds, NetOfAnything])
def test_ids_among_keyword_arguments_name_the_examples(tmp_path: Path, kind: type[Net]) -> None:
    model = kind()
    assert ids_of(record(tmp_path / "run", model, lambda batch: model(**batch))) == IDS


def test_ids_in_a_mapping_name_the_examples(tmp_path: Path) -> None:
    model = NetOfBatches()
    assert ids_of(record(tmp_path / "run", model, model)) == IDS


def test_ids_of_accumulated_micro_batches_follow_each_other(tmp_path: Path) -> None:
    model = Net()
    run = record(tmp_path / "run", model, lambda batch: model(**batch), per_step=3)
    assert ids_of(run) == [[*IDS[0], *IDS[1], *IDS[2]]]
    assert run.activations.attributes()["micro_batches"] == [4, 4, 4]


def test_ids_are_taken_out_for_the_model_where_nothing_is_due(tmp_path: Path) -> None:
    model = Net()
    run = record(tmp_path / "run", model, lambda batch: model(**batch), when=sonde.at(1))
    assert ids_of(run) == [IDS[1]]


def test_a_compiled_model_is_compiled_once_and_named_all_the_same(tmp_path: Path) -> None:
    model, counter = Net(), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    run = record(
        tmp_path / "run", model, lambda batch: compiled(**batch), when=sonde.at(1)
    )  # The hook is on the module that is compiled.
    assert ids_of(run) == [IDS[1]]
    assert counter.frame_count <= 2  # With gradients, and without.


def test_a_copy_of_the_model_does_not_tell(tmp_path: Path) -> None:
    model = Net()
    recorder = sonde.Recorder(tmp_path / "run", model, [sonde.Activations(sonde.TRAINING)])
    end = tell_batches(recorder, model, "ids")
    assert not copy.deepcopy(model)._forward_pre_hooks
    end()
    recorder.close()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"inputs": torch.zeros(4, 4)}, "the batch has no ids by `id_key`"),
        ({"inputs": torch.zeros(4, 4), "ids": ["a", "b"]}, "expected one integer"),
        ({"inputs": torch.zeros(4, 4), "ids": object()}, "expected one integer"),
    ],
)
def test_ids_that_cannot_be_used_are_warned_of_once_and_end_nothing(
    tmp_path: Path, given: dict[str, Any], told: str
) -> None:
    model = Net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = record(tmp_path / "run", model, lambda batch: model(**given))
    messages = [str(warning.message) for warning in caught if warning.category is SondeWarning]
    assert len(messages) == 1
    assert told in messages[0]
    assert run.steps("activations") == [0, 1, 2]
    assert ids_of(run) == [[], [], []]


@pytest.mark.parametrize(
    ("batch", "id_key", "ids"),
    [
        ({"ids": [1, 2]}, "ids", [1, 2]),
        (("x", "y", [3]), 2, [3]),
        (("x", "y", [3]), -1, [3]),
        (("x", "y"), 2, None),
        (("x", {"ids": [4]}), "ids", [4]),
        (("x", {"other": [4]}), "ids", None),
        (torch.zeros(2), "ids", None),
    ],
)
def test_ids_are_found_by_name_or_position(
    batch: Any, id_key: str | int, ids: Sequence[int] | None
) -> None:
    assert find_ids(batch, id_key) == ids


def test_a_key_that_is_no_name_is_refused(tmp_path: Path) -> None:
    model = Net()
    with sonde.Recorder(tmp_path / "run", model, [sonde.Scalars()]) as recorder:
        with pytest.raises(InvalidInputError, match=r"`id_key` \(=2\) must be the name"):
            tell_batches(recorder, model, 2)
