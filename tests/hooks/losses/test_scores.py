"""Which output of a model is recorded, decides on planes and goes into the default loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.exceptions import InvalidInputError, SondeWarning
from sonde.hooks import Subject
from sonde.hooks.config.file import load_config

_X = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
_CLASSES = torch.arange(12) % 3
_BINARY = torch.arange(12) % 2


@dataclass
class Output:
    loss: Tensor
    hidden: Tensor
    scores: Tensor


class Net(nn.Module):
    """Returns what a function makes of its 16 hidden units and its scores of classes."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any], num_scores: int = 3) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.hidden, self.head = nn.Linear(10, 16), nn.Linear(16, num_scores)
        self.form = form

    def scores(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(torch.relu(self.hidden(x))))

    def forward(self, x: Tensor) -> Any:
        return self.form(torch.relu(self.hidden(x)), self.scores(x))


def _record(path: Path, model: nn.Module, measure: sonde.hooks.Measure) -> sonde.Run:
    recorder = sonde.Recorder(path, model, [measure], on_error="raise")
    recorder.measure()
    recorder.close()
    return sonde.open_run(path)


def _by_hand(model: Net, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    """Norms of each example's gradient, one at a time."""
    norms = []
    for x, y in zip(_X, targets, strict=True):
        grads = torch.autograd.grad(loss(model.scores(x[None]), y[None]), list(model.parameters()))
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
    return norms


@pytest.mark.parametrize(
    ("form", "output"),
    [
        (lambda h, s: s, None),
        (lambda h, s: [s], None),
        (lambda h, s: {"out": s}, None),
        (lambda h, s: {"out": s}, "out"),
        (lambda h, s: {"hidden": h, "logits": s}, None),
        (lambda h, s: (h, {"logits": s}), None),
        (lambda h, s: {"loss": s.mean(), "out": s}, None),
        (lambda h, s: (s, h[:, :2], s.argmax(1)), None),
        (lambda h, s: (h, s), "[1]"),
        (lambda h, s: (h, s), 1),
        (lambda h, s: {"hidden": h, "out": s}, "out"),
        (lambda h, s: Output(s.mean(), h, s), "[scores]"),
        (lambda h, s: (h, {"a": [s]}), "[1][a][0]"),
        (lambda h, s: (h, s), lambda returned: returned[1]),
    ],
)
def test_the_output_that_is_meant_is_recorded(tmp_path: Path, form: Any, output: Any) -> None:
    model = Net(form)
    probe = sonde.Probe(_X, _CLASSES, batch_size=5)
    run = _record(tmp_path / "run", model, sonde.Predictions(probe, output=output))
    with torch.no_grad():
        expected = model.scores(_X)
    np.testing.assert_allclose(run["predictions"].array("logits", 0), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("form", "targets", "message"),
    [
        (
            lambda h, s: (h, s),
            _CLASSES,
            r"several outputs of the model fit targets of 3 classes: \[0\] \[2, 16\], "
            r"\[1\] \[2, 3\], for 2 examples; say which one .* output='\[1\]'",
        ),
        (lambda h, s: {"a": h, "b": s}, None, "several outputs, and no targets tell which"),
        (lambda h, s: (h[:, :2], s[:, :2]), _CLASSES, "no output of the model fits targets of 3"),
        (lambda h, s: (h, s), torch.ones(12, 5), r"no output .* targets of shape \[examples, 5\]"),
        (lambda h, s: {}, _CLASSES, r"the model's output \(dict\) holds no tensor"),
    ],
)
def test_where_it_is_not_clear_it_is_asked_before_training(
    tmp_path: Path, form: Any, targets: Tensor | None, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        sonde.Recorder(tmp_path / "run", Net(form), [sonde.Predictions(sonde.Probe(_X, targets))])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("logits", r"has no output 'logits'; it returns \[0\] \[2, 16\], \[1\] \[2, 3\]"),
        (lambda returned: 3, "`output` returned a int; expected a tensor"),
        (1.5, r"`output` \(=1\.5\) must be the name, position or path"),
    ],
)
def test_an_output_that_is_not_there_is_refused(tmp_path: Path, output: Any, message: str) -> None:
    def record() -> None:
        measure = sonde.Predictions(sonde.Probe(_X, _CLASSES), output=output)
        sonde.Recorder(tmp_path / "run", Net(lambda h, s: (h, s)), [measure])

    with pytest.raises(InvalidInputError, match=message):
        record()


