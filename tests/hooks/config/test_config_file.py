"""A configuration file says what the Python objects say, field by field."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn.functional import cross_entropy

import sonde
from sonde.exceptions import InvalidInputError
from sonde.hooks.config.file import MEASURES, read_config
from sonde.hooks.config.values import SCHEDULES, STORES

PROBES = """
import random
import torch
import sonde

def probe(size=6):
    inputs = torch.linspace(0, 1, size * 4).sqrt().reshape(size, 4).cos()
    inputs = inputs * torch.arange(1, 5) ** torch.arange(size)[:, None]
    return sonde.Probe(inputs, torch.arange(size) % 3)

def drawn():
    return sonde.Probe(torch.randn(4, 4) + random.random(), name="own")

def wrong():
    return 3
"""


def load(tmp_path: Path, text: str) -> sonde.Config:
    (tmp_path / "probes.py").write_text(PROBES)
    (tmp_path / "sonde.yaml").write_text(f"path: {tmp_path}/run\n{text}")
    return sonde.load_config(tmp_path / "sonde.yaml")


def plain(value: Any) -> Any:
    """Return all that a value consists of, comparable by ==."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return [str(value.dtype), list(value.shape), value.tolist()]
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, nn.Module):
        return repr(value)
    if type(value).__module__.startswith("sonde."):
        own = {key: plain(item) for key, item in vars(value).items() if key != "_verdicts"}
        return [type(value).__name__, own]
    return value


def make_probe(name: str | None = "test", size: int = 6) -> sonde.Probe:
    names: dict[str, Any] = {}
    exec(PROBES, names)
    probe: sonde.Probe = names["probe"](size)
    probe.name = name
    return probe


CASES: dict[str, tuple[str, Any]] = {
    "activations": (
        "{source: training, layers: ['layer*.*', torch.nn.Linear, -fc], store: {sketch: 256},"
        " memory: 1000, when: {every: 100}}",
        lambda probe: sonde.Activations(
            sonde.TRAINING,
            ["layer*.*", nn.Linear, "-fc"],
            sonde.Sketch(256),
            memory=1000,
            when=sonde.every(100),
        ),
    ),
    "output_gradients": (
        "{source: {training: {batch_dim: 1}}, layers: fc}",
        lambda probe: sonde.OutputGradients(sonde.Training(batch_dim=1), "fc"),
    ),
    "example_gradients": (
        "{loss: torch.nn.functional.cross_entropy, per_layer: false}",
        lambda probe: sonde.ExampleGradients(probe, cross_entropy, per_layer=False),
    ),
    "predictions": ("test", lambda probe: sonde.Predictions(probe)),
    "decision_planes": (
        "{probe: test, triplets: [[0, 1, 2], [3, 1, 2]], resolution: 3, population: any,"
        " margin: 1, seed: 7, batch_size: 5, name: p, when: epochs}",
        lambda probe: sonde.DecisionPlanes(
            probe.inputs,
            probe.targets,
            ids=probe.ids,
            triplets=[[0, 1, 2], [3, 1, 2]],
            resolution=3,
            population="any",
            margin=1,
            seed=7,
            batch_size=5,
            name="p",
            when=sonde.epochs(),
        ),
    ),
    "scalars": (
        "{when: [{at: [0, 3]}, {every: 5}]}",
        lambda probe: sonde.Scalars(when=sonde.at(0, 3) | sonde.every(5)),
    ),
}


def test_every_measure_is_written_in_a_case() -> None:
    assert set(CASES) == set(MEASURES)
    every = vars(sonde.hooks.measures).items()
    public = {name for name, kind in every if isinstance(kind, type) and name in sonde.__all__}
    assert {kind.__name__ for kind in MEASURES.values()} == public


@pytest.mark.parametrize("name", CASES)
def test_a_measure_in_yaml_is_the_measure_in_python(tmp_path: Path, name: str) -> None:
    text, in_python = CASES[name]
    config = load(
        tmp_path,
        f"probes: {{test: {{entry: 'probes.py:probe'}}}}\nprobe: test\nmeasures: [{name}: {text}]",
    )
    assert config.measures is not None
    assert plain(config.measures[0]) == plain(in_python(make_probe()))
    assert config.probe is None


