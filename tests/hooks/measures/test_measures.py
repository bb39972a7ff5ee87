"""What activations, predictions, gradients and scalars put into the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.exceptions import InvalidInputError, LayerNotFoundError
from sonde.hooks import Measure, Subject
from tests.hooks.conftest import loop_gram


def record(path: Path, model: nn.Module, *measures: Measure) -> sonde.Run:
    recorder = sonde.Recorder(path / "run", model, measures)
    recorder.measure()
    recorder.close()
    return sonde.open_run(path / "run")


def outputs_of(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Every layer's output in eval mode, copied before an in-place operation changes it."""
    outputs = []
    model.eval()
    with torch.no_grad():
        for layer in model.children():
            inputs = layer(inputs.clone())
            outputs.append(inputs.clone())
    return outputs


@pytest.mark.parametrize("batch_size", [7, 24, 100])
def test_grams_are_those_of_the_layers_outputs(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, batch_size: int
) -> None:
    probe = sonde.Probe(images, batch_size=batch_size)
    run = record(tmp_path, conv_net, sonde.Activations(probe))
    for layer, output in zip(run.layers, outputs_of(conv_net, images), strict=True):
        features = output.flatten(1).double().numpy()
        np.testing.assert_allclose(
            run.activations[layer].gram(), features @ features.T, rtol=1e-4, atol=1e-4
        )


