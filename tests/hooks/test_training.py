"""Measures of the training itself: what is recorded of its own forward and backward passes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import sonde
from sonde.hooks import Measure
from sonde.log import Run

NUM_EXAMPLES = 6
Array = npt.NDArray[Any]


class Net(nn.Sequential):
    """Two layers with an in-place operation and dropout between them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(5, 3))


class Seen:
    """What plain hooks see: the loop's own way to the same numbers."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            if not list(module.children()):
                self.outputs[name] = []
                module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            self.outputs[name].append(output.detach().clone())

        return hook


@dataclass
class Batch:
    inputs: Tensor
    targets: Tensor
    ids: Tensor


def batches(number: int, size: int = NUM_EXAMPLES, features: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [
        Batch(
            torch.randn(size, features, generator=generator),
            torch.randint(3, (size,), generator=generator),
            torch.arange(size) + 10 * i,
        )
        for i in range(number)
    ]


def record(
    path: Path,
    model: nn.Module,
    measures: Sequence[Measure],
    loop: Callable[[sonde.Recorder, torch.optim.Optimizer], object],
    **options: Any,
) -> Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"when": sonde.every(1), "on_error": "raise", **options}
    with sonde.Recorder(path / "run", model, measures, **options) as recorder:
        recorder.attach(optimizer)
        loop(recorder, optimizer)
    return sonde.open_run(path / "run")


def plain_loop(model: nn.Module, data: Sequence[Batch]) -> Callable[..., None]:
    def loop(_: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()

    return loop


def activations(layers: Any = None) -> sonde.Activations:
    return sonde.Activations(sonde.TRAINING, layers, sonde.Full())


def gradients(layers: Any = None) -> sonde.OutputGradients:
    return sonde.OutputGradients(sonde.TRAINING, layers, sonde.Full())


def features(run: Run, measure: str, layer: str, step: int = -1) -> Array:
    return np.asarray(run[measure][layer].features(step))


def missing(run: Run) -> dict[str, str]:
    return {note["name"]: note["reason"] for note in run.notes if note["event"] == "missing"}


def alone(model: nn.Module, layer: str, data: Batch) -> Tensor:
    """The gradient of each example's own loss with respect to a layer's output, one at a time."""
    model = copy.deepcopy(model).double().eval()
    rows = []
    for row in range(len(data.inputs)):
        outputs: list[Tensor] = []

        def replace(_: nn.Module, __: Any, output: Tensor, kept: list[Tensor] = outputs) -> Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[0].clone()

        handle = model.get_submodule(layer).register_forward_hook(replace)
        output = model(data.inputs[row : row + 1].double())
        F.cross_entropy(output, data.targets[row : row + 1]).backward()
        handle.remove()
        assert outputs[0].grad is not None
        rows.append(outputs[0].grad.flatten())
    return torch.stack(rows)


def test_outputs_are_those_of_the_training_with_its_dropout(tmp_path: Path) -> None:
    model, data = Net(), batches(3)
    seen = Seen(model)
    run = record(tmp_path, model, [activations()], plain_loop(model, data))
    assert run.steps("activations") == [0, 1, 2]
    assert run.layers == ["0", "1", "2", "3"]
    for step in range(3):
        for layer, outputs in seen.outputs.items():
            # The training's passes, and at first one over two examples that finds the batch axis.
            own = [output for output in outputs if len(output) == NUM_EXAMPLES]
            np.testing.assert_array_equal(features(run, "activations", layer, step), own[step])


def test_only_due_steps_are_recorded_and_leave_no_hook(tmp_path: Path) -> None:
    model, data = Net(), batches(5)
    counts = []

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            counts.append(sum(len(m._forward_hooks) for m in model.modules()))
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()

    run = record(tmp_path, model, [activations()], loop, when=sonde.at(1, 3))
    assert run.steps("activations") == [1, 3]
    assert [count > 0 for count in counts] == [False, True, False, True, False]
    assert all("__reduce_ex__" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradients_are_those_of_each_example_alone(
    tmp_path: Path, reduction: str, accumulated: int, scale: float
) -> None:
    model, data = Net().eval(), batches(accumulated)
    expected = {
        layer: torch.cat([alone(model, layer, batch) for batch in data]) for layer in ("0", "3")
    }

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            loss = F.cross_entropy(model(batch.inputs), batch.targets, reduction=reduction)
            recorder.batch(batch.ids, batch.targets, loss, reduction=reduction)  # type: ignore[arg-type]
            (loss / accumulated * scale).backward()
        optimizer.step()

    run = record(tmp_path, model, [gradients(["0", "3"])], loop)
    for layer, rows in expected.items():
        found = features(run, "output_gradients", layer, 0)
        np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-6)
    log = run["output_gradients"]
    ids = log.ids_at(0)
    assert ids is not None
    assert ids.tolist() == torch.cat([batch.ids for batch in data]).tolist()
    assert log.attributes(0)["micro_batches"] == [NUM_EXAMPLES] * accumulated
    np.testing.assert_array_equal(log.array("target"), torch.cat([b.targets for b in data]))


def test_without_the_loss_the_scale_is_said_to_be_unknown(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(1)
    expected = alone(model, "3", data[0]) / NUM_EXAMPLES
    run = record(tmp_path, model, [gradients("3")], plain_loop(model, data))
    np.testing.assert_allclose(features(run, "output_gradients", "3"), expected, rtol=1e-4)
    attributes = run["output_gradients"].attributes()
    assert attributes["scale"].startswith("unknown")
    assert attributes["ids"] == "unknown: in order of arrival"


def test_a_gradient_scaler_is_divided_out(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(1)
    expected = alone(model, "0", data[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(data[0].inputs), data[0].targets)
        recorder.batch(loss=loss)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    run = record(tmp_path, model, [gradients("0")], loop)
    found = features(run, "output_gradients", "0")
    assert np.abs(found - expected.numpy()).max() < 0.02 * expected.abs().max()


def test_gram_matrices_span_micro_batches(tmp_path: Path) -> None:
    model, data = Net(), batches(3)
    measures = [
        sonde.Activations(sonde.TRAINING),
        sonde.OutputGradients(sonde.TRAINING),
    ]
    seen = Seen(model)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            (F.cross_entropy(model(batch.inputs), batch.targets) / 3).backward()
        optimizer.step()

    run = record(tmp_path, model, measures, loop)
    for layer, outputs in seen.outputs.items():
        rows = torch.cat([output for output in outputs if len(output) == NUM_EXAMPLES]).double()
        gram = run.activations[layer].gram(0)
        np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-5, atol=1e-6)
        assert run["output_gradients"][layer].gram(0).shape == gram.shape


def test_features_over_the_budget_are_a_reason_where_micro_batches_need_them(
    tmp_path: Path,
) -> None:
    model, data = Net(), batches(2)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
        plain_loop(model, data[:1])(recorder, optimizer)

    measure = sonde.Activations(sonde.TRAINING, ["0", "3"], memory=2 * NUM_EXAMPLES * 5 * 4)
    with pytest.warns(UserWarning, match="take more memory than `memory` allows"):
        run = record(tmp_path, model, [measure], loop)
    assert run.activations.fields("3") == ["gram"]
    assert run.activations["0"].steps == [1]
    assert run.activations["3"].steps == [0, 1]


def test_passes_without_a_backward_pass_are_left_out(tmp_path: Path) -> None:
    model, data = Net(), batches(2)
    seen = Seen(model)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            model(torch.zeros(NUM_EXAMPLES, 4))
        model(torch.ones(NUM_EXAMPLES, 4))
        model(torch.ones(NUM_EXAMPLES + 1, 4))
        F.cross_entropy(model(data[0].inputs), data[0].targets).backward()
        model(torch.ones(NUM_EXAMPLES, 4))
        optimizer.step()

    run = record(tmp_path, model, [activations()], loop)
    assert run.layers == ["0", "1", "2", "3"]
    own = [output for output in seen.outputs["3"] if len(output) == NUM_EXAMPLES]
    np.testing.assert_array_equal(features(run, "activations", "3", 0), own[2])
    assert run.activations.attributes(0)["micro_batches"] == [NUM_EXAMPLES]


def test_two_passes_of_one_loss_are_calls_of_one_micro_batch(tmp_path: Path) -> None:
    model, data = Net(), batches(2)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        first, second = model(data[0].inputs), model(data[1].inputs)
        F.mse_loss(first, second).backward()
        optimizer.step()

    run = record(tmp_path, model, [activations(["0", "3"])], loop)
    assert run.layers == ["0", "3", "0#1", "3#1"]
    assert run.activations.attributes()["micro_batches"] == [NUM_EXAMPLES]


def test_named_batches_are_micro_batches_of_one_backward_pass(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(2)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        losses = []
        for batch in data:
            with recorder.batch(ids=batch.ids):
                losses.append(F.cross_entropy(model(batch.inputs), batch.targets))
                recorder.batch(loss=losses[-1])
        (sum(losses) / 2).backward()  # type: ignore[union-attr]
        optimizer.step()

    expected = torch.cat([alone(model, "3", batch) for batch in data])
    run = record(tmp_path, model, [gradients("3")], loop)
    found = features(run, "output_gradients", "3")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert run["output_gradients"].attributes()["micro_batches"] == [NUM_EXAMPLES] * 2


def test_only_the_first_evaluation_of_a_closure_counts(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(1)
    with torch.no_grad():
        expected = [model[0](data[0].inputs)]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0].inputs), data[0].targets)
        loss.backward()
        return loss

    with sonde.Recorder(
        tmp_path / "run", model, [activations("0")], when=sonde.every(1), on_error="raise"
    ) as recorder:
        recorder.attach(optimizer)
        for _ in range(2):
            optimizer.step(closure)
            with torch.no_grad():
                expected.append(model[0](data[0].inputs))
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("activations") == [0, 1]
    for step in range(2):
        np.testing.assert_array_equal(features(run, "activations", "0", step), expected[step])


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


def test_a_measure_that_fails_in_a_hook_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(sonde.Full, "part", fail)
    model, data = Net(), batches(3)
    with pytest.warns(UserWarning, match="failed at step 0 and is switched off.*no room"):
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

    with pytest.warns(UserWarning, match="failed at step 0 and is switched off.*do not look"):
        run = record(tmp_path, model, [activations()], loop, on_error="warn")
    assert run.measures == []


def test_micro_batches_of_a_lazy_model_and_of_weights_that_change(tmp_path: Path) -> None:
    class Renormalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lazy, self.head = nn.LazyLinear(4), nn.Linear(4, 3)
            self.is_changing = False

        def forward(self, x: Tensor) -> Tensor:
            if self.is_changing:
                with torch.no_grad():
                    self.head.weight.mul_(0.9)
            return torch.as_tensor(self.head(self.lazy(x)))

    model, data = Renormalized(), batches(2)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for is_changing in (False, True):
            model.is_changing = is_changing
            for batch in data:
                F.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()

    run = record(tmp_path, model, [activations()], loop)
    assert run.activations.attributes(0)["micro_batches"] == [NUM_EXAMPLES] * 2
    assert "late_passes" not in run.activations.attributes(0)
    assert run.activations.attributes(1)["micro_batches"] == [NUM_EXAMPLES]
    assert run.activations.attributes(1)["late_passes"] == 1


def test_wrong_ids_are_refused_without_ending_the_training(tmp_path: Path) -> None:
    model, data = Net(), batches(1)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        recorder.batch(ids=[[1, 2]])
        plain_loop(model, data)(recorder, optimizer)

    with pytest.warns(UserWarning, match=r"recorder.batch\(\) is ignored: `ids` has shape"):
        run = record(tmp_path, model, [activations()], loop, on_error="warn")
    assert run.steps("activations") == [0]


def test_layers_that_are_called_by_themselves_are_recorded(tmp_path: Path) -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)

    model, data = Autoencoder(), batches(2)
    codes = []

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            code = model.encoder(batch.inputs)
            codes.append(code.detach())
            F.mse_loss(model.decoder(code), batch.inputs).backward()
            optimizer.step()

    run = record(tmp_path, model, [activations()], loop)
    assert run.layers == ["encoder", "decoder"]
    for step in range(2):
        np.testing.assert_array_equal(features(run, "activations", "encoder", step), codes[step])


class Nested(nn.Module):
    """Outputs in a dict, a layer that is never called, one that is frozen, one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.never, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.recurrent = nn.GRU(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            self.frozen(x)
        hidden = self.shared(self.shared(x))
        out, _ = self.recurrent(hidden.expand(3, -1, -1))
        return {"logits": out[-1, :, :3], "hidden": hidden}


def test_every_layer_is_recorded_or_has_a_reason(tmp_path: Path) -> None:
    model, data = Nested(), batches(1)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        F.cross_entropy(model(data[0].inputs)["logits"], data[0].targets).backward()
        optimizer.step()

    with pytest.warns(UserWarning, match="lacks"):
        run = record(tmp_path, model, [activations(), gradients()], loop)
    assert set(run.activations.layers) == {
        "shared",
        "shared#1",
        "recurrent[0]",
        "recurrent[1]",
        "frozen",
    }
    assert set(run["output_gradients"].layers) == {"shared", "shared#1", "recurrent[0]"}
    assert missing(run) == {
        "never": "it was never called in the forward pass",
        "frozen": "no gradient came back to it",
        "recurrent[1]": "no gradient came back to it",
    }


class Layered(nn.Module):
    """A model of one layer and a head, the layer given by a function of the inputs."""

    def __init__(self, layer: nn.Module, apply: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self._apply_layer = layer, nn.LazyLinear(3), apply

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self._apply_layer(self.layer, x).flatten(1)))


