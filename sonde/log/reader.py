"""The reading side of a log: every valid record of a run, from segments and journals alike.

An `Index` lists what is there without loading arrays, and lists it again at the cost of what is
new. Sealed segments are taken first, then journals; a record that stands in both (its journal was
sealed but not deleted yet) counts once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from sonde.exceptions import DamageError

from .frames import FILE_HEADER_BYTES, Damage, Frame, Scan
from .layout import is_being_written, journals, segments, writer_folders
from .parts import JournalFile, JournalPart, Part, SegmentPart, read_array
from .positioned import READ_ONLY, read_at
from .segment import Segment, SegmentFile, identify


@dataclass(frozen=True)
class Table:
    """Arrays of a source that do not depend on the step.

    Attributes:
        attributes: What else the table says of itself.
        arrays: What reads each array, by field.
        dims: One name per axis of each array, by field.
    """

    attributes: dict[str, Any]
    arrays: Mapping[str, Callable[[], npt.NDArray[Any]]]
    dims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass
class WriterLog:
    """What one rank wrote in one attempt.

    Attributes:
        attempt: The attempt, counted from 0.
        rank: The rank.
        is_live: True while its process still writes.
        about: What the writer said of itself.
        parts: The records, by measure and source.
        tables: The tables, by source.
        events: Notes, gaps and the end, in order.
        damage: What could not be read.
    """

    attempt: int
    rank: int
    is_live: bool
    about: dict[str, Any] = field(default_factory=dict)
    parts: dict[tuple[str, str], list[Part]] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)

    @property
    def resume_step(self) -> int:
        """The step this attempt went on from; 0 for a training that started afresh.

        Where the attempt's own statement is missing, because it was killed before it could write
        one or because it is damaged, this is the first step it recorded.
        """
        if self.about:
            return int(self.about.get("resume_step") or 0)
        parts = [part for parts in self.parts.values() for part in parts]
        return min((r.step for part in parts for r in part.records), default=sys.maxsize)


def read_index(run: Path) -> list[WriterLog]:
    """List everything a run directory holds, one entry per attempt and rank.

    Raises:
        FormatError: If a file is of a newer format.
        OSError: If the directory cannot be read.
    """
    return Index(run).read()


@dataclass(frozen=True)
class _OpenSegment:
    segment: Segment
    parts: tuple[SegmentPart, ...]


@dataclass(frozen=True)
class _OpenJournal:
    file: JournalFile
    scan: Scan
    items: list[Frame | Damage]


class Index:
    """What a run directory holds.

    Args:
        run: The run directory.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._segments: dict[SegmentFile, _OpenSegment | Damage] = {}
        self._journals: dict[JournalFile, _OpenJournal] = {}

    def read(self) -> list[WriterLog]:
        """List everything the directory holds now, one entry per attempt and rank.

        Raises:
            FormatError: If a file is of a newer format.
            OSError: If the directory cannot be read.
        """
        known = Index(self._run)
        logs = [
            self._read_writer(attempt, rank, folder, known)
            for attempt, rank, folder in writer_folders(self._run)
        ]
        # What is gone is forgotten.
        self._segments, self._journals = known._segments, known._journals
        return logs

    def _read_writer(self, attempt: int, rank: int, folder: Path, known: Index) -> WriterLog:
        while True:
            is_live = is_being_written(folder)
            # Journals are listed first: what is sealed meanwhile stands in both lists, not in none.
            open_ends = journals(folder)
            sealed = segments(folder)
            log = _LogBuilder(WriterLog(attempt, rank, is_live))
            try:
                for first, end, path in sealed:
                    log.add_segment(path, first, end, self._open_segment(path, known))
                for first, path in open_ends:
                    is_last = first == open_ends[-1][0]
                    journal = self._open_journal(path, known)
                    log.add_journal(journal, first, is_live=is_live and is_last)
            except FileNotFoundError:
                # A journal was sealed before it was opened. Unless nothing changed, list again.
                if (open_ends, sealed) == (journals(folder), segments(folder)):
                    raise
                continue
            return log.finish()

    def _open_segment(self, path: Path, known: Index) -> _OpenSegment | Damage:
        file = identify(path)
        found = self._segments.get(file)
        if found is None:
            try:
                segment = Segment(file)
                found = _OpenSegment(segment, tuple(SegmentPart(g) for g in segment.groups))
            except DamageError as error:
                reason = str(error).removeprefix(f"{file.name}: ")
                found = Damage(file.name, 0, file.num_bytes, reason)
        known._segments[file] = found
        return found

    def _open_journal(self, path: Path, known: Index) -> _OpenJournal:
        fd = os.open(path, READ_ONLY)
        try:
            file = JournalFile(path, read_at(fd, FILE_HEADER_BYTES, 0))
            found = self._journals.get(file)
            if found is None:
                found = _OpenJournal(file, Scan(f"{path.parent.name}/{path.name}"), [])
            items = [item for item in found.items if isinstance(item, Frame) or not item.is_tail]
            items += found.scan.advance(fd)
        finally:
            os.close(fd)
        known._journals[file] = _OpenJournal(file, found.scan, items)
        return known._journals[file]