@pytest.mark.parametrize(
    ("text", "in_python"),
    [
        ("{every: 100}", sonde.every(100)),
        ("{at: 5}", sonde.at(5)),
        ("{at: [0, 10, 100]}", sonde.at(0, 10, 100)),
        ("log_spaced", sonde.log_spaced()),
        ("{log_spaced: 1000}", sonde.log_spaced(1000)),
        ("{log_spaced: {stop: 50, per_decade: 3}}", sonde.log_spaced(50, per_decade=3)),
        ("epochs", sonde.epochs()),
        ("{epochs: {num_epochs: 2}}", sonde.epochs(2)),
        ("[{every: 7}, {at: 1}, epochs]", sonde.every(7) | sonde.at(1) | sonde.epochs()),
    ],
)
def test_a_schedule_in_yaml_is_the_schedule_in_python(
    tmp_path: Path, text: str, in_python: object
) -> None:
    assert load(tmp_path, f"when: {text}").when == in_python


@pytest.mark.parametrize(
    ("text", "in_python"),
    [
        ("gram", sonde.Gram()),
        ("{gram: {dtype: float64, block: 8}}", sonde.Gram(torch.float64, 8)),
        ("{sketch: {dim: 9, seed: 3}}", sonde.Sketch(9, 3)),
        ("full", sonde.Full()),
        ("{full: torch.float16}", sonde.Full(torch.float16)),
        ("{full: {pool: max, units: 5, seed: 1}}", sonde.Full(pool="max", units=5, seed=1)),
    ],
)
def test_a_store_in_yaml_is_the_store_in_python(
    tmp_path: Path, text: str, in_python: object
) -> None:
    config = load(tmp_path, f"measures: [activations: {{source: training, store: {text}}}]")
    assert config.measures is not None
    assert vars(config.measures[0])["store"] == in_python


def test_every_schedule_and_store_is_known_by_its_name() -> None:
    assert set(SCHEDULES) <= set(sonde.__all__)
    assert {kind.__name__ for kind in STORES.values()} == {
        kind.__name__ for kind in sonde.hooks.Store.__subclasses__()
    }