def test_the_choice_does_not_change_with_the_size_of_a_batch(tmp_path: Path) -> None:
    # For 4 examples the table would fit, too.
    model = Net(lambda h, s: (torch.ones(4, 3), s))
    probe = sonde.Probe(_X[:9], _CLASSES[:9], batch_size=5)
    run = _record(tmp_path / "run", model, sonde.Predictions(probe))
    with torch.no_grad():
        expected = model.scores(_X[:9])
    np.testing.assert_allclose(run["predictions"].array("logits", 0), expected, rtol=1e-6)


@pytest.mark.parametrize("form", [lambda h, s: s, lambda h, s: s[:, 0], lambda h, s: (s, h[:, :1])])
def test_one_logit_divides_a_plane_by_its_sign(form: Any) -> None:
    model = Net(form, 1)
    output = 0 if isinstance(model(_X), tuple) else None
    planes = sonde.DecisionPlanes(
        _X, _BINARY, triplets=3, resolution=8, population="any", output=output
    )
    points: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, args: points.append(args[0].clone()))
    recording = planes.record(Subject(model))
    with torch.no_grad():
        expected = model.scores(torch.cat(points))[:, 0] > 0
    labels = recording.arrays[0].values
    np.testing.assert_array_equal(labels.ravel(), expected)
    assert set(labels.ravel().tolist()) == {0, 1}
    assert recording.attributes["num_classes"] == 2


def test_models_of_one_logit_are_compared_by_its_sign(tmp_path: Path) -> None:
    runs, signs = [], []
    for seed in range(2):
        model = Net(lambda h, s: s, 1)
        torch.manual_seed(seed)
        nn.init.normal_(model.head.weight)
        planes = sonde.DecisionPlanes(_X, _BINARY, triplets=4, resolution=9, population="any")
        runs.append(_record(tmp_path / f"seed{seed}", model, planes))
        points: list[Tensor] = []
        model.register_forward_pre_hook(lambda _, args, seen=points: seen.append(args[0].clone()))
        planes.record(Subject(model))
        with torch.no_grad():
            signs.append((model.scores(torch.cat(points)) > 0).flatten())
    by_hand = (signs[0] == signs[1]).float().mean().item()
    agreement = sonde.analysis.reproducibility(runs).agreement.values
    assert agreement[0, 1] == pytest.approx(by_hand)
    assert 0 < by_hand < 1
    assert sonde.analysis.fragmentation(runs[0]).fragmentation.values[0] > 1


@pytest.mark.parametrize(
    ("form", "targets", "message"),
    [
        (lambda h, s: s[:, :2], _CLASSES, "at least 3 classes, as the targets have; the model"),
        (lambda h, s: s[:, :1], _CLASSES, "at least 3 classes, as the targets have; the model"),
        (lambda h, s: s[:, :, None, None].expand(-1, 3, 4, 4), _CLASSES, "of tokens or pixels"),
        (lambda h, s: s[:, None].expand(-1, 5, 3), _CLASSES, "of tokens or pixels"),
        (lambda h, s: s.argmax(1), _BINARY, "2 classes, as the targets have, or one logit for"),
    ],
)
def test_planes_refuse_what_scores_no_classes(
    tmp_path: Path, form: Any, targets: Tensor, message: str
) -> None:
    planes = sonde.DecisionPlanes(_X, targets, triplets=2, population="any")
    with pytest.raises(InvalidInputError, match=message):
        sonde.Recorder(tmp_path / "run", Net(form), [planes])


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        (lambda h, s: s[:, :, None, None].expand(-1, 3, 4, 4), (12, 3, 4, 4)),
        (lambda h, s: (h, s[:, None].expand(-1, 5, 3)), (12, 5, 3)),
    ],
)
def test_scores_of_pixels_and_tokens_are_recorded(
    tmp_path: Path, form: Any, shape: tuple[int, ...]
) -> None:
    targets = _CLASSES.reshape(-1, *(1 for _ in shape[2:])).expand(
        12, *(size for size in shape[1:] if size != 3)
    )
    run = _record(tmp_path / "run", Net(form), sonde.Predictions(sonde.Probe(_X, targets)))
    assert run["predictions"].array("logits", 0).shape == shape


