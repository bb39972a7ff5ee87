"""A recorded run, as its readers see it: measures, steps, layers, examples and arrays."""

from __future__ import annotations

import html
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sonde.exceptions import InvalidInputError, MeasureNotFoundError
from sonde.log.format.damage import Damage
from sonde.log.format.endings import state_after
from sonde.log.format.files import read_run_file
from sonde.log.format.names import link_name
from sonde.log.reading.examples import Examples
from sonde.log.reading.exported import ExportedRun
from sonde.log.reading.index import Index, Table
from sonde.log.reading.ranks import join
from sonde.visible import visible

from .measure_log import MeasureLog

if TYPE_CHECKING:
    import xarray

_Result = TypeVar("_Result")


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run directory for reading, also while the training still writes it.

    Args:
        path: The run directory, or a file that a run was exported to.

    Returns:
        The run, as it is now; `Run.refresh` takes in what came later, `Run.follow` waits for it.

    Raises:
        RunNotFoundError: If the path is no run.
        DamageError: If it is an exported run whose metadata is damaged.
        FormatError: If the run was written by a newer sonde.
    """
    return Run(path)


class Run:
    """One recorded training.

    `run.activations` and `run["activations"]` are the records of a measure; when it has several
    sources, `run["activations", "validation"]` names one.

    Args:
        path: The run directory, or a file that a run was exported to.

    Attributes:
        path: The run directory or file.
        info: The run's own description: environment, configuration, layers, probes, versions.

    Raises:
        RunNotFoundError: If the path is no run.
        DamageError: If it is an exported run whose metadata is damaged.
        FormatError: If the run was written by a newer sonde.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._index: Index | ExportedRun
        if self.path.is_file():
            self._index = ExportedRun(self.path)
            self.info = self._index.info
        else:
            self.info = read_run_file(self.path)
            self._index = Index(self.path)
        self._only_rank: int | None = None
        self.num_refreshed = 0
        self.refresh()

    def refresh(self) -> None:
        """Take in what was recorded, sealed or damaged since the run was opened."""
        self.num_refreshed += 1
        writers, rank = self._index.read(), self._only_rank
        joined = join(writers, rank)
        self._writers = [w for w in writers if rank is None or w.rank == rank]
        self._records, self._findings = joined.records, joined.findings
        self._examples = {key: Examples(self.name, *key, r) for key, r in self._records.items()}
        self._logs = {key: MeasureLog(self, *key) for key in self._records}

    def follow(self, *, poll_seconds: float = 1.0) -> Iterator[tuple[MeasureLog, int]]:
        """Yield every record, and then each new one as it is committed, until the run ends.

        The training never waits for its readers. A step that a resumed attempt records again is
        yielded again.

        Args:
            poll_seconds: How long to wait before looking again.

        Yields:
            The records of a measure, and the step that is new among them.
        """
        seen: set[tuple[str, str, int, int]] = set()
        while True:
            self.refresh()
            # Whether it ended was looked at before its records were listed.
            has_ended = self.state != "recording"
            new = [
                (step, measure, source, shares[0].writer.attempt)
                for (measure, source), records in self._records.items()
                for step, shares in records.items()
                if (measure, source, step, shares[0].writer.attempt) not in seen
            ]
            for step, measure, source, attempt in sorted(new, key=lambda item: item[0]):
                seen.add((measure, source, step, attempt))
                yield self._logs[measure, source], step
            if has_ended:
                return
            time.sleep(poll_seconds)

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.path.resolve().name

    @property
    def state(self) -> str:
        """What became of it: `recording` while a process writes, `finished` if it was closed.

        Otherwise `interrupted`, by a user or a kill, or what ended the training, such as
        `ended by ValueError`.
        """
        if any(writer.is_live for writer in self._writers):
            return "recording"
        last = max((writer.attempt for writer in self._writers), default=-1)
        final = [writer for writer in self._writers if writer.attempt == last]
        ends = [[e for e in writer.events if e["kind"] == "end"] for writer in final]
        return state_after(str(end[-1].get("reason", "closed")) if end else None for end in ends)

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """What each writer said of itself: attempt, rank, process, environment."""
        return [{"attempt": w.attempt, "rank": w.rank, **w.about} for w in self._writers]

    @property
    def ranks(self) -> list[int]:
        """The ranks that wrote."""
        return sorted({writer.rank for writer in self._writers})

    def rank(self, rank: int) -> Run:
        """Return the run as one of its ranks recorded it, without what was superseded.

        Raises:
            InvalidInputError: If that rank recorded nothing.
        """
        if rank not in self.ranks:
            known = ", ".join(map(str, self.ranks)) or "none"
            raise InvalidInputError(
                f"rank {rank} recorded nothing in run {self.name!r}; ranks: {known}"
            )
        view = Run(self.path)
        view._only_rank = rank
        view.refresh()
        return view

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
        notes += self._findings
        return notes

    @property
    def damage(self) -> list[Damage]:
        """What could not be read, file by file."""
        return [damage for writer in self._writers for damage in writer.damage]

    @property
    def unfinished(self) -> list[Damage]:
        """What was being written when its process was killed; nothing committed is lost by it.

        A journal that was cut short afterwards looks the same.
        """
        return [item for writer in self._writers for item in writer.unfinished]

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
            AttributeError: If the name is a private one.
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
        def shown(text: object) -> str:
            return html.escape(visible(text))

        rows = "".join(
            f"<tr><td>{shown(log.measure)}</td><td>{shown(log.source)}</td>"
            f"<td>{len(log.steps)}</td>"
            f"<td>{len(log.layers)}</td><td>{log._count_text()}</td></tr>"
            for log in self._logs.values()
        )
        return (
            f"<b>Run {shown(self.name)}</b> ({self.state}), {shown(self.path)}"
            "<table><tr><th>measure</th>"
            f"<th>source</th><th>records</th><th>layers</th><th>examples</th></tr>{rows}</table>"
        )

    def to_xarray(
        self,
        measures: Sequence[str] | None = None,
        *,
        layers: Sequence[str] | None = None,
        steps: Sequence[int] | None = None,
        as_stored: bool = False,
    ) -> xarray.DataTree:
        """Load records as a tree of datasets, `/measure/source`, with named dimensions.

        Everything selected is held in memory. Half precision becomes float32, as xarray adds up
        float16 in float16: the mean of 4,096 ones would be 0.5. A record that lacks a stream reads
        as NaN; streams whose shape changes between records are named in the attribute `ragged`
        instead, those that each rank has of its own examples in `by_rank`.

        Args:
            measures: Only these measures.
            layers: Only these layers.
            steps: Only these steps.
            as_stored: Leave arrays as they are; see `MeasureLog.array`.

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
        nodes = {
            f"/{link_name(log.measure)}/{link_name(log.source)}": dataset_of(
                log, layers, steps, as_stored=as_stored
            )
            for log in chosen
        }
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

    def _tables(self, source: str) -> list[Table]:
        """Return the tables of a source, those of the latest attempt and its lowest rank first."""
        latest_first = sorted(self._writers, key=lambda w: (-w.attempt, w.rank))
        return [writer.tables[source] for writer in latest_first if source in writer.tables]

    def retry(self, read: Callable[[], _Result]) -> _Result:
        """Read, again where files were sealed since they were listed.

        Args:
            read: Reads from what is listed now.

        Raises:
            FileNotFoundError: If a file is gone for good.
        """
        gone: set[str] = set()
        while True:
            try:
                return read()
            except FileNotFoundError as error:
                # A journal was sealed since it was listed. Meanwhile another may be, but none that
                # was found gone is listed again, unless it is lost for good.
                if error.filename in gone:
                    raise
                gone.add(error.filename)
                self.refresh()
