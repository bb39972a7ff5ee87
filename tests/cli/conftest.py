"""Two runs to ask about, and calls of the command line."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from sonde.cli import app
from sonde.log import LogArray, LogWriter
from sonde.log.format.files import write_run_file

LAYERS = ["conv1", "layer1.0.conv2", "layer1.0.relu", "fc"]
STEPS = [0, 10, 20, 30]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    for seed in (0, 1):
        write_run(folder / "runs" / f"seed{seed}", seed)
    return folder


@pytest.fixture
def folder(written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `runs/seed0` and `runs/seed1` are, as the current directory."""
    monkeypatch.chdir(written)
    monkeypatch.delenv("COLUMNS", raising=False)
    return written


def write_run(
    path: Path,
    seed: int,
    layers: list[str] = LAYERS,
    config: dict[str, object] | None = None,
) -> None:
    """Write a run of 20 examples of 4 classes whose layers get more alike over the steps."""
    path.mkdir(parents=True)
    write_run_file(
        path,
        {
            "name": path.name,
            "created": "2026-01-02T03:04:05+00:00",
            "config": {"seed": seed, "width": 64, "noise": 0} if config is None else config,
            "environment": {
                "python": "3.12.1",
                "hostname": "node7",
                "packages": {"torch": "2.9.0", "numpy": "2.3.0"},
                "devices": ["NVIDIA H100"],
            },
            "model": {
                "class": "ResNet",
                "num_parameters": 1234567,
                "layers": {"conv1": "Conv2d", "fc": "Linear"},
            },
            "measures": [{"measure": "activations", "source": "probe", "store": "Gram()"}],
            "probes": {"probe": {"num_examples": 20, "id_digest": "0123456789abcdef" * 4}},
        },
    )
    rng = np.random.default_rng(seed)
    writer = LogWriter(path, seal=False)
    targets = np.arange(20) % 4
    writer.add_table(
        "probe",
        [
            LogArray("id", np.arange(20) + 100, ("example",)),
            LogArray("target", targets, ("example",)),
        ],
    )
    writer.add_table(
        "planes",
        [
            LogArray("triplet", np.arange(15).reshape(5, 3), ("triplet", "corner")),
            LogArray("triplet_target", np.arange(15).reshape(5, 3) % 4, ("triplet", "corner")),
            LogArray("coordinates", np.ones((5, 3, 2)), ("triplet", "corner", "axis")),
            LogArray("extent", np.tile([-3.0, 3.0], (5, 2, 1)), ("triplet", "axis", "bound")),
        ],
    )
    common = np.random.default_rng(0).normal(size=(20, 6))
    for step in STEPS:
        features = {name: common * step / 10 + rng.normal(size=(20, 6)) for name in layers}
        gradients = {name: rng.normal(size=(20, 6)) + targets[:, None] for name in layers}
        kernels = {
            measure: [
                LogArray("gram", values @ values.T, ("example", "other_example"), layer=layer)
                for layer, values in arrays.items()
            ]
            for measure, arrays in (("activations", features), ("example_gradients", gradients))
        }
        total = sum(values @ values.T for values in gradients.values())
        kernels["example_gradients"].append(
            LogArray("gram_total", np.asarray(total), ("example", "other_example"))
        )
        for measure, arrays in kernels.items():
            writer.append(measure, "probe", step, arrays)
        labels = rng.integers(0, 4, (5, 8, 8)).astype(np.uint8)
        labels[:, : 2 + step // 10] = 1
        dims = ("triplet", "row", "column")
        planes = [LogArray("labels", labels, dims)]
        writer.append("decision_planes", "planes", step, planes, {"digest": "same"})
        logits = [LogArray("logits", rng.normal(size=(20, 4)), ("example", "class"))]
        writer.append("predictions", "probe", step, logits)
        loss = [LogArray("loss", np.array(1 / (1 + step)), ())]
        writer.append("scalars", "training", step, loss)
    writer.note("layers", 0, measure="activations", feature_shapes={"conv1": [64, 32, 32]})
    writer.note("missing", 0, measure="activations", name="aux.fc", reason="it was never called")
    writer.note("disabled", 20, measure="margins", reason="CUDA out of memory")
    writer.note(
        "coverage",
        0,
        measure="example_gradients",
        source="probe",
        parameters={"conv1.weight": "exact", "rnn.w": "unsupported: LSTM on cuDNN"},
    )
    writer.close()


def call(line: str) -> Result:
    return CliRunner().invoke(app, shlex.split(line))


def output_of(line: str) -> str:
    result = call(line)
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(line: str) -> str:
    result = call(line)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("sonde: ")
    return result.stderr