@pytest.mark.parametrize(
    ("form", "output"),
    [
        (lambda h, s: s, None),
        (lambda h, s: {"hidden": h, "logits": s}, None),
        (lambda h, s: (s.sum(), s), None),
        (lambda h, s: (h, s), 1),
    ],
)
def test_the_default_loss_takes_the_same_output(tmp_path: Path, form: Any, output: Any) -> None:
    model = Net(form)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = sonde.Probe(_X, _CLASSES)
    recorder = sonde.attach(
        model, optimizer, tmp_path / "run", probe=probe, output=output, on_error="raise"
    )
    recorder.measure()
    recorder.close()
    log = sonde.open_run(tmp_path / "run")["example_gradients"]
    expected = _by_hand(model, _CLASSES, F.cross_entropy)
    np.testing.assert_allclose(log.array("norm_total", 0), expected, rtol=1e-4)


@pytest.mark.parametrize("form", [lambda h, s: s, lambda h, s: s[:, 0], lambda h, s: {"logits": s}])
def test_the_default_loss_of_one_logit_is_that_of_its_sign(tmp_path: Path, form: Any) -> None:
    model = Net(form, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = sonde.Probe(_X, _BINARY)
    recorder = sonde.attach(model, optimizer, tmp_path / "run", probe=probe, on_error="raise")
    recorder.measure()
    recorder.close()
    log = sonde.open_run(tmp_path / "run")["example_gradients"]

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return -F.logsigmoid(torch.where(targets == 1, logits[:, 0], -logits[:, 0])).mean()

    expected = _by_hand(model, _BINARY, loss)
    np.testing.assert_allclose(log.array("norm_total", 0), expected, rtol=1e-4)


def test_a_loss_of_ones_own_that_takes_no_such_output_says_what_it_was_given(
    tmp_path: Path,
) -> None:
    model = Net(lambda h, s: {"hidden": h, "logits": s})
    measure = sonde.ExampleGradients(sonde.Probe(_X, _CLASSES), F.cross_entropy)
    recorder = sonde.Recorder(tmp_path / "run", model, [measure])
    message = r"`loss` \(cross_entropy\) failed on what the model returns, a dict of \[hidden\]"
    with pytest.warns(SondeWarning, match=message):
        recorder.measure()
    recorder.close()


def test_a_file_says_it_for_all_measures(tmp_path: Path) -> None:
    torch.save((_X, _CLASSES), tmp_path / "data.pt")
    (tmp_path / "data.py").write_text(
        "import pathlib, torch, sonde\n"
        "here = pathlib.Path(__file__).parent\n"
        "def probe(): return sonde.Probe(*torch.load(here / 'data.pt'))\n"
        "def second(returned): return returned[1]\n"
    )
    for text in ("'[1]'", "1", "{entry: 'data.py:second'}"):
        file = tmp_path / "sonde.yaml"
        file.write_text(
            f"path: {tmp_path}/run\noverwrite: true\nprobe: {{entry: 'data.py:probe'}}\n"
            f"output: {text}\nmeasures: [predictions, {{decision_planes: {{triplets: 2}}}}]\n"
        )
        model = Net(lambda h, s: (h, s))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            recorder = load_config(file).recorder(model)
            recorder.measure()
            recorder.close()
        run = sonde.open_run(tmp_path / "run")
        with torch.no_grad():
            expected = model.scores(_X)
        np.testing.assert_allclose(run["predictions"].array("logits", 0), expected, rtol=1e-6)
        assert run["decision_planes"].attributes(0)["num_classes"] == 3
    (tmp_path / "sonde.yaml").write_text(f"path: {tmp_path}/other\noutput: [1]\n")
    with pytest.raises(InvalidInputError, match=r"output: got \[1\]; expected the name, position"):
        load_config(tmp_path / "sonde.yaml")
