"""The recorder: it counts, measures when due, and never disturbs or ends a training."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sonde
from sonde.exceptions import InvalidInputError
from sonde.hooks import Recording, Subject
from tests.hooks.conftest import ConvNet, everything, train


def trained(
    images: Tensor, classes: Tensor, kind: Any, path: Path | None
) -> tuple[list[Any], list[Any]]:
    """Train from a fixed seed; return (weights and buffers, losses and random states) as lists."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = ConvNet()
    optimizer = kind(model.parameters(), lr=0.05)
    if path is not None:
        measures = everything(images, classes)
        recorder = sonde.Recorder(path, model, measures, when=sonde.every(1)).attach(optimizer)
    losses = train(model, optimizer, images, classes)
    if path is not None:
        recorder.close()
    states = [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]
    state = [value.tolist() for value in model.state_dict().values()]
    gradients = [p.grad.tolist() for p in model.parameters() if p.grad is not None]
    return [*state, *gradients], [losses, *states, [m.training for m in model.modules()]]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_training_is_bit_identical_with_and_without_a_recorder(
    tmp_path: Path, images: Tensor, classes: Tensor, kind: Any
) -> None:
    bare = trained(images, classes, kind, None)
    recorded = trained(images, classes, kind, tmp_path / "run")
    assert recorded == bare
    run = sonde.open_run(tmp_path / "run")
    assert len(run.measures) == 5
    assert run.steps() == list(range(7))


# Dynamo's own look at the input of an inner layer, with or without a recorder.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("form", ["whole", "in place", "inner layer"])
def test_a_compiled_model_is_recorded_eagerly_and_not_compiled_again(
    tmp_path: Path, images: Tensor, classes: Tensor, form: str
) -> None:
    num_graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    torch.manual_seed(0)
    plain = ConvNet()
    model: Any = plain
    if form == "whole":
        model = torch.compile(plain, backend=count)
    elif form == "in place":
        plain.compile(backend=count)
    else:
        plain[6] = cast(nn.Module, torch.compile(plain[6], backend=count))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    recorder = sonde.Recorder(
        tmp_path / "run", model, everything(images, classes), when=sonde.every(2)
    ).attach(optimizer)
    train(model, optimizer, images, classes)
    recorder.close()
    run = sonde.open_run(tmp_path / "run")
    assert num_graphs == 1
    assert run.layers == ["0", "1", "2", "3", "4", "5", "6"]
    assert run.steps() == [0, 2, 4, 6]