def test_full_features_are_the_outputs_before_the_in_place_relu(
    tmp_path: Path, conv_net: nn.Module, images: Tensor
) -> None:
    run = record(tmp_path, conv_net, sonde.Activations(sonde.Probe(images), store=sonde.Full()))
    expected = outputs_of(conv_net, images)[1].flatten(1).numpy()
    assert expected.min() < 0
    np.testing.assert_allclose(run.activations["1"].features(), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_features_come_back_exactly(tmp_path: Path, images: Tensor) -> None:
    store = sonde.Full(torch.bfloat16)
    run = record(tmp_path, nn.Flatten(), sonde.Activations(sonde.Probe(images), "", store))
    expected = images.flatten(1).bfloat16().float().numpy()
    assert np.array_equal(run.activations[""].features(), expected)


def test_a_gram_from_a_sketch_is_close_to_the_exact_one(tmp_path: Path, images: Tensor) -> None:
    store = sonde.Sketch(4096)
    run = record(tmp_path, nn.Flatten(), sonde.Activations(sonde.Probe(images), "", store))
    flat = images.flatten(1).double().numpy()
    exact = flat @ flat.T
    # The standard error is about the product of two norms over sqrt(dim).
    assert np.abs(run.activations[""].gram() - exact).max() < 8 * exact.max() / 64


class Awkward(nn.Module):
    """Layers that are called twice, return tuples, change the batch, or never run."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self.never = nn.Linear(4, 4)
        self.folded = nn.Identity()
        self.mean = nn.Identity()
        self.indices = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x))
        out, _ = self.lstm(x[:, None])
        self.folded(x.reshape(2 * len(x), 2))
        self.mean(x.mean(0))
        self.indices(x.argmax(1))
        return torch.as_tensor(out[:, 0])


def test_every_selected_layer_is_recorded_or_has_a_reason(tmp_path: Path) -> None:
    probe = sonde.Probe(torch.randn(5, 4))
    with pytest.warns(UserWarning, match="activations of 'probe' lacks"):
        run = record(tmp_path, Awkward(), sonde.Activations(probe))
    # The states of an LSTM have the examples in axis 1.
    states = ["lstm[1][0]", "lstm[1][1]"]
    assert run.layers == ["twice", "twice#1", "lstm[0]", *states, "folded"]
    reasons = {note["name"]: note["reason"] for note in run.notes if note["event"] == "missing"}
    assert reasons == {
        "mean": "no axis of its output [4] is the batch of 5",
        "indices": "its output is torch.int64, not floating point",
        "never": "it was never called in the forward pass",
    }


def test_an_axis_that_only_has_the_size_of_the_batch_is_not_taken_for_it(tmp_path: Path) -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.out(self.mix(x.transpose(0, 1)).cumsum(0)[-1]))

    inputs, model = torch.randn(5, 5, 4), TimeFirst()
    run = record(tmp_path, model, sonde.Activations(sonde.Probe(inputs), store=sonde.Full()))
    assert run.layers == ["mix", "out"]
    expected = model.mix(inputs).detach().flatten(1)
    np.testing.assert_allclose(run.activations["mix"].features(), expected, rtol=1e-6)


def test_batches_that_differ_in_shape_are_a_reason(tmp_path: Path) -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.out = nn.Identity(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.cut(x[:, : int(x[0, 0])])
            return torch.as_tensor(self.out(x))

    inputs = torch.tensor([[1.0, 0, 0, 0]] * 4 + [[2.0, 0, 0, 0]] * 4)
    probe = sonde.Probe(inputs, batch_size=4)
    with pytest.warns(UserWarning, match=r"cut: its output for an example changes in shape"):
        run = record(tmp_path, Ragged(), sonde.Activations(probe))
    assert run.layers == ["out"]


def test_a_model_that_works_in_place_on_its_input_changes_nobodys_data(tmp_path: Path) -> None:
    data = torch.randn(8, 4)
    before = data.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    probe = sonde.Probe(data[:6], torch.arange(6) % 3)
    measures = [
        sonde.Activations(probe),
        sonde.Predictions(probe),
        sonde.ExampleGradients(probe, F.cross_entropy),
    ]
    record(tmp_path, model, *measures)
    assert torch.equal(data, before)
    assert torch.equal(torch.as_tensor(probe.inputs), before[:6])


def test_a_transformer_layer_is_recorded_part_by_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    run = record(tmp_path, layer, sonde.Activations(sonde.Probe(torch.randn(5, 3, 8))))
    assert {"self_attn", "linear1", "linear2", "norm1"} <= set(run.layers)


def test_selectors_choose_the_layers(tmp_path: Path, conv_net: nn.Module, images: Tensor) -> None:
    measure = sonde.Activations(sonde.Probe(images), layers=[nn.Conv2d, "6"])
    assert record(tmp_path, conv_net, measure).layers == ["0", "6"]


def test_a_selector_that_takes_nothing_is_refused_before_training(
    tmp_path: Path, conv_net: nn.Module, images: Tensor
) -> None:
    with pytest.raises(LayerNotFoundError, match="no layer matches 'conv9'"):
        record(tmp_path, conv_net, sonde.Activations(sonde.Probe(images), "conv9"))
    assert not (tmp_path / "run").exists()


def test_gradient_kernels_are_those_of_the_loop(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    probe = sonde.Probe(images, classes, batch_size=10)
    run = record(tmp_path, conv_net, sonde.ExampleGradients(probe, F.cross_entropy))
    expected = loop_gram(conv_net.double(), F.cross_entropy, images.double(), classes).numpy()
    actual = run.example_gradients.gram()
    np.testing.assert_allclose(actual, expected, atol=1e-5 * expected.max())
    layers = run.example_gradients.layers
    summed = np.sum([run.example_gradients[layer].gram() for layer in layers], axis=0)
    np.testing.assert_allclose(actual, summed, rtol=1e-6, atol=1e-6 * expected.max())


def test_gradients_of_chosen_layers_only(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    probe = sonde.Probe(images, classes)
    run = record(tmp_path, conv_net, sonde.ExampleGradients(probe, F.cross_entropy, "6"))
    np.testing.assert_array_equal(run.example_gradients.gram(), run.example_gradients["6"].gram())
    assert run.example_gradients.layers == ["6"]


def test_the_total_alone_can_be_kept(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    measure = sonde.ExampleGradients(sonde.Probe(images, classes), F.cross_entropy, per_layer=False)
    run = record(tmp_path, conv_net, measure)
    fields = ("gram_total", "norm_total", "is_saturated")
    assert run.example_gradients.streams == [(None, field) for field in fields]


class Turned(nn.Module):
    """A layer with a complex parameter, whose gradients are not recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.out((x * self.turn).real))


