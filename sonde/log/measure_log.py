"""The records of one measure, and of one layer of it, as readers see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import InvalidInputError, LayerNotFoundError, StepNotFoundError

from .parts import Record, StreamKey, StreamShape

if TYPE_CHECKING:
    from .run import Run


class MeasureLog:
    """The records of one measure and source of a run.

    Args:
        run: The run.
        measure: The measure.
        source: Where its examples come from.
    """

    def __init__(self, run: Run, measure: str, source: str) -> None:
        self.run = run
        self.measure = measure
        self.source = source

    @property
    def _records(self) -> dict[int, Record]:
        return self.run._records[self.measure, self.source]

    @property
    def steps(self) -> list[int]:
        """The recorded steps, sorted."""
        return list(self._records)

    @property
    def streams(self) -> list[tuple[str | None, str]]:
        """Every (layer, field) that some record has, in the order they were recorded."""
        parts = dict.fromkeys(record.part for record in self._records.values())
        return list(dict.fromkeys(key for part in parts for key in part.stream_keys()))

    @property
    def layers(self) -> list[str]:
        """The layers that have records, in the order the model ran them."""
        return list(dict.fromkeys(layer for layer, _ in self.streams if layer is not None))

    @property
    def ids(self) -> npt.NDArray[np.int64] | None:
        """The ids of the examples, int64 [examples], or None if the source has none."""
        return self.table("id") if "id" in self._table_fields() else None

    @property
    def targets(self) -> npt.NDArray[Any] | None:
        """The targets of the examples, [examples], or None if the source has none."""
        return self.table("target") if "target" in self._table_fields() else None

    @property
    def num_bytes(self) -> int:
        """The bytes of all arrays of all records."""
        return sum(
            stream.num_bytes
            for record in self._records.values()
            for stream in record.part.streams(record.row).values()
        )

    def fields(self, layer: str | None = None) -> list[str]:
        """Return the fields a layer has, or those that belong to no layer."""
        return [field for name, field in self.streams if name == layer]

    def steps_of(self, field: str, layer: str | None = None) -> list[int]:
        """Return the steps whose record has this array."""
        key = (layer, field)
        return [s for s, record in self._records.items() if record.part.has(record.row, key)]

    def resolve_step(self, step: int) -> int:
        """Return a recorded step; a negative number counts from the end.

        Raises:
            StepNotFoundError: If there is no such record.
        """
        steps = self.steps
        if step < 0 and -step <= len(steps):
            return steps[step]
        if step not in self._records:
            raise StepNotFoundError(
                f"step {step} of '{self.measure}' was not recorded in run {self.run.name!r}; "
                f"recorded steps: {listing(steps)}"
            )
        return step

    def array(self, field: str, step: int = -1, layer: str | None = None) -> npt.NDArray[Any]:
        """Return one array of one record.

        Args:
            field: What the array is, such as `logits`.
            step: The step; negative numbers count from the end.
            layer: The layer it belongs to, if any.

        Raises:
            StepNotFoundError: If the step was not recorded.
            LayerNotFoundError: If the record has no such layer or field.
        """
        wanted = self.resolve_step(step)
        return self.run._retry(lambda: self._read(wanted, (layer, field)))

    def stack(
        self, field: str, steps: Sequence[int] | None = None, layer: str | None = None
    ) -> npt.NDArray[Any]:
        """Return one array over several steps, [steps, …].

        Args:
            field: What the array is.
            steps: The steps; None takes those of `steps_of`.
            layer: The layer it belongs to, if any.

        Raises:
            StepNotFoundError: If a step was not recorded.
            LayerNotFoundError: If a record has no such layer or field.
        """
        if steps is None:
            wanted = self.steps_of(field, layer)
            if not wanted:
                self._require(next(iter(self._records.values())), (layer, field))
        else:
            wanted = [self.resolve_step(step) for step in steps]
        return self.run._retry(lambda: np.stack(self._read_many(wanted, (layer, field))))

    def gram(self, step: int = -1, layer: str | None = None) -> npt.NDArray[np.float64]:
        """Return a Gram matrix over the examples.

        Args:
            step: The step; negative numbers count from the end.
            layer: The layer; None is the sum over all layers, where the measure has one.

        Returns:
            float64 [examples, examples], computed from whichever store was kept. From a sketch it
            is an unbiased estimate.

        Raises:
            StepNotFoundError: If the step was not recorded.
            LayerNotFoundError: If the record has no such layer.
        """
        if layer is None:
            return self.array("gram_total", step).astype(np.float64)
        fields = self._check_layer(layer)
        if "gram" in fields:
            return self.array("gram", step, layer).astype(np.float64)
        features = self.features(layer, step).astype(np.float64)
        product: npt.NDArray[np.float64] = features @ features.T
        return product

    def features(self, layer: str, step: int = -1) -> npt.NDArray[Any]:
        """Return the examples × features matrix of a layer, as it was stored.

        Raises:
            StepNotFoundError: If the step was not recorded.
            LayerNotFoundError: If there is no such layer, or only its Gram matrix was kept.
        """
        fields = self._check_layer(layer)
        for name in ("full", "sketch"):
            if name in fields:
                return self.array(name, step, layer)
        raise LayerNotFoundError(
            f"'{self.measure}' kept only {', '.join(fields)} of layer '{layer}'; "
            "record it with store=Full() or Sketch() to have features"
        )

    def attributes(self, step: int = -1) -> dict[str, Any]:
        """Return what the record of a step says of itself.

        Raises:
            StepNotFoundError: If the step was not recorded.
        """
        return self._records[self.resolve_step(step)].attributes

    def time(self, step: int = -1) -> float | None:
        """Return when the record of a step was taken, in seconds since 1970 (UTC).

        Raises:
            StepNotFoundError: If the step was not recorded.
        """
        return self._records[self.resolve_step(step)].time

    def describe(self, step: int = -1) -> dict[StreamKey, StreamShape]:
        """Return shape, dims and dtype of every array of a record, by (layer, field).

        Raises:
            StepNotFoundError: If the step was not recorded.
        """
        record = self._records[self.resolve_step(step)]
        return record.part.streams(record.row)

    def table(self, field: str) -> npt.NDArray[Any]:
        """Return an array of the source that does not depend on the step, such as `triplet`.

        Raises:
            InvalidInputError: If the source has no such array.
        """
        fields = self._table_fields()
        if field not in fields:
            raise InvalidInputError(
                f"source '{self.source}' has no table '{field}'; it has: {listing(fields)}"
            )
        return self.run._retry(lambda: self._read_table(field))

    def __getitem__(self, layer: str) -> LayerLog:
        """Return the records of one layer.

        Raises:
            LayerNotFoundError: If there is no such layer.
        """
        self._check_layer(layer)
        return LayerLog(self, layer)

    def __repr__(self) -> str:
        return (
            f"<{self.measure} of {self.source!r} in run {self.run.name!r}: {len(self.steps)} "
            f"records, {len(self.layers)} layers, {count_text(self.ids)} examples>"
        )

    def _read_table(self, field: str) -> npt.NDArray[Any]:
        table = self.run._table(self.source)
        assert table is not None
        return table.arrays[field]()

    def _table_fields(self) -> list[str]:
        table = self.run._table(self.source)
        return list(table.arrays) if table else []

    def _check_layer(self, layer: str) -> list[str]:
        fields = self.fields(layer)
        if not fields:
            raise LayerNotFoundError(
                f"layer '{layer}' of '{self.measure}' was not recorded in run "
                f"{self.run.name!r}; recorded layers: {listing(self.layers)}"
            )
        return fields

    def _read(self, step: int, key: StreamKey) -> npt.NDArray[Any]:
        record = self._records[step]
        self._require(record, key)
        return record.part.read(record.row, key)

    def _read_many(self, steps: Sequence[int], key: StreamKey) -> list[npt.NDArray[Any]]:
        records = [self._records[step] for step in steps]
        arrays: list[npt.NDArray[Any]] = []
        position = 0
        while position < len(records):
            part = records[position].part
            end = position
            while end < len(records) and records[end].part is part:
                self._require(records[end], key)
                end += 1
            arrays += part.read_many([record.row for record in records[position:end]], key)
            position = end
        return arrays

    def _require(self, record: Record, key: StreamKey) -> None:
        if record.part.has(record.row, key):
            return
        layer, field = key
        if layer is not None:
            self._check_layer(layer)
        there = [name for at, name in record.part.streams(record.row) if at == layer]
        where = f"layer '{layer}'" if layer is not None else "the record"
        raise LayerNotFoundError(
            f"'{self.measure}' of run {self.run.name!r} has no '{field}' for {where} at step "
            f"{record.step}; there is: {', '.join(there) or 'nothing'}"
        )


class LayerLog:
    """The records of one layer of a measure.

    Args:
        log: The measure.
        name: The layer.
    """

    def __init__(self, log: MeasureLog, name: str) -> None:
        self._log = log
        self.name = name

    @property
    def steps(self) -> list[int]:
        """The steps at which this layer was recorded."""
        return sorted({s for field in self.fields for s in self._log.steps_of(field, self.name)})

    @property
    def fields(self) -> list[str]:
        """What was kept of the layer, such as `gram` or `full`."""
        return self._log.fields(self.name)

    def gram(self, step: int = -1) -> npt.NDArray[np.float64]:
        """Return the layer's Gram matrix, float64 [examples, examples]; see `MeasureLog.gram`."""
        return self._log.gram(step, self.name)

    def features(self, step: int = -1) -> npt.NDArray[Any]:
        """Return the layer's stored [examples, features]; see `MeasureLog.features`."""
        return self._log.features(self.name, step)

    def array(self, field: str, step: int = -1) -> npt.NDArray[Any]:
        """Return one array of the layer; see `MeasureLog.array`."""
        return self._log.array(field, step, self.name)

    def __repr__(self) -> str:
        return f"<layer {self.name!r}: {', '.join(self.fields)} at {len(self.steps)} steps>"


def listing(items: Sequence[object], limit: int = 12) -> str:
    """List what there is, in a line of reasonable length."""
    texts = [str(item) for item in items]
    if len(texts) > limit:
        texts = [*texts[: limit - 3], f"… ({len(texts) - limit + 1} more)", *texts[-2:]]
    return ", ".join(texts) or "none"


def count_text(ids: npt.NDArray[Any] | None) -> str:
    """Return the number of examples as text."""
    return str(len(ids)) if ids is not None else "–"
