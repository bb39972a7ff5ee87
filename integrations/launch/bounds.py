"""The bounds of what `sonde run` records by its own choice; what is left out is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from sonde.hooks import Activations, Config, Predictions
from sonde.hooks.measures.base import Measure
from sonde.hooks.model.layers import select_layers
from sonde.hooks.record import Subject
from sonde.hooks.recording.estimate import estimate
from sonde.hooks.schedule import log_spaced
from sonde.hooks.stores.stores import Store
from sonde.hooks.training.source import Training
from sonde.sizes import size_text

# Such as every logit of every position of a language model.
_MAX_PREDICTION_BYTES = 16 << 20
# Such as a cell that is unrolled over time: every call would be a layer of its own.
_MAX_CALLS = 16


def bounded(
    config: Config,
    model: nn.Module,
    num_calls: Mapping[str, int],
    *,
    batch_dim: int = 0,
    store: Store | None = None,
) -> tuple[Config, list[str]]:
    """Return a configuration of bounded size, and what it leaves out, to be named.

    Args:
        config: A configuration that leaves the choice of measures to sonde.
        model: The model.
        num_calls: How often each layer is called in a forward pass.
        batch_dim: The axis of the training's inputs that holds the examples.
        store: The form kept of activations; None is the default one.
    """
    left_out: list[str] = []
    measures: list[Measure] = []
    for measure in config.chosen():
        if isinstance(measure, Activations):
            layers = config.layers
            if layers is None:
                layers, too_often = _seldom_called(model, num_calls)
                left_out += too_often
            measure = Activations(
                measure.probe or Training(batch_dim), layers, store=store or measure.store
            )
        elif isinstance(measure, Predictions):
            size = _record_bytes(measure, model)
            if size > _MAX_PREDICTION_BYTES:
                left_out.append(f"predictions ({size_text(size)} a step)")
                continue
        measures.append(measure)
    bounds = replace(
        config, measures=measures, probe=None, loss=None, output=None, layers=None, planes=0
    )
    return bounds, left_out


def _seldom_called(
    model: nn.Module, num_calls: Mapping[str, int]
) -> tuple[list[str] | None, list[str]]:
    """Return selectors of the layers that are called a few times, and which are left out."""
    layers = select_layers(model)
    often = [name for name in layers if num_calls.get(name, 0) > _MAX_CALLS]
    if not often:
        return None, []
    named = ", ".join(often[:4]) + (", …" if len(often) > 4 else "")
    most = max(num_calls[name] for name in often)
    left_out = [f"{named} (called up to {most} times in a pass)"]
    if len(often) == len(layers):
        return [""], left_out  # The output of the whole model.
    return [f"-{name}" for name in often], left_out


def _record_bytes(measure: Measure, model: nn.Module) -> int:
    return estimate(Subject(model), [measure], log_spaced()).step_bytes
