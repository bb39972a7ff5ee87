"""Probe precision: which types of numbers a probe was computed in, as its layers show it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sonde.hooks.measures.base import Measure
from sonde.hooks.model.precision import is_kept_off, keep_autocast
from sonde.hooks.model.taps import add_hook
from sonde.hooks.record import Recording, Subject

from .record_log import RecordLog


class ProbePrecision:
    """Records measures on probes, and notes the precision that they were computed in.

    A probe is evaluated without autocast. A model that fails without the autocast that it enters by
    itself is evaluated with it, and a warning says so.

    Args:
        subject: What is measured.
        log: Where warnings go.
    """

    def __init__(self, subject: Subject, log: RecordLog) -> None:
        self._subject = subject
        self._log = log
        self._types: dict[Measure, list[str]] = {}

    def record(self, measure: Measure) -> Recording:
        """Record a measure; its first record is observed, and later ones are said to be alike."""
        model = self._subject.model
        try:
            recording = self._observed(measure)
        except Exception as error:
            if not is_kept_off(model):
                raise
            keep_autocast(model, True)
            try:
                recording = self._observed(measure)
            except Exception:
                keep_autocast(model, False)
                raise
            self._types = {measure: self._types[measure]}  # The others have to be observed anew.
            self._log.warn(
                f"{type(model).__name__} enters autocast by itself and fails without it "
                f"({type(error).__name__}: {error}), so its probes are evaluated with it"
            )
        if self._types[measure]:
            recording.attributes["precision"] = self._types[measure]
        return recording

    def _observed(self, measure: Measure) -> Recording:
        if measure in self._types:
            return measure.record(self._subject)
        model = self._subject.model
        with _observed_types(model) as types:
            recording = measure.record(self._subject)
        self._types[measure] = [str(kind).removeprefix("torch.") for kind, _ in types.most_common()]
        tensors = [*model.parameters(), *model.buffers()]
        own = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        reduced = [kind for kind in types if own and kind.itemsize < min(t.itemsize for t in own)]
        if reduced:
            self._log.warn(
                f"{type(model).__name__} casts by itself: {sum(types[kind] for kind in reduced)} "
                f"of {types.total()} outputs of layers are {', '.join(map(str, reduced))} on a "
                "probe, where the model holds no tensor of that type"
            )
        return recording


@contextmanager
def _observed_types(model: nn.Module) -> Iterator[Counter[torch.dtype]]:
    """Count the floating types of what layers without children put out."""
    types: Counter[torch.dtype] = Counter()

    def hook(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
        types.update(_floating_types(output))

    layers = [module for module in model.modules() if next(module.children(), None) is None]
    removals = [
        add_hook(layer, hook) for layer in layers if not isinstance(layer, torch.jit.ScriptModule)
    ]
    try:
        yield types
    finally:
        for remove in removals:
            remove()


def _floating_types(output: Any) -> Iterator[torch.dtype]:
    # Only what is there, as operations here would be seen as those of the model.
    if isinstance(output, Tensor):
        if output.dtype.is_floating_point:
            yield output.dtype
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from _floating_types(item)
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _floating_types(item)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from _floating_types(getattr(output, field.name))