def test_a_whole_file_is_the_config_in_python(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
probes:
  test: {entry: "probes.py:probe", arguments: {size: 9}}
probe: test
loss: {torch.nn.CrossEntropyLoss: {label_smoothing: 0.1}}
layers: [torch.nn.ReLU, "*.conv?"]
when: {every: 10}
planes: 5
resolution: 4
id_key: index
reduction: sum
steps_per_epoch: 30
config: {lr: 0.1}
options: {on_error: raise}
""",
    )
    in_python = sonde.Config(
        f"{tmp_path}/run",
        probe=make_probe(size=9),
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        layers=[nn.ReLU, "*.conv?"],
        when=sonde.every(10),
        planes=5,
        resolution=4,
        id_key="index",
        reduction="sum",
        options={"on_error": "raise", "steps_per_epoch": 30, "config": {"lr": 0.1}},
    )
    assert plain(config) == plain(in_python)


def test_measures_of_one_source_share_its_probe(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "probe: {entry: 'probes.py:probe'}\nloss: torch.nn.functional.nll_loss\n"
        "measures: [activations, predictions, example_gradients, output_gradients]",
    )
    assert config.measures is not None
    activations, predictions, gradients, of_outputs = config.measures
    assert activations.probe is predictions.probe is gradients.probe
    assert vars(gradients)["loss"] is nn.functional.nll_loss
    assert of_outputs.training is sonde.TRAINING


def test_a_file_records_a_training(tmp_path: Path) -> None:
    config = load(tmp_path, "measures: [activations: {source: training}]\nwhen: {every: 2}")
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = config.recorder(model, optimizer)
    for _ in range(4):
        model(torch.ones(5, 4)).sum().backward()
        optimizer.step()
    recorder.close()
    assert sonde.open_run(tmp_path / "run").steps("activations") == [0, 2]


def test_a_probe_that_draws_does_not_change_what_the_training_draws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    random.seed(0)
    expected = torch.randn(3).tolist(), random.random()
    torch.manual_seed(0)
    random.seed(0)
    config = load(tmp_path, "probe: {entry: 'probes.py:drawn'}")
    assert (torch.randn(3).tolist(), random.random()) == expected
    assert config.probe is not None
    assert config.probe.name == "own"


def test_the_first_batches_stand_in_where_a_measure_names_no_examples(tmp_path: Path) -> None:
    path = tmp_path / "sonde.yaml"
    path.write_text("path: runs/a\nmeasures: [predictions, activations: {source: training}]")
    file = read_config(path)
    first = make_probe()
    measures = file.config(first).measures
    assert measures is not None
    assert measures[0].probe is first
    assert file.sources.is_first_used
    path.write_text("path: runs/a\nprobe: {from: first batches, examples: 32}")
    file = read_config(path)
    assert file.config(first, path="other").path == "other"
    assert file.sources.num_first_examples == 32
    path.write_text("path: runs/a\nprobe: training")
    file = read_config(path)
    assert file.config(first).probe is None
    assert not file.sources.is_first_used


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wen: {every: 3}", r"got 'wen', which is no entry of a configuration; near: when"),
        ("when: {evry: 3}", r"when: got 'evry', which is no schedule; near: every"),
        ("when: {every: ten}", r"when.every.num_steps: got 'ten'; expected a whole number"),
        ("when: {every: 0}", r"when.every: `every` \(=0\) must be a whole number >= 1"),
        ("when: {at: [0, x]}", r"when.at\[1\]: got 'x'; expected a whole number"),
        ("when: [{every: 3}, 5]", r"when\[1\]: got 5; expected a schedule: a name, or"),
        ("when: log_spaced\nwhen: epochs", r"this is no YAML in line 3: 'when' stands twice"),
        ("measures: activations", r"measures: got 'activations'; expected a list of measures"),
        ("measures: [activation]", r"measures\[0\]: got 'activation', which is no .*: activations"),
        ("measures: [activations]", r"measures\[0\].activations: its examples are missing; give"),
        (
            "measures: [activations: {source: train}]",
            r"measures\[0\].activations.source: got 'train', which is no source; near: training",
        ),
        (
            "measures: [activations: {source: training, stor: gram}]",
            r"measures\[0\].activations: got 'stor', which is no argument; near: store",
        ),
        (
            "measures: [activations: {source: training, store: {sketsh: 3}}]",
            r"measures\[0\].activations.store: got 'sketsh', which is no store; near: sketch",
        ),
        (
            "measures: [activations: {source: training, store: sketch}]",
            r"activations.store.sketch: `dim` is missing",
        ),
        (
            "measures: [activations: {source: training, store: {full: {pool: sum}}}]",
            r"store.full.pool: got 'sum'; expected 'mean' or 'max' or null",
        ),
        (
            "measures: [activations: {source: training, store: {full: {dtype: float17}}}]",
            r"store.full.dtype: got 'float17'; expected a dtype, such as float16",
        ),
        (
            "measures: [activations: {source: training, layers: torch.nn.Liner}]",
            r"activations.layers: got 'Liner', which is no name in torch.nn; near: Linear",
        ),
        (
            "measures: [activations: {source: training, layers: [torch.Tensor]}]",
            r"activations.layers\[0\]: got 'torch.Tensor'; expected a module type",
        ),
        ("measures: [scalars: 3]", r"measures\[0\].scalars.when: got 3; expected a schedule"),
        (
            "measures: [activations: training, activations: training]",
            None,
        ),
        ("planes: many", r"planes: got 'many'; expected a whole number"),
        (
            "loss: torch.nn.functional.cross_entrop",
            r"loss: .* no loss of torch.nn.functional .*near: .*functional.cross_entropy",
        ),
        ("loss: 3", r"loss: got 3; expected the dotted name of a loss"),
        (
            "loss: nowhere.loss",
            r"loss: got 'nowhere.loss', which is no loss .*`{entry: file",
        ),
        ("probe: {entry: 'probes.py:prob'}", r"probe.entry: got 'prob', .* near: probe"),
        ("probe: {entry: 'none.py:probe'}", r"probe.entry: there is no file .*none.py"),
        ("probe: {entry: 'probes.py'}", r"probe.entry: got 'probes.py'; expected `package.module"),
        ("probe: {entry: 'probes.py:wrong'}", r"entry: probes.py:wrong returned int; expected a s"),
        (
            "probe: {entry: 'probes.py:probe', sice: 3}",
            r"probe: got 'sice', which is no argument of a source",
        ),
        (
            "probe: {entry: 'probes.py:probe', arguments: {sice: 3}}",
            r"probe.arguments: got 'sice', which is no argument; near: size",
        ),
        ("probe: {from: first batches}", r"probe: only `sonde run` collects examples of the first"),
        ("probe: {from: first batch}", r"probe.from: got 'first batch'; expected `first batches`"),
        ("probe: 5", r"probe: got 5; expected `training`, an entry of `probes`, `entry"),
        ("probes: 5", r"probes: got 5; expected a mapping of names to sources"),
        ("loss: torch.nn.functional.mse_loss", r"`loss` needs a probe; give probe="),
        ("[1", r"this is no YAML in line 2: expected"),
    ],
)
def test_what_has_no_meaning_is_told_with_its_place(
    tmp_path: Path, text: str, message: str | None
) -> None:
    if message is None:
        assert load(tmp_path, text).measures is not None
        return
    with pytest.raises(InvalidInputError, match=rf"sonde\.yaml: .*{message}") as caught:
        load(tmp_path, text)
    assert str(caught.value).count("sonde.yaml") == 1


def test_a_file_needs_a_mapping_and_a_path(tmp_path: Path) -> None:
    path = tmp_path / "sonde.yaml"
    for text, message in {
        "3": "got 3; expected a mapping",
        "when: epochs": "`path` is missing",
    }.items():
        path.write_text(text)
        with pytest.raises(InvalidInputError, match=message):
            sonde.load_config(path)
    with pytest.raises(FileNotFoundError):
        sonde.load_config(tmp_path / "none.yaml")


def test_the_loader_leaves_yaml_as_it_is() -> None:
    assert yaml.safe_load("{a: 1, a: 2}") == {"a": 2}


def test_loading_runs_nothing_that_is_not_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('it ran')\nclass Block: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for loss in (
        "planted.loss",
        "planted.py:loss",
        "os.getcwd",
        "{subprocess.Popen: {args: ['true']}}",
        "torch.nn.functional.warnings.warn",
        "torch.nn.Module",
        "{torch.nn.Linear: {in_features: 1, out_features: 1}}",
        "torch.nn.functional.relu",
        "torch.hub.load",
    ):
        with pytest.raises(InvalidInputError, match=r"loss: got .* no loss of torch.nn"):
            load(tmp_path, f"probe: training\nloss: {loss}\nmeasures: [example_gradients]\n")
    with pytest.raises(InvalidInputError, match=r"planted.Block.* not imported yet.*{entry"):
        load(tmp_path, "measures: [{activations: {source: training, layers: [planted.Block]}}]")
    with pytest.raises(InvalidInputError, match=r"written as {entry: planted.py:f}"):
        load(tmp_path, "probe: training\noutput: 'planted.py:f'\nmeasures: [predictions]\n")


def test_an_entry_is_said_before_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "said.py").write_text(
        "import sys\nprint('it runs', file=sys.stderr)\ndef loss(outputs, targets): return 0\n"
    )
    config = load(
        tmp_path,
        "probes: {p: {entry: 'probes.py:probe'}}\n"
        "measures: [{example_gradients: {source: p, loss: {entry: 'said.py:loss'}}}]",
    )
    assert config.measures is not None
    assert vars(config.measures[0])["loss"].__name__ == "loss"
    *_, said, ran = capsys.readouterr().err.splitlines()
    assert said.endswith("measures[0].example_gradients.loss.entry: runs said.py:loss")
    assert (said.split(":")[0], ran) == ("sonde", "it runs")


def test_arguments_that_a_loss_of_torch_refuses_are_told_with_their_place(tmp_path: Path) -> None:
    text = "probe: training\nloss: {torch.nn.CrossEntropyLoss: {weight: [1, 2]}}\n"
    with pytest.raises(InvalidInputError, match=r"loss: torch.nn.CrossEntropyLoss cannot be made"):
        load(tmp_path, text + "measures: [example_gradients]\n")


def test_yaml_that_grows_without_end_and_depth_without_end_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    with pytest.raises(InvalidInputError, match="no entry of a configuration"):
        load(tmp_path, "\n".join(lines))
    bomb = "probes:\n" + "\n".join(f"  {line}" for line in lines) + "\nprobe: a39\n"
    with pytest.raises(InvalidInputError, match=r"probes.a39: got \[\[.*; expected"):
        load(tmp_path, bomb)
    with pytest.raises(InvalidInputError, match="nested too deeply"):
        load(tmp_path, "path: " + "[" * 3000 + "]" * 3000)
