"""The recorder: it counts, measures when due, and never disturbs or ends a training."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.exceptions import InvalidInputError, MismatchError, RunExistsError
from sonde.hooks import Recording, Subject
from sonde.log import LogWriter
from sonde.log.layout import write_run_file

from .conftest import ConvNet, train


def everything(images: Tensor, classes: Tensor) -> list[Any]:
    probe = sonde.Probe(images, classes, batch_size=10)
    return [
        sonde.Activations(probe),
        sonde.ExampleGradients(probe, F.cross_entropy),
        sonde.Predictions(probe),
        sonde.DecisionPlanes(images, classes, triplets=3, resolution=6),
        sonde.Scalars(),
    ]


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
    with pytest.warns(UserWarning, match="switched off; the training goes on") as caught:
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
    assert "switched off" in capsys.readouterr().err


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


def test_an_idle_model_carries_no_hooks(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    recorder = sonde.attach(
        conv_net, optimizer, tmp_path / "run", probe=sonde.Probe(images, classes), planes=2
    )
    train(conv_net, optimizer, images, classes, num_steps=2)
    assert [m for m in conv_net.modules() if m._forward_hooks or m._forward_pre_hooks] == []
    recorder.close()


def test_attach_records_what_the_probe_allows(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    found = {}
    for name, probe in {"all": sonde.Probe(images, classes), "inputs": sonde.Probe(images)}.items():
        planes = 2 if probe.targets is not None else 0
        recorder = sonde.attach(
            conv_net, optimizer, tmp_path / name, probe=probe, planes=planes, resolution=4
        )
        train(conv_net, optimizer, images, classes, num_steps=1)
        recorder.close()
        found[name] = sorted(sonde.open_run(tmp_path / name).measures)
    assert found["all"] == [
        "activations",
        "decision_planes",
        "example_gradients",
        "predictions",
        "scalars",
    ]
    assert found["inputs"] == ["activations", "predictions", "scalars"]


def test_attach_refuses_planes_the_probe_does_not_allow(
    tmp_path: Path, conv_net: nn.Module, images: Tensor
) -> None:
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match="`planes` needs a probe of one input tensor with"):
        sonde.attach(conv_net, optimizer, tmp_path / "run", probe=images, planes=2)


def test_an_optimizer_that_takes_no_hooks_is_not_attached(
    tmp_path: Path, conv_net: nn.Module
) -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer  # Without the base class: no place for hooks.

    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    recorder = sonde.Recorder(tmp_path / "run", conv_net, [sonde.Scalars()])
    with pytest.raises(AttributeError):
        recorder.attach(Wrapper(optimizer))
    recorder.attach(optimizer)
    recorder.close()


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


def test_a_recorder_of_an_earlier_try_is_closed_before_its_run_is_overwritten(
    tmp_path: Path, images: Tensor
) -> None:
    def make() -> sonde.Recorder:
        measure = sonde.Predictions(sonde.Probe(images))
        return sonde.Recorder(tmp_path / "run", nn.Flatten(), [measure], overwrite=True)

    first = make()
    second = make()
    first.measure()
    second.measure()
    first.close()
    assert sonde.open_run(tmp_path / "run").state == "recording"
    second.close()
    assert sonde.open_run(tmp_path / "run").steps() == [0]


def test_a_run_that_another_process_writes_is_not_overwritten(
    tmp_path: Path, images: Tensor
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    write_run_file(path, {})
    writer = LogWriter(path, seal=False)
    measure = sonde.Predictions(sonde.Probe(images))
    with pytest.raises(RunExistsError, match="is being written by another process"):
        sonde.Recorder(path, nn.Flatten(), [measure], overwrite=True)
    writer.close()


def test_the_run_says_where_it_came_from(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    probe = sonde.Probe(images, classes)
    recorder = sonde.Recorder(
        tmp_path / "run", conv_net, [sonde.Activations(probe)], config={"lr": 0.1}
    )
    recorder.close()
    info = sonde.open_run(tmp_path / "run").info
    assert next(iter(info)) == "format"
    assert info["config"] == {"lr": 0.1}
    assert info["environment"]["packages"]["torch"] == torch.__version__
    assert info["model"]["layers"]["1"] == "BatchNorm2d"
    assert info["probes"]["probe"]["num_examples"] == 24
    assert info["measures"][0]["when"] == "log_spaced(per_decade=8)"


def test_a_run_is_not_overwritten_unless_asked(tmp_path: Path, images: Tensor) -> None:
    def make(**options: Any) -> sonde.Recorder:
        measure = sonde.Predictions(sonde.Probe(images))
        return sonde.Recorder(tmp_path / "run", nn.Flatten(), [measure], **options)

    first = make()
    first.measure()
    first.close()
    with pytest.raises(
        RunExistsError, match=r"already holds a run; .* resume=True, .* overwrite=True"
    ):
        make()
    make(overwrite=True).close()
    assert sonde.open_run(tmp_path / "run").steps() == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: [sonde.Predictions(p), sonde.Predictions(p)], "Predictions is given twice"),
        (
            lambda p: [
                sonde.Predictions(sonde.Probe(torch.ones(2), name="a")),
                sonde.Activations(sonde.Probe(torch.ones(3), name="a")),
            ],
            "two different sources are called 'a'",
        ),
        (lambda p: ["activations"], "must be a list of measures"),
    ],
)
def test_measures_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, images: Tensor, make: Callable[[sonde.Probe], Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        sonde.Recorder(tmp_path / "run", nn.Flatten(), make(sonde.Probe(images)))


def test_unnamed_probes_get_names(tmp_path: Path, images: Tensor) -> None:
    measures = [sonde.Predictions(sonde.Probe(images)), sonde.Predictions(sonde.Probe(images))]
    recorder = sonde.Recorder(tmp_path / "run", nn.Flatten(), measures)
    recorder.measure()
    recorder.close()
    run = sonde.open_run(tmp_path / "run")
    assert run.sources("predictions") == ["probe", "probe1"]


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


def resumable(
    path: Path, images: Tensor, classes: Tensor, num_steps: int, checkpoint: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Train up to `num_steps`, from a checkpoint or from scratch; return a checkpoint a step."""
    torch.manual_seed(0)
    model = ConvNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    recorder = sonde.Recorder(
        path,
        model,
        everything(images, classes),
        when=sonde.every(2) | sonde.epochs(1),
        steps_per_epoch=3,
        resume=True,
    ).attach(optimizer)
    if checkpoint is not None:
        saved = copy.deepcopy(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        recorder.load_state_dict(saved["recorder"])
    checkpoints = []

    def keep(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "recorder": recorder.state_dict(),
        }
        checkpoints.append(copy.deepcopy(state))

    train(
        model,
        optimizer,
        images,
        classes,
        num_steps=num_steps - recorder.num_steps,
        after_step=keep,
    )
    recorder.close()
    return checkpoints


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_resumed_training_leaves_the_log_of_an_uninterrupted_one(
    tmp_path: Path, images: Tensor, classes: Tensor, at: int
) -> None:
    resumable(tmp_path / "whole", images, classes, 9, None)
    checkpoints = resumable(tmp_path / "cut", images, classes, 5, None)
    again = resumable(tmp_path / "cut", images, classes, 7, checkpoints[at - 1])
    resumable(tmp_path / "cut", images, classes, 9, again[-2])
    whole, cut = sonde.open_run(tmp_path / "whole"), sonde.open_run(tmp_path / "cut")
    assert [a["attempt"] for a in cut.attempts] == [0, 1, 2]
    for measure in whole.measures:
        assert cut.steps(measure) == whole.steps(measure)
        for layer, field in whole[measure].streams:
            for step in whole[measure].steps_of(field, layer):
                expected = whole[measure].array(field, step, layer)
                assert np.array_equal(cut[measure].array(field, step, layer), expected)


def test_an_attempt_that_recorded_nothing_supersedes_nothing(
    tmp_path: Path, images: Tensor, classes: Tensor
) -> None:
    resumable(tmp_path / "run", images, classes, 4, None)
    probe = everything(images, classes)
    sonde.Recorder(tmp_path / "run", ConvNet(), probe, resume=True).close()
    assert sonde.open_run(tmp_path / "run").steps() == [0, 2, 3, 4]


def test_an_attempt_says_where_it_goes_on_as_soon_as_it_knows(
    tmp_path: Path, images: Tensor, classes: Tensor
) -> None:
    def stated(*, load: bool = False, measure: bool = False) -> int | None:
        recorder = sonde.Recorder(
            tmp_path / "run", ConvNet(), everything(images, classes), resume=True
        )
        if load:
            recorder.load_state_dict({"version": 1, "num_steps": 3, "num_epochs": 1})
        if measure:
            recorder.measure()
        recorder.close()
        step: int | None = sonde.open_run(tmp_path / "run").attempts[-1]["resume_step"]
        return step

    assert stated() is None
    assert stated(measure=True) == 0
    assert stated(load=True) == 4
    assert stated(load=True, measure=True) == 4


def test_other_examples_or_measures_are_not_mixed_into_a_run(
    tmp_path: Path, images: Tensor
) -> None:
    def make(data: Tensor, **options: Any) -> sonde.Recorder:
        measure = sonde.Activations(sonde.Probe(data), "", **options)
        return sonde.Recorder(tmp_path / "run", nn.Flatten(), [measure], resume=True)

    make(images).close()
    with pytest.raises(MismatchError, match=r"other examples as 'probe' \(input_digest"):
        make(images * 2)
    with pytest.raises(MismatchError, match="was recorded with other measures"):
        make(images, store=sonde.Sketch(4))


def test_a_state_that_cannot_be_loaded_is_refused(tmp_path: Path, images: Tensor) -> None:
    measure = sonde.Predictions(sonde.Probe(images))
    recorder = sonde.Recorder(tmp_path / "run", nn.Flatten(), [measure])
    with pytest.raises(InvalidInputError, match=r"expected what recorder\.state_dict"):
        recorder.load_state_dict({"step": 3})
    state = recorder.state_dict()
    recorder.measure()
    with pytest.raises(InvalidInputError, match="recording has begun already"):
        recorder.load_state_dict(state)
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
