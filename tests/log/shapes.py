"""Runs of several shapes, and what was written into each, to hold against what is read of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sonde.log import LogArray, LogWriter
from sonde.log.reading.parts import StreamShape

from .conftest import Array, StreamKey, as_read, new_run
from .doomed import record_of

RecordKey = tuple[str, str, int]
"""A record is named by measure, source and step."""


@dataclass(frozen=True)
class Version:
    """What one attempt wrote as the record of a step."""

    attempt: int
    arrays: dict[StreamKey, Array]
    streams: dict[StreamKey, StreamShape]
    attributes: dict[str, Any]


@dataclass
class Written:
    """All that was written into a run.

    Attributes:
        records: Every version of each record, the latest last.
        tables: Every version of each table of a source.
        notes: The notes, as readers see them.
        abouts: What each attempt said of itself.
    """

    records: dict[RecordKey, list[Version]] = field(default_factory=dict)
    tables: dict[tuple[str, str], list[Array]] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)
    abouts: list[dict[str, Any]] = field(default_factory=list)

    def visible(self) -> dict[RecordKey, Version]:
        """Return what a reader of the undamaged run sees."""
        return {
            key: versions[-1]
            for key, versions in self.records.items()
            if all(
                key[2] < about.get("resume_step", 0)
                for about in self.abouts[versions[-1].attempt + 1 :]
            )
        }


class Attempt:
    """Writes one attempt of a run, and keeps what it wrote."""

    def __init__(
        self, path: Path, written: Written, segment_bytes: int = 64 << 20, **about: Any
    ) -> None:
        self._number = len(written.abouts)
        self._written = written
        written.abouts.append(about)
        self._writer = LogWriter(
            path, attempt=self._number, about=about, seal=False, segment_bytes=segment_bytes
        )

    def record(
        self,
        step: int,
        arrays: Sequence[LogArray],
        attributes: Mapping[str, Any] | None = None,
        measure: str = "activations",
        source: str = "probe",
    ) -> None:
        attributes = dict(attributes or {})
        assert self._writer.append(measure, source, step, arrays, attributes)
        read = {(a.layer, a.field): as_read(a) for a in arrays}
        streams = {
            (a.layer, a.field): StreamShape(a.dtype or a.values.dtype.name, a.dims, a.values.shape)
            for a in arrays
        }
        versions = self._written.records.setdefault((measure, source, step), [])
        versions.append(Version(self._number, read, streams, attributes))

    def table(self, source: str, arrays: Sequence[LogArray]) -> None:
        self._writer.add_table(source, arrays)
        for array in arrays:
            self._written.tables.setdefault((source, array.field), []).append(as_read(array))

    def note(self, event: str, step: int, **details: Any) -> None:
        self._writer.note(event, step, **details)
        self._written.notes.append({"event": event, "step": step, **details, "rank": 0})

    def close(self) -> None:
        self._writer.close()


def bits(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    """Return random bits as an array of some type."""
    storage = np.dtype(dtype)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * storage.itemsize), storage).reshape(shape)


def write_small_records(path: Path, seed: int) -> Written:
    written = Written()
    attempt = Attempt(path, written)
    attempt.table("probe", [LogArray("id", 100 + np.arange(5), ("example",))])
    for number in range(12):
        attempt.record(number, record_of(1000 * seed + number), {"n": number})
    attempt.close()
    return written


def write_many_layers(path: Path, seed: int) -> Written:
    rng = np.random.default_rng(seed)
    written = Written()
    attempt = Attempt(path, written, segment_bytes=10_000)
    for step in range(0, 50, 10):
        arrays = [
            LogArray("gram", bits(rng, "<f4", (3, 3)), ("example", "other_example"), f"block.{i}")
            for i in range(25)
        ]
        attempt.record(step, [*arrays, LogArray("loss", bits(rng, "<f8", ()), ())])
    attempt.close()
    return written


def write_ragged_streams(path: Path, seed: int) -> Written:
    rng = np.random.default_rng(seed)
    written = Written()
    attempt = Attempt(path, written, segment_bytes=3_000)
    for step in range(12):
        sizes = rng.integers(0, 9, 3)
        arrays = [
            LogArray("id", rng.integers(0, 99, sizes[0]), ("example",)),
            LogArray("full", bits(rng, "<f4", (sizes[0], 3)), ("example", "feature"), "fc"),
            LogArray("norm", bits(rng, "<f2", tuple(sizes)), ("a", "b", "c")),
            LogArray("mask", rng.random(sizes[2]) < 0.5, ("element",), "fc"),
        ]
        attempt.record(step, arrays[step % 2 :])
    attempt.close()
    return written


def write_bfloat16(path: Path, seed: int) -> Written:
    rng = np.random.default_rng(seed)
    written = Written()
    attempt = Attempt(path, written)
    attempt.table("probe", [LogArray("center", bits(rng, "<u2", (7,)), ("n",), None, "bfloat16")])
    for step in range(10):
        layers = ("fc1", "fc2", "late") if step > 6 else ("fc1", "fc2")
        attempt.record(
            step,
            [
                LogArray("full", bits(rng, "<u2", (5, 7)), ("example", "feature"), name, "bfloat16")
                for name in layers
            ],
        )
    attempt.close()
    return written


def write_large_arrays(path: Path, seed: int) -> Written:
    rng = np.random.default_rng(seed)
    written = Written()
    attempt = Attempt(path, written)
    for step in range(2):
        # Over the size that is read in one piece, and no multiple of 8.
        size = (1 << 20) + 1001 + 2 * step
        attempt.record(step, [LogArray("full", bits(rng, "<f4", (size,)), ("n",), "fc")])
        attempt.record(step, [LogArray("loss", bits(rng, "<f4", ()), ())], measure="scalars")
    attempt.close()
    return written


def write_several_files(path: Path, seed: int) -> Written:
    written = Written()
    attempt = Attempt(path, written, segment_bytes=4_000)
    attempt.table("probe", [LogArray("id", 100 + np.arange(5), ("example",))])
    for number in range(16):
        attempt.record(number, record_of(2000 + 1000 * seed + number), {"n": number})
    attempt.close()
    return written


def write_resumed_attempts(path: Path, seed: int) -> Written:
    written = Written()
    for number, (first, end) in enumerate([(0, 8), (5, 11), (9, 15)]):
        attempt = Attempt(path, written, 4_000, resume_step=first, host=f"node{number}")
        attempt.table("probe", [LogArray("id", 100 + np.arange(5), ("example",))])
        for step in range(first, end):
            number_of = 3000 + 1000 * seed + 100 * number + step
            attempt.record(step, record_of(number_of), {"attempt": number})
        attempt.close()
    return written


def write_notes_and_tables(path: Path, seed: int) -> Written:
    rng = np.random.default_rng(seed)
    written = Written()
    attempt = Attempt(path, written, segment_bytes=4_000, environment={"torch": "2.6", "größe": 1})
    for step in range(0, 90, 10):
        for source, size in (("train", 6), ("test", 4)):
            if step % 40 == 0:
                ids = LogArray("id", 10 * np.arange(size), ("example",))
                targets = LogArray("target", rng.integers(0, 9, size), ("example",))
                attempt.table(source, [ids, targets])
            gram = bits(rng, "<f8", (size, size))
            arrays = [LogArray("gram", gram, ("example", "other_example"), "fc")]
            attempt.record(step, arrays, {"batch": step // 10}, "activations", source)
        attempt.record(step, [LogArray("lr", bits(rng, "<f4", ()), ())], {}, "scalars", "training")
        attempt.note("missing", step, layer="fc9", reason="never called", number=step / 3)
    attempt.close()
    return written


SHAPES: dict[str, Callable[[Path, int], Written]] = {
    write.__name__.removeprefix("write_"): write
    for write in (
        write_small_records,
        write_many_layers,
        write_ragged_streams,
        write_bfloat16,
        write_large_arrays,
        write_several_files,
        write_resumed_attempts,
        write_notes_and_tables,
    )
}


def write_shape(path: Path, shape: str, seed: int) -> Written:
    """Make a run of a shape; other seeds give other values at the same places."""
    return SHAPES[shape](new_run(path), seed)