class Halves(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(x).chunk(2, 1)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def as_sequence(layer: nn.Module, x: Tensor) -> Tensor:
    lengths = torch.tensor([3, 1, 2, 3, 2, 1])
    packed = pack_padded_sequence(
        x[:, None].expand(-1, 3, -1), lengths[: len(x)], batch_first=True, enforce_sorted=False
    )
    return torch.as_tensor(layer(packed)[1][0])


AWKWARD: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], set[str], set[str]]] = {
    # The layer, how it is used, and the names of its outputs and of the gradients of these.
    "one of two views is unused": (
        Halves(), lambda m, x: m(x)[0], {"layer[0]", "layer[1]"}, {"layer[0]"}
    ),
    "changed in place afterwards": (
        nn.Linear(4, 4), lambda m, x: m(x).relu_(), {"layer"}, {"layer"}
    ),
    "works in place": (InPlace(), lambda m, x: m(x + 0), {"layer"}, set()),
    "attention": (
        nn.MultiheadAttention(4, 2, batch_first=True),
        lambda m, x: m(x[:, None], x[:, None], x[:, None])[0],
        {"layer[0]", "layer[1]"},
        {"layer[0]"},
    ),
    "parametrized": (
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), lambda m, x: m(x),
        {"layer"}, {"layer"},
    ),
    "lazy": (nn.LazyLinear(5), lambda m, x: m(x), {"layer"}, {"layer"}),
    "batch in axis 1": (
        nn.LSTM(4, 3), lambda m, x: m(x.expand(NUM_EXAMPLES, *x.shape))[0][-1],
        {"layer[0]", "layer[1][0]", "layer[1][1]"}, {"layer[0]"},
    ),
    "a packed sequence": (
        nn.GRU(4, 3, batch_first=True), as_sequence, {"layer[0]", "layer[1]"}, {"layer[1]"}
    ),
    "called by its forward": (nn.Linear(4, 4), lambda m, x: m.forward(x), set(), set()),
    "inside torch.func": (
        nn.Linear(4, 4), lambda m, x: torch.func.vmap(m)(x), set(), set()
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AWKWARD)
def test_what_layers_do_is_recorded_or_has_a_reason(tmp_path: Path, case: str) -> None:
    layer, apply, outputs, gradient_names = AWKWARD[case]
    model, data = Layered(copy.deepcopy(layer), apply), batches(2)
    is_whole = outputs == gradient_names == {"layer"}
    with nullcontext() if is_whole else pytest.warns(UserWarning, match="lacks layer"):
        layers = ["layer", "head"]
        measures = [activations(layers), gradients(layers)]
        run = record(tmp_path, model, measures, plain_loop(model, data))
    for measure, names in (("activations", outputs), ("output_gradients", gradient_names)):
        assert {name for name in run[measure].layers if name.startswith("layer")} == names
        assert "head" in run[measure].layers
    assert bool(missing(run)) != is_whole