def test_step_zero_is_measured_before_the_first_step(
    tmp_path: Path, conv_net: nn.Module, images: Tensor
) -> None:
    initial = {name: value.clone() for name, value in conv_net.state_dict().items()}
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    probe = sonde.Probe(images)
    recorder = sonde.Recorder(
        tmp_path / "run", conv_net, [sonde.Predictions(probe)], when=sonde.at(0)
    )
    recorder.attach(optimizer)
    # The ordinary loop moves BatchNorm statistics before the step; only weights are initial.
    conv_net.eval()
    conv_net(images).sum().backward()
    optimizer.step()
    recorder.close()
    conv_net.load_state_dict(initial)
    with torch.no_grad():
        expected = conv_net(images).numpy()
    actual = sonde.open_run(tmp_path / "run").predictions.array("logits", 0)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_measures_follow_their_own_schedule_or_the_recorders(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    probe = sonde.Probe(images, classes)
    measures = [sonde.Predictions(probe), sonde.Activations(probe, when=sonde.at(2, 5))]
    with sonde.Recorder(tmp_path / "run", conv_net, measures, when=sonde.every(3)) as recorder:
        recorder.attach(optimizer)
        train(conv_net, optimizer, images, classes)
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("predictions") == [0, 3, 6]
    assert run.steps("activations") == [2, 5]


@pytest.mark.parametrize("known", [True, False])
def test_epochs_are_counted_or_told(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor, known: bool
) -> None:
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    recorder = sonde.Recorder(
        tmp_path / "run",
        conv_net,
        [sonde.Predictions(sonde.Probe(images))],
        when=sonde.epochs(2),
        steps_per_epoch=2 if known else None,
    ).attach(optimizer)

    def tell(step: int) -> None:
        if step % 2 == 0:
            recorder.epoch()

    train(conv_net, optimizer, images, classes, num_steps=8, after_step=tell)
    recorder.close()
    assert sonde.open_run(tmp_path / "run").steps() == [0, 4, 8]


def test_an_epoch_schedule_without_epochs_is_warned_of(
    tmp_path: Path, conv_net: nn.Module, images: Tensor
) -> None:
    measure = sonde.Predictions(sonde.Probe(images), when=sonde.epochs(1))
    recorder = sonde.Recorder(tmp_path / "run", conv_net, [measure])
    recorder.measure()
    recorder.step()
    with pytest.warns(UserWarning, match="no epoch was ever counted"):
        recorder.close()


def test_a_loop_that_calls_step_measures_when_due(
    tmp_path: Path, conv_net: nn.Module, images: Tensor
) -> None:
    recorder = sonde.Recorder(
        tmp_path / "run", conv_net, [sonde.Predictions(sonde.Probe(images))], when=sonde.every(2)
    )
    recorder.measure()
    for _ in range(4):
        recorder.step()
    recorder.close()
    assert sonde.open_run(tmp_path / "run").steps() == [0, 2, 4]


def test_a_missed_step_zero_is_warned_of(
    tmp_path: Path, conv_net: nn.Module, images: Tensor
) -> None:
    measure = sonde.Predictions(sonde.Probe(images))
    with sonde.Recorder(tmp_path / "run", conv_net, [measure]) as recorder:
        with pytest.warns(UserWarning, match=r"call recorder\.measure\(\) before the loop"):
            recorder.step()


class Failing(sonde.Scalars):
    """A measure that fails at its second record."""

    def record(self, subject: Subject) -> Recording:
        if subject.scalars.get("fail"):
            raise RuntimeError("no more")
        return super().record(subject)


def test_a_failing_measure_is_switched_off_warned_of_once_and_marked(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    measures = [Failing(), sonde.Predictions(sonde.Probe(images))]
    recorder = sonde.Recorder(tmp_path / "run", conv_net, measures, when=sonde.every(1))
    recorder.attach(optimizer)
    with pytest.warns(
        UserWarning, match="switches it off; the training goes on. Reason: Runtime"
    ) as caught:
        train(
            conv_net,
            optimizer,
            images,
            classes,
            after_step=lambda step: recorder.log(fail=step >= 2),
        )
    recorder.close()
    run = sonde.open_run(tmp_path / "run")
    assert len(caught) == 1
    assert run.steps("scalars") == [0, 1, 2]
    assert run.steps("predictions") == [0, 1, 2, 3, 4, 5, 6]
    note = next(note for note in run.notes if note["event"] == "disabled")
    assert (note["measure"], note["step"]) == ("scalars", 3)
    assert "RuntimeError: no more" in note["reason"]


def test_warnings_turned_into_errors_do_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = sonde.Recorder(tmp_path / "run", nn.Identity(), [Failing()], when=sonde.every(1))
    recorder.measure()
    recorder.log(fail=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder.step()
    recorder.close()
    assert "sonde switches it off" in capsys.readouterr().err


def test_on_error_raise_shows_the_failure(tmp_path: Path) -> None:
    recorder = sonde.Recorder(
        tmp_path / "run", nn.Identity(), [Failing()], when=sonde.every(1), on_error="raise"
    )
    recorder.log(fail=True)
    with pytest.raises(RuntimeError, match="no more"):
        recorder.measure()
    recorder.close()


def test_closing_lets_go_of_the_optimizer(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    measure = sonde.Predictions(sonde.Probe(images))
    recorder = sonde.Recorder(tmp_path / "run", conv_net, [measure], when=sonde.every(1))
    recorder.attach(optimizer)
    train(conv_net, optimizer, images, classes, num_steps=2)
    recorder.close()
    train(conv_net, optimizer, images, classes, num_steps=2)
    assert sonde.open_run(tmp_path / "run").steps() == [0, 1, 2]


def test_lazy_layers_are_not_made_by_a_probe(tmp_path: Path) -> None:
    model = nn.LazyLinear(3)
    recorder = sonde.Recorder(
        tmp_path / "run", model, [sonde.Predictions(sonde.Probe(torch.randn(4, 2)))]
    )
    with pytest.warns(UserWarning, match="lazy layers have no parameters before"):
        recorder.measure()
    assert isinstance(model.weight, nn.UninitializedParameter)
    model(torch.randn(1, 2))
    recorder.measure()
    recorder.close()
    assert sonde.open_run(tmp_path / "run").steps() == [0]


def test_the_run_says_where_it_came_from(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    probe = sonde.Probe(images, classes)
    recorder = sonde.Recorder(
        tmp_path / "run",
        conv_net,
        [sonde.Activations(probe)],
        config={"lr": 0.1, "width": np.int64(64), "noise": torch.tensor(0.5), "data": Path("x")},
    )
    recorder.close()
    info = sonde.open_run(tmp_path / "run").info
    assert next(iter(info)) == "format"
    # Numbers stay numbers, so that runs can be told apart and ordered by them.
    assert info["config"] == {"lr": 0.1, "width": 64, "noise": 0.5, "data": "x"}
    assert info["environment"]["packages"]["torch"] == torch.__version__
    assert info["model"]["layers"]["1"] == "BatchNorm2d"
    assert info["probes"]["probe"]["num_examples"] == 24
    assert info["measures"][0]["when"] == "log_spaced(per_decade=8)"


@pytest.mark.parametrize("twice", [True, False])
def test_attach_refuses_what_it_cannot_count(
    tmp_path: Path, conv_net: nn.Module, twice: bool
) -> None:
    recorder = sonde.Recorder(tmp_path / "run", conv_net, [sonde.Scalars()])
    optimizer: Any = torch.optim.SGD(conv_net.parameters(), lr=0.1) if twice else conv_net
    message = "attached already" if twice else "expected a torch.optim.Optimizer"
    with pytest.raises(InvalidInputError, match=message):
        recorder.attach(optimizer).attach(optimizer)
    recorder.close()


def test_a_start_takes_what_is_due_at_step_0_once(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    measures = [
        sonde.Predictions(sonde.Probe(images), when=sonde.every(1)),
        sonde.Activations(sonde.Probe(images, name="later"), when=sonde.at(1)),
    ]
    recorder = sonde.Recorder(tmp_path / "run", conv_net, measures)
    recorder.start()
    before = [parameter.detach().clone() for parameter in conv_net.parameters()]
    recorder.attach(optimizer)
    train(conv_net, optimizer, images, classes, num_steps=1)
    recorder.close()
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("predictions") == [0, 1]
    assert run.steps("activations") == [1]
    assert not all(map(torch.equal, before, conv_net.parameters()))
