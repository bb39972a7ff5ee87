"""A model under observation: checkpointed, compiled, copied, saved, or in trouble."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import sonde
from tests.hooks.gradients.live_loop import (
    NUM_EXAMPLES,
    Net,
    activations,
    batches,
    features,
    gradients,
    plain_loop,
    record,
)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.body = nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Dropout(0.3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.reentrant is None:
            x = self.body(x)
        else:
            x = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return torch.as_tensor(self.head(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_changes_nothing_of_the_record(tmp_path: Path, reentrant: bool) -> None:
    runs = []
    for number, mode in enumerate((None, reentrant)):
        model = Checkpointed(mode)
        torch.manual_seed(5)
        path = tmp_path / str(number)
        path.mkdir()
        loop = plain_loop(model, batches(2))
        runs.append(record(path, model, [activations(), gradients()], loop))
    names = ["stem", "body.0", "body.1", "body.2", "head"]
    for measure in ("activations", "output_gradients"):
        for run in runs:
            assert set(run[measure].layers) == set(names)
        for name in names:
            for step in range(2):
                first, second = (features(run, measure, name, step) for run in runs)
                np.testing.assert_array_equal(first, second)


def test_calls_that_a_reentrant_checkpoint_repeats_are_not_guessed(tmp_path: Path) -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()  # A reentrant checkpoint needs one that has a gradient.
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=True)
            return x[:, :3]

    model = Repeated()
    with pytest.warns(UserWarning, match="cannot be told apart when a checkpoint repeats"):
        run = record(tmp_path, model, [gradients(), activations()], plain_loop(model, batches(1)))
    assert run.activations.layers == ["layer", "layer#1"]


def test_copies_of_an_observed_model_do_not_record(tmp_path: Path) -> None:
    model, data = Net(), batches(1)
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("user"))
    with sonde.Recorder(
        tmp_path / "run", model, [activations(), gradients()], when=sonde.every(1)
    ) as recorder:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder.attach(optimizer)
        assert len(model[0]._forward_hooks) > 1
        moving = copy.deepcopy(model)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        for other in (moving, averaged.module):
            assert [len(m._forward_hooks) for m in other.modules()] == [0, 1, 0, 0, 0]
            assert all(not m._forward_hooks_with_kwargs for m in other.modules())
            assert all(not m._forward_pre_hooks for m in other.modules())
            assert all("__reduce_ex__" not in m.__dict__ for m in other.modules())
            F.cross_entropy(other(data[0].inputs), data[0].targets).backward()
        assert calls.count("user") == 2
        F.cross_entropy(model(data[0].inputs), data[0].targets).backward()
        optimizer.step()
    run = sonde.open_run(tmp_path / "run")
    assert run.activations.attributes()["micro_batches"] == [NUM_EXAMPLES]


def test_an_observed_model_can_be_saved_whole(tmp_path: Path) -> None:
    model = Net()
    classes: list[Any] = [Net, nn.Linear, nn.ReLU, nn.Dropout]
    with sonde.Recorder(tmp_path / "run", model, [activations()], when=sonde.every(1)):
        assert len(model[0]._forward_hooks) == 1
        file = io.BytesIO()
        torch.save(model, file)
    file.seek(0)
    with torch.serialization.safe_globals(classes):  # Nothing of sonde is in it.
        loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded[0].weight, model.state_dict()["0.weight"])
    assert b"sonde" not in file.getvalue()


def test_a_compiled_model_is_recorded_and_keeps_its_graph(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(4)
    compiled = cast("nn.Module", torch.compile(model, backend="aot_eager"))
    run = record(
        tmp_path,
        compiled,
        [activations(), gradients()],
        plain_loop(compiled, data),
        when=sonde.at(0, 2),
    )
    assert run.steps("activations") == [0, 2]
    assert set(run.activations.layers) == {"0", "1", "2", "3"}
    assert set(run["output_gradients"].layers) == {"0", "1", "2", "3"}


def test_a_compiled_model_is_compiled_once(tmp_path: Path) -> None:
    torch._dynamo.reset()  # Other tests may have used up what it compiles of one function.
    model, data = Net().eval(), batches(6)
    counter = CompileCounter()
    compiled = cast("nn.Module", torch.compile(model, backend=counter))
    when = sonde.at(0, 2, 3)
    record(tmp_path, compiled, [activations(), gradients()], plain_loop(compiled, data), when=when)
    assert counter.frame_count == 1


def test_a_measure_that_fails_in_a_hook_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(sonde.Full, "part", fail)
    model, data = Net(), batches(3)
    with pytest.warns(UserWarning, match="recorded at step 0, so sonde switches it off.*no room"):
        run = record(tmp_path, model, [activations()], plain_loop(model, data), on_error="warn")
    assert [note["event"] for note in run.notes if note["event"] == "disabled"] == ["disabled"]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_whose_outputs_cannot_be_looked_at_is_trained_all_the_same(
    tmp_path: Path,
) -> None:
    class Cursed(dict[str, Tensor]):
        def items(self) -> Any:
            raise RuntimeError("do not look")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Any:
            return Cursed(logits=self.net(x))

    model, data = Model(), batches(3)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            F.cross_entropy(model(batch.inputs)["logits"], batch.targets).backward()
            optimizer.step()

    with pytest.warns(
        UserWarning, match="recorded at step 0, so sonde switches it off.*do not look"
    ):
        run = record(tmp_path, model, [activations()], loop, on_error="warn")
    assert run.measures == []