def test_examples_in_axis_1_of_the_inputs(tmp_path: Path) -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.head(self.rnn(x)[0]).mean(0))

    model = TimeFirst()
    inputs = torch.randn(NUM_EXAMPLES, NUM_EXAMPLES, 4)  # As many steps as examples.

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        F.cross_entropy(model(inputs), torch.arange(NUM_EXAMPLES) % 3).backward()
        optimizer.step()

    with torch.no_grad():
        expected = model.rnn(inputs)[0].transpose(0, 1).flatten(1)
    source = sonde.Training(batch_dim=1)
    run = record(tmp_path, model, [sonde.Activations(source, store=sonde.Full())], loop)
    np.testing.assert_array_equal(features(run, "activations", "rnn[0]", 0), expected)
    with pytest.raises(ValueError, match="the training is given in several ways"):
        sonde.Recorder(tmp_path / "b", model, [sonde.Activations(source), gradients()])


def test_a_last_batch_as_small_as_the_one_that_was_looked_at(tmp_path: Path) -> None:
    model = nn.LSTM(4, 3)  # Two time steps, and once two examples.
    head = nn.Linear(3, 3)
    whole = nn.ModuleDict({"rnn": model, "head": head})
    whole.forward = lambda x: head(model(x)[0][-1])

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for size in (NUM_EXAMPLES, 2):
            inputs = torch.randn(2, size, 4)
            F.cross_entropy(whole(inputs), torch.arange(size) % 3).backward()
            optimizer.step()

    source = sonde.Training(batch_dim=1)
    measure = sonde.Activations(source, "rnn", sonde.Full())
    expected = []
    model.register_forward_hook(lambda _, __, output: expected.append(output[0].detach().clone()))
    run = record(tmp_path, whole, [measure], loop)
    for step in range(2):
        rows = expected[step - 2].transpose(0, 1).flatten(1)
        np.testing.assert_array_equal(features(run, "activations", "rnn[0]", step), rows)