def test_uncovered_parameters_are_warned_of_and_logged(tmp_path: Path) -> None:
    probe = sonde.Probe(torch.randn(6, 4), torch.arange(6) % 3)
    with pytest.warns(UserWarning, match=r"lacks turn: it is complex"):
        run = record(tmp_path, Turned(), sonde.ExampleGradients(probe, F.cross_entropy))
    coverage = next(note for note in run.notes if note["event"] == "coverage")["parameters"]
    assert coverage["turn"].startswith("unsupported: it is complex")
    assert coverage["out.weight"] == "exact"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: sonde.ExampleGradients(sonde.Probe(x), F.cross_entropy), "has no targets"),
        (
            lambda x: sonde.ExampleGradients(sonde.Probe(x, [0] * len(x)), cast(Any, "mse")),
            r"`loss` \(='mse'\) must be a function",
        ),
    ],
)
def test_gradients_without_loss_or_targets_are_refused(
    images: Tensor, make: Any, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make(images)


def test_gradients_of_a_frozen_model_are_refused(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    measure = sonde.ExampleGradients(sonde.Probe(images, classes), F.cross_entropy)
    with pytest.raises(InvalidInputError, match="no selected layer owns a parameter"):
        record(tmp_path, conv_net.requires_grad_(False), measure)


def test_predictions_are_the_models_outputs(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    run = record(tmp_path, conv_net, sonde.Predictions(sonde.Probe(images, classes, batch_size=7)))
    expected = outputs_of(conv_net, images)[-1].numpy()
    np.testing.assert_allclose(run.predictions.array("logits"), expected, rtol=1e-5, atol=1e-6)
    assert run.predictions.targets is not None
    assert run.predictions.targets.tolist() == classes.tolist()


def test_predictions_take_the_logits_of_a_nested_output(tmp_path: Path, images: Tensor) -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": x, "logits": x.flatten(1)[:, :3]}

    run = record(tmp_path, Nested(), sonde.Predictions(sonde.Probe(images)))
    assert run.predictions.array("logits").tolist() == images.flatten(1)[:, :3].tolist()


def test_ids_stand_in_the_log(tmp_path: Path, images: Tensor) -> None:
    probe = sonde.Probe(images, ids=torch.arange(24) * 10)
    run = record(tmp_path, nn.Flatten(), sonde.Predictions(probe))
    assert run.predictions.ids is not None
    assert run.predictions.ids.tolist() == list(range(0, 240, 10))


def test_scalars_are_the_latest_values_and_the_learning_rates() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": [weights[0]]}, {"params": [weights[1]], "lr": 2.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    subject = Subject(nn.Identity(), [optimizer], {"loss": torch.tensor(0.5), "bad": "text"})
    recording = sonde.Scalars().record(subject)
    values = {array.field: array.values.item() for array in recording.arrays}
    assert values == {"learning_rate": 1.0, "learning_rate_1": 2.0, "loss": 0.5}
    assert list(recording.missing) == ["bad"]


class Reusing(nn.Module):
    """It returns memory that it uses again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("results", torch.zeros(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        results = self.get_buffer("results")[: len(x)]
        results[:] = x
        return results


def test_predictions_are_not_overwritten_by_the_next_batch(tmp_path: Path) -> None:
    x = torch.randn(16, 3, generator=torch.manual_seed(0))
    measures = [sonde.Predictions(sonde.Probe(x, batch_size=8))]
    with sonde.Recorder(tmp_path / "run", Reusing(), measures, on_error="raise") as recorder:
        recorder.measure()
    logits = sonde.open_run(tmp_path / "run").predictions.array("logits")
    assert np.array_equal(logits, x.numpy())


def test_predictions_without_a_row_per_example_are_refused(tmp_path: Path) -> None:
    probe = sonde.Probe(torch.randn(4, 5, 3))
    model = nn.Flatten(0, 1)
    with sonde.Recorder(tmp_path / "run", model, [sonde.Predictions(probe)]) as recorder:
        with pytest.warns(UserWarning, match=r"outputs \[20, 3\] have no row for each of the 4"):
            recorder.measure()
