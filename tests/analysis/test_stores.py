"""Analyses give the same whichever store holds what they need."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sonde
from sonde.analysis import stiffness
from sonde.exceptions import LayerNotFoundError

Array = npt.NDArray[np.float64]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def _examples() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 5, generator=torch.manual_seed(1)).double(), torch.arange(12) % 3


def _loop(model: nn.Module, names: list[str]) -> Array:
    """Gradients of one example after the other, [examples, parameters]."""
    parameters = [dict(model.named_parameters())[name] for name in names]
    rows = []
    for x, y in zip(*_examples(), strict=True):
        grads = torch.autograd.grad(cross_entropy(model(x[None]), y[None]), parameters)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows).numpy()


def _mean_cosine(rows: Array) -> float:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    num = len(rows)
    return float(((unit @ unit.T).sum() - num) / (num * (num - 1)))


def _run(path: Path, store: Any) -> sonde.Run:  # Any: one of the three stores.
    model = _model()
    measure = sonde.ExampleGradients(sonde.Probe(*_examples()), loss=cross_entropy, store=store)
    with sonde.Recorder(path / "run", model, [measure]) as recorder:
        recorder.measure()
    return sonde.open_run(path / "run")


@pytest.mark.parametrize("store", [sonde.Gram(), sonde.Full()], ids=["gram", "full"])
@pytest.mark.parametrize(
    ("layer", "parameters"),
    [
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("0", ["0.weight", "0.bias"]),
        ("2", ["2.weight", "2.bias"]),
    ],
)
def test_stiffness_equals_a_loop(
    tmp_path: Path, store: Any, layer: str | None, parameters: list[str]
) -> None:
    result = stiffness(_run(tmp_path, store), layer=layer)
    assert result["cosine"].item() == pytest.approx(_mean_cosine(_loop(_model(), parameters)))


def test_stiffness_names_the_layers_whichever_store_was_kept(tmp_path: Path) -> None:
    results = [
        stiffness(_run(tmp_path / s.describe()["kind"], s)) for s in (sonde.Gram(), sonde.Full())
    ]
    assert [result.attrs["layers"] for result in results] == ["0, 2", "0, 2"]


def test_stiffness_of_one_parameter_is_there_where_its_gradients_were_kept(tmp_path: Path) -> None:
    result = stiffness(_run(tmp_path, sonde.Full()), layer="2.weight")
    expected = _mean_cosine(_loop(_model(), ["2.weight"]))
    assert (result["cosine"].item(), result.attrs["parameters"]) == (
        pytest.approx(expected),
        "2.weight",
    )


def test_full_gradients_have_products_between_steps(tmp_path: Path) -> None:
    rows = _loop(_model(), ["0.weight", "0.bias", "2.weight", "2.bias"])
    log = _run(tmp_path, sonde.Full()).example_gradients
    np.testing.assert_allclose(log.cross_gram(0, 0), rows @ rows.T, atol=1e-12)


def test_a_layer_without_gradients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayerNotFoundError, match=r"layer '1' of 'example_gradients' was not rec"):
        stiffness(_run(tmp_path, sonde.Full()), layer="1")