def test_half_precision_is_multiplied_in_float32(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(1)
    kept: list[Tensor] = []
    model[0].register_forward_hook(lambda _, __, output: kept.append(output.detach().clone()))

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(model(data[0].inputs), data[0].targets).backward()
        optimizer.step()

    run = record(tmp_path, model, [sonde.Activations(sonde.TRAINING, "0")], loop)
    rows = kept[-1].double()
    assert kept[-1].dtype == torch.bfloat16
    np.testing.assert_allclose(run.activations["0"].gram(), rows @ rows.T, rtol=1e-6, atol=1e-6)


def test_a_compiled_model_is_compiled_once(tmp_path: Path) -> None:
    model, data = Net().eval(), batches(6)
    counter = CompileCounter()
    compiled = cast("nn.Module", torch.compile(model, backend=counter))
    when = sonde.at(0, 2, 3)
    record(tmp_path, compiled, [activations(), gradients()], plain_loop(compiled, data), when=when)
    assert counter.frame_count == 1


def test_a_resumed_training_records_the_step_of_its_checkpoint(tmp_path: Path) -> None:
    model, data = Net(), batches(4)
    state: dict[str, Any] = {}

    def first(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        plain_loop(model, data[:2])(recorder, optimizer)
        state.update(recorder.state_dict())

    def second(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        recorder.load_state_dict(state)
        plain_loop(model, data[2:])(recorder, optimizer)

    record(tmp_path, model, [activations()], first)
    run = record(tmp_path, model, [activations()], second, resume=True)
    assert run.steps("activations") == [0, 1, 2, 3]


def test_a_probe_and_the_training_are_recorded_side_by_side(tmp_path: Path) -> None:
    model, data = Net(), batches(2)
    probe = sonde.Probe(data[0].inputs)
    run = record(
        tmp_path, model, [sonde.Activations(probe), activations()], plain_loop(model, data)
    )
    assert run.steps("activations", source="training") == [0, 1]
    assert run.steps("activations", source="probe") == [0, 1, 2]


def test_output_gradients_of_a_probe_are_refused(tmp_path: Path) -> None:
    measure = sonde.OutputGradients(sonde.Probe(torch.ones(2, 4)))
    with pytest.raises(ValueError, match=r"give sonde\.TRAINING"):
        sonde.Recorder(tmp_path / "run", Net(), [measure])


def test_examples_that_only_fill_up_a_batch_are_marked(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    measures = [sonde.Activations(sonde.TRAINING)]
    recorder = sonde.Recorder(tmp_path / "run", model, measures, when=sonde.every(1))
    recorder.attach(optimizer)
    for num_real in (None, 1):
        for _ in range(2):
            with recorder.batch(ids=torch.arange(3)):
                loss = model(torch.ones(3, 3)).sum()
            loss.backward()
        with recorder.batch(ids=torch.arange(3)):
            loss = model(torch.ones(3, 3)).sum()
            recorder.batch(loss=loss, reduction="sum")
            recorder.batch(num_real=num_real)
        loss.backward()
        optimizer.step()
    recorder.close()
    log = sonde.open_run(tmp_path / "run").activations
    assert log.steps_of("is_duplicate") == [1]
    assert log.array("is_duplicate", 1).tolist() == [False] * 7 + [True] * 2


def test_a_negative_number_of_examples_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    measures = [sonde.Activations(sonde.TRAINING)]
    with sonde.Recorder(tmp_path / "run", model, measures, on_error="raise") as recorder:
        with pytest.raises(sonde.SondeError, match=r"`num_real` \(=-1\) must be >= 0"):
            recorder.batch(num_real=-1)


def test_a_measure_of_a_probe_is_no_pass_of_the_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    inputs, targets = torch.randn(7, 4), torch.arange(7) % 3
    measures = [
        sonde.Activations(sonde.TRAINING),
        sonde.ExampleGradients(sonde.Probe(inputs, targets), nn.functional.cross_entropy),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sonde.Recorder(tmp_path / "run", model, measures, on_error="raise")
    recorder.attach(optimizer)
    recorder.measure()  # While the training is observed.
    nn.functional.cross_entropy(model(inputs[:5]), targets[:5]).backward()
    optimizer.step()
    recorder.close()
    run = sonde.open_run(tmp_path / "run")
    assert run.activations["0"].gram(step=0).shape == (5, 5)
    assert run.steps("example_gradients") == [0, 1]
