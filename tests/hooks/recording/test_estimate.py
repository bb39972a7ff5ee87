"""The estimate of a recording against what it then writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.exceptions import InvalidInputError
from sonde.hooks import Store

STORES: dict[str, Store] = {
    "gram": sonde.Gram(),
    "gram in float64": sonde.Gram(torch.float64),
    "blocks": sonde.Gram(block=10),
    "sketch": sonde.Sketch(7),
    "full": sonde.Full(),
    "pooled": sonde.Full(torch.bfloat16, pool="mean"),
    "units": sonde.Full(units=9),
}


@pytest.mark.parametrize("store", STORES.values(), ids=list(STORES))
def test_an_estimate_is_what_is_written(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor, store: Store
) -> None:
    probe = sonde.Probe(images, classes, batch_size=9)
    measures = [
        sonde.Activations(probe, store=store),
        sonde.ExampleGradients(probe, F.cross_entropy),
        sonde.Predictions(probe),
        sonde.DecisionPlanes(images, classes, triplets=3, resolution=4),
    ]
    with sonde.Recorder(tmp_path / "run", conv_net, measures, on_error="raise") as recorder:
        estimated = recorder.estimate()
        recorder.measure()
    run = sonde.open_run(tmp_path / "run")
    for item in estimated:
        assert item.record_bytes == run[item.measure, item.source].num_bytes, item


def test_records_are_counted_by_their_schedules(
    tmp_path: Path, conv_net: nn.Module, images: Tensor
) -> None:
    measures = [
        sonde.Predictions(images, when=sonde.every(10)),
        sonde.Scalars(when=sonde.epochs(2)),
        sonde.Activations(sonde.TRAINING),
    ]
    options: dict[str, Any] = {"steps_per_epoch": 25, "when": sonde.at(3, 1000)}
    with sonde.Recorder(tmp_path / "run", conv_net, measures, **options) as recorder:
        estimated = recorder.estimate(num_steps=100)
    assert [item.num_records for item in estimated] == [11, 3, 1]
    assert estimated.num_bytes == 11 * 24 * 5 * 4 + 3 * 8
    assert repr(estimated).splitlines() == [
        "measure      source    one record  records  in all",
        "predictions  probe     480 B       11       5.2 KiB",
        "scalars      training  8 B         3        24 B",
        "activations  training  unknown     1        unknown",
    ]


def test_a_recording_that_is_too_large_is_refused_before_it_begins(
    tmp_path: Path, conv_net: nn.Module
) -> None:
    measure = sonde.Activations(torch.zeros(600, 1, 8, 8))
    with pytest.raises(InvalidInputError, match=r"would write 9\.6 MiB, more than.*\(1\.0 MiB\)"):
        sonde.Recorder(tmp_path / "run", conv_net, [measure], max_step_bytes=1 << 20)
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_run_yet_has_no_estimate(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    measures = [sonde.Predictions(torch.zeros(4, 2))]
    with sonde.Recorder(tmp_path / "run", model, measures) as recorder:
        assert recorder.estimate()[0].record_bytes is None
        assert isinstance(model[0], nn.LazyLinear)
