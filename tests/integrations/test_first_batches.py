"""What the first batches of a training show of its examples."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sonde.exceptions import InvalidInputError
from sonde.integrations.launch.first_batches import FirstBatches


class Model(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        return x


def collected(*calls: tuple[Any, ...], limit: int = 100, **kwargs: Any) -> FirstBatches:
    batches = FirstBatches(limit)
    for args in calls:
        batches.add(Model(), args, kwargs)
    return batches


def test_one_input_is_joined_over_batches_up_to_the_limit() -> None:
    first, second = torch.randn(4, 3), torch.randn(4, 3)
    probe = collected((first,), (second,), limit=6).probe()
    assert isinstance(probe.inputs, Tensor)
    assert torch.equal(probe.inputs, torch.cat([first, second])[:6])
    assert probe.ids.tolist() == list(range(6))
    assert probe.targets is None


def test_ids_of_ranks_differ() -> None:
    ids = [collected((torch.ones(3, 2),), limit=5).probe(rank).ids.tolist() for rank in range(2)]
    assert ids == [[0, 1, 2], [5, 6, 7]]


def test_labels_are_the_targets_and_no_input() -> None:
    x, labels = torch.randn(4, 3), torch.arange(4)
    probe = collected((), x=x, labels=labels, mask=None).probe()
    assert isinstance(probe.inputs, dict)
    assert list(probe.inputs) == ["x"]
    assert probe.targets is not None
    assert probe.targets.tolist() == [0, 1, 2, 3]
    by_position = collected((x, None, labels)).probe()
    assert by_position.targets is not None
    assert isinstance(by_position.inputs, dict)  # Or the mask would be missing in its place.


def test_several_inputs_keep_their_places() -> None:
    x, mask = torch.randn(4, 3), torch.ones(4)
    probe = collected((x, mask)).probe()
    assert isinstance(probe.inputs, tuple)
    assert torch.equal(probe.inputs[1], mask)


@pytest.mark.parametrize("second", ["the same", "another shape"])
def test_a_batch_that_brings_nothing_new_ends_it(second: str) -> None:
    first = torch.randn(4, 3)
    batches = collected((first,), (first.clone() if second == "the same" else first[:, :2],))
    assert batches.is_all
    assert batches.num_examples == 4


def test_what_the_training_overwrites_is_kept_as_it_was() -> None:
    x = torch.zeros(4, 3)
    batches = collected((x,))
    x.fill_(1)
    assert isinstance(inputs := batches.probe().inputs, Tensor)
    assert inputs.sum() == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([torch.ones(3)],), "its input `x` is a list; a probe takes tensors"),
        ((torch.ones(3, 2), torch.ones(4)), r"its inputs .*'mask': \[4\].* do not have the same"),
        ((torch.ones(()),), "do not have the same number of examples"),
        ((), "it is called without a tensor"),
    ],
)
def test_what_makes_no_probe_is_told(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        collected(args)
