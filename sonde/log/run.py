"""A recorded run, as its readers see it: measures, steps, layers, examples and arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from sonde.exceptions import (
    InvalidInputError,
    LayerNotFoundError,
    MeasureNotFoundError,
    StepNotFoundError,
)

from .frames import Damage
from .layout import read_run_file
from .reader import Record, StreamKey, StreamShape, Table, WriterLog, read_index

if TYPE_CHECKING:
    import xarray

_Result = TypeVar("_Result")


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run directory for reading, also while the training still writes it.

    Args:
        path: The run directory.

    Returns:
        The run, as it is now; `Run.refresh` takes in what came later.

    Raises:
        RunNotFoundError: If the path is no run directory.
        FormatError: If the run was written by a newer sonde.
    """
    return Run(path)


class Run:
    """One recorded training.

    `run.activations` and `run["activations"]` are the records of a measure; when it has several
    sources, `run["activations", "validation"]` names one.

    Args:
        path: The run directory.

    Attributes:
        path: The run directory.
        info: The run's own description: environment, configuration, layers, probes, versions.

    Raises:
        RunNotFoundError: If the path is no run directory.
        FormatError: If the run was written by a newer sonde.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.info = read_run_file(self.path)
        self.refresh()

    def refresh(self) -> None:
        """Take in what was recorded, sealed or damaged since the run was opened."""
        self._writers = read_index(self.path)
        self._records = _visible_records(self._writers)
        self._logs = {key: MeasureLog(self, *key) for key in self._records}

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.path.resolve().name

    @property
    def state(self) -> str:
        """`recording` while a process writes, `finished` if it closed its log, else `interrupted`."""
        if any(writer.is_live for writer in self._writers):
            return "recording"
        last = max((writer.attempt for writer in self._writers), default=-1)
        final = [writer for writer in self._writers if writer.attempt == last]
        ended = [any(event["kind"] == "end" for event in w.events) for w in final]
        return "finished" if ended and all(ended) else "interrupted"

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """What each writer said of itself: attempt, rank, process, environment."""
        return [{"attempt": w.attempt, "rank": w.rank, **w.about} for w in self._writers]

    @property
    def ranks(self) -> list[int]:
        """The ranks that wrote."""
        return sorted({writer.rank for writer in self._writers})

    @property
    def measures(self) -> list[str]:
        """The measures that have records, in the order they were first recorded."""
        return list(dict.fromkeys(measure for measure, _ in self._records))

    @property
    def layers(self) -> list[str]:
        """Every layer that has records, in the order the model ran them."""
        return list(dict.fromkeys(name for log in self._logs.values() for name in log.layers))

    @property
    def notes(self) -> list[dict[str, Any]]:
        """What the log says beside records: layers that never ran, coverage, dropped records.

        Each has an `event`, the `step` it was found at, and its details.
        """
        notes = []
        for writer in self._writers:
            for event in writer.events:
                if event["kind"] in ("note", "gap"):
                    note = {name: event[name] for name in event if name not in ("kind", "sequence")}
                    notes.append({"event": event["kind"], **note, "rank": writer.rank})
        if len(self.ranks) > 1:
            others = ", ".join(str(rank) for rank in self.ranks[1:])
            notes.append(
                {
                    "event": "other ranks",
                    "step": -1,
                    "reason": f"records of rank {self.ranks[0]} are read; "
                    f"rank {others} recorded the same probes",
                }
            )
        return notes

    @property
    def damage(self) -> list[Damage]:
        """What could not be read, file by file."""
        return [damage for writer in self._writers for damage in writer.damage]

    def sources(self, measure: str) -> list[str]:
        """Return the sources a measure has records of."""
        return [source for name, source in self._records if name == measure]

    def steps(self, measure: str | None = None, source: str | None = None) -> list[int]:
        """Return the recorded steps, sorted.

        Args:
            measure: Only those of this measure.
            source: Only those of this source.

        Raises:
            MeasureNotFoundError: If the run has no such measure or source.
        """
        if measure is not None:
            self._key(measure, source)
        found = {
            step
            for (name, origin), records in self._records.items()
            if measure in (None, name) and source in (None, origin)
            for step in records
        }
        return sorted(found)

    def __getitem__(self, key: str | tuple[str, str]) -> MeasureLog:
        """Return the records of one measure, or of one measure and source.

        Raises:
            MeasureNotFoundError: If there are none, or if the source has to be named.
        """
        measure, source = (key, None) if isinstance(key, str) else key
        return self._logs[self._key(measure, source)]

    def __getattr__(self, name: str) -> MeasureLog:
        """Return the records of one measure.

        Raises:
            MeasureNotFoundError: If there are none, or if the source has to be named.
        """
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self.measures]

    def __repr__(self) -> str:
        steps = self.steps()
        span = f"steps {steps[0]} to {steps[-1]}" if steps else "nothing recorded yet"
        return f"<Run {self.name!r}, {self.state}, {span}: {', '.join(self.measures)}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{log.measure}</td><td>{log.source}</td><td>{len(log.steps)}</td>"
            f"<td>{len(log.layers)}</td><td>{_count(log.ids)}</td></tr>"
            for log in self._logs.values()
        )
        return (
            f"<b>Run {self.name}</b> ({self.state}), {self.path}<table><tr><th>measure</th>"
            f"<th>source</th><th>records</th><th>layers</th><th>examples</th></tr>{rows}</table>"
        )

    def to_xarray(
        self,
        measures: Sequence[str] | None = None,
        *,
        layers: Sequence[str] | None = None,
        steps: Sequence[int] | None = None,
    ) -> xarray.DataTree:
        """Load records as a tree of datasets, `/measure/source`, with named dimensions.

        Everything selected is held in memory. A record that lacks a stream reads as NaN; streams
        whose shape changes between records are named in the attribute `ragged` instead.

        Args:
            measures: Only these measures.
            layers: Only these layers.
            steps: Only these steps.

        Returns:
            A tree; variables are named `layer:field` or `field`, and their first axis is `step`.

        Raises:
            MeasureNotFoundError: If the run has no such measure.
        """
        import xarray

        from .to_xarray import dataset_of

        for measure in measures or ():
            self._key(measure, self.sources(measure)[0] if self.sources(measure) else None)
        chosen = [log for log in self._logs.values() if not measures or log.measure in measures]
        nodes = {f"/{log.measure}/{log.source}": dataset_of(log, layers, steps) for log in chosen}
        root = xarray.Dataset(attrs={"run": str(self.path), "state": self.state})
        return xarray.DataTree.from_dict({"/": root, **nodes}, name=self.name)

    def _key(self, measure: str, source: str | None) -> tuple[str, str]:
        sources = self.sources(measure)
        if not sources:
            raise MeasureNotFoundError(
                f"run {self.name!r} has no records of '{measure}'; it has: "
                f"{', '.join(self.measures) or 'none yet'}"
            )
        if source is None and len(sources) > 1:
            raise MeasureNotFoundError(
                f"'{measure}' of run {self.name!r} has several sources; name one, as in "
                f"run[{measure!r}, {sources[0]!r}]: {', '.join(sources)}"
            )
        if source is not None and source not in sources:
            raise MeasureNotFoundError(
                f"'{measure}' of run {self.name!r} has no source '{source}'; "
                f"it has: {', '.join(sources)}"
            )
        return measure, source or sources[0]

    def _table(self, source: str) -> Table | None:
        for writer in reversed(self._writers):
            if source in writer.tables:
                return writer.tables[source]
        return None

    def _retry(self, read: Callable[[], _Result]) -> _Result:
        try:
            return read()
        except FileNotFoundError:
            # The journal was sealed since it was listed.
            self.refresh()
            return read()


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
                f"recorded steps: {_listing(steps)}"
            )
        return step

    def array(
        self, field: str, step: int = -1, layer: str | None = None
    ) -> npt.NDArray[Any]:
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
                f"source '{self.source}' has no table '{field}'; it has: {', '.join(fields)}"
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
            f"records, {len(self.layers)} layers, {_count(self.ids)} examples>"
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
                f"{self.run.name!r}; recorded layers: {_listing(self.layers)}"
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


def _visible_records(
    writers: Sequence[WriterLog],
) -> dict[tuple[str, str], dict[int, Record]]:
    """Return one record per step for each measure × source, the latest one that counts.

    An attempt that resumed at a step supersedes what earlier attempts recorded from there on.
    """
    rank = min((writer.rank for writer in writers), default=0)
    chosen = sorted((w for w in writers if w.rank == rank), key=lambda writer: writer.attempt)
    found: dict[tuple[str, str], dict[int, Record]] = {}
    for writer in chosen:
        for records in found.values():
            for step in [step for step in records if step >= writer.resume_step]:
                del records[step]
        for key, parts in writer.parts.items():
            records = found.setdefault(key, {})
            for record in sorted(
                (record for part in parts for record in part.records),
                key=lambda record: record.sequence,
            ):
                records[record.step] = record
    return {key: dict(sorted(records.items())) for key, records in found.items() if records}


def _listing(items: Sequence[object], limit: int = 12) -> str:
    """List what there is, in a line of reasonable length."""
    texts = [str(item) for item in items]
    if len(texts) > limit:
        texts = [*texts[: limit - 3], f"… ({len(texts) - limit + 1} more)", *texts[-2:]]
    return ", ".join(texts) or "none"


def _count(ids: npt.NDArray[Any] | None) -> str:
    return str(len(ids)) if ids is not None else "–"