class _LogBuilder:
    """Puts together what the files of one writer hold."""

    def __init__(self, log: WriterLog) -> None:
        self._log = log
        self._seen: set[int] = set()
        self._spans: list[tuple[int, int, str, bool]] = []  # first, end, file, is damaged

    def add_segment(self, path: Path, first: int, end: int, found: _OpenSegment | Damage) -> None:
        log = self._log
        name = f"{path.parent.name}/{path.name}"
        if isinstance(found, Damage):
            log.damage.append(found)
            self._spans.append((first, end, name, True))
            return
        damage = [Damage(**item) for item in found.segment.damage]
        log.damage += damage
        self._spans.append((first, end, name, bool(damage)))
        for item in found.segment.frames:
            if item["sequence"] not in self._seen:
                self._seen.add(item["sequence"])
                self._add_event(item)
        for table in found.segment.tables:
            arrays = {e["field"]: partial(found.segment.table, e) for e in table["arrays"]}
            dims = {e["field"]: tuple(e["dims"]) for e in table["arrays"]}
            log.tables[table["name"]] = Table(table["attributes"], arrays, dims)
        for part in found.parts:
            self._seen.update(record.sequence for record in part.records)
            log.parts.setdefault((part.measure, part.source), []).append(part)

    def add_journal(self, journal: _OpenJournal, first: int, *, is_live: bool) -> None:
        log = self._log
        parts: dict[tuple[str, str], JournalPart] = {}
        end, is_damaged = first, False
        for item in journal.items:
            if isinstance(item, Damage):
                # The tail of a live journal is a record on its way.
                if not (item.is_tail and is_live):
                    log.damage.append(item)
                    is_damaged = True
                continue
            end = item.sequence + 1
            if item.sequence in self._seen:
                continue
            self._seen.add(item.sequence)
            if item.kind == "record":
                key = (item.body["measure"], item.body["source"])
                parts.setdefault(key, JournalPart(journal.file)).add(item)
            elif item.kind == "table":
                arrays = {
                    entry.field: partial(read_array, journal.file, item, column)
                    for column, entry in enumerate(item.arrays)
                }
                dims = {entry.field: entry.dims for entry in item.arrays}
                log.tables[item.body["name"]] = Table(item.body["attributes"], arrays, dims)
            else:
                numbers = {"kind": item.kind, "step": item.step, "sequence": item.sequence}
                self._add_event({**numbers, **item.body})
        path = journal.file.path
        self._spans.append((first, end, f"{path.parent.name}/{path.name}", is_damaged))
        for key, part in parts.items():
            log.parts.setdefault(key, []).append(part)

    def finish(self) -> WriterLog:
        """Report what is missing between the files, and return the whole."""
        expected, may_be_missing = 0, False
        for first, end, name, is_damaged in sorted(self._spans):
            # Frames behind damage were reported with it.
            if first > expected and not may_be_missing:
                reason = f"frames {expected} to {first - 1} are missing: a file was lost"
                self._log.damage.append(Damage(name, 0, 0, f"{reason} before this one"))
            if end >= expected:
                expected, may_be_missing = end, is_damaged
        self._log.damage = list(dict.fromkeys(self._log.damage))
        return self._log

    def _add_event(self, item: dict[str, Any]) -> None:
        if item["kind"] == "attempt":
            self._log.about = item
        else:
            self._log.events.append(item)
