"""The reading side of a log: every valid record of a run, from segments and journals alike.

An `Index` lists what is there without loading arrays, and lists it again at the cost of what is
new. Sealed segments are taken first, then journals; a record that stands in both (its journal was
sealed but not deleted yet) counts once.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from sonde.exceptions import DamageError
from sonde.log.format.damage import Damage
from sonde.log.format.files import is_being_written, journals, segments, writer_folders
from sonde.log.format.frames import FILE_HEADER_BYTES, Frame
from sonde.log.format.positioned import open_regular, read_at

from .parts import JournalFile, JournalPart, Part, SegmentPart, read_array
from .scan import Scan
from .segment import Segment
from .segment_file import SegmentFile, identify


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
        unfinished: What was being written when its process was killed, and was not committed.
    """

    attempt: int
    rank: int
    is_live: bool
    about: dict[str, Any] = field(default_factory=dict)
    parts: dict[tuple[str, str], list[Part]] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)
    unfinished: list[Damage] = field(default_factory=list)

    @property
    def resume_step(self) -> int:
        """The step this attempt went on from; 0 for a training that started afresh.

        Where the attempt's own statement is missing, because it was killed before it could write
        one or because it is damaged or lost, this is the first step it recorded.
        """
        stated = self.about.get("resume_step", 0)
        if self.about and stated is not None:
            return int(stated)
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
    file: SegmentFile
    segment: Segment
    parts: tuple[SegmentPart, ...]

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def num_bytes(self) -> int:
        return self.file.num_bytes

    @property
    def token(self) -> str | None:
        """The token of its writer, if that is known."""
        return self.attempt.get("token")

    @cached_property
    def attempt(self) -> dict[str, Any]:
        """What its writer says of itself, if that is known."""
        return next((item for item in self.segment.frames if item["kind"] == "attempt"), {})

    @cached_property
    def numbers(self) -> tuple[int, int] | None:
        """The numbers of the first and the last frame in it, tables aside."""
        numbers = [item["sequence"] for item in self.segment.frames]
        for part in self.parts:
            numbers += (part.records[0].sequence, part.records[-1].sequence)
        return (min(numbers), max(numbers)) if numbers else None


@dataclass(frozen=True)
class _OpenJournal:
    file: JournalFile
    scan: Scan
    items: list[Frame | Damage]

    @property
    def name(self) -> str:
        return f"{self.file.path.parent.name}/{self.file.path.name}"

    @property
    def num_bytes(self) -> int:
        return max(
            (f.payload_offset + f.layout.num_bytes for f in self.frames), default=FILE_HEADER_BYTES
        )

    @property
    def token(self) -> str | None:
        """The token of its writer, if that is known."""
        return None if self.scan.token is None else f"{self.scan.token:016x}"

    @property
    def attempt(self) -> dict[str, Any]:
        """What its writer says of itself, if that is known."""
        return next((frame.body for frame in self.frames if frame.kind == "attempt"), {})

    @property
    def frames(self) -> Iterator[Frame]:
        return (item for item in self.items if isinstance(item, Frame))


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
        missing_before: set[Damage] = set()
        while True:
            is_live = is_being_written(folder)
            # Journals are listed first: what is sealed meanwhile stands in both lists, not in none.
            open_ends = journals(folder)
            sealed = segments(folder)
            try:
                found = [(*entry[:2], self._open_segment(entry[2], known)) for entry in sealed]
                journaled = [(first, self._open_journal(path, known)) for first, path in open_ends]
            except FileNotFoundError:
                # A journal was sealed before it was opened. Unless nothing changed, list again.
                if (open_ends, sealed) == (journals(folder), segments(folder)):
                    raise
                continue
            log = _LogBuilder(WriterLog(attempt, rank, is_live))
            log.find_token([*(opened[-1] for opened in found), *(j for _, j in journaled)])
            for first, end, segment in found:
                log.add_segment(segment, first, end)
            for first, journal in journaled:
                log.add_journal(journal, first, is_live=is_live, is_last=first == open_ends[-1][0])
            missing = log.missing()
            # Of files that come while a folder is listed, the list may have a later one and not an
            # earlier one. So what is missing from a growing log must be missing twice.
            if not is_live or missing <= missing_before:
                return log.finish()
            missing_before = missing

    def _open_segment(self, path: Path, known: Index) -> _OpenSegment | Damage:
        try:
            file = identify(path)
        except DamageError as error:
            return _no_file(path, error)
        # What was opened for a list that was no good is kept, or sealing might stay ahead for ever.
        found = self._segments.get(file) or known._segments.get(file)
        if found is None:
            try:
                segment = Segment(file)
                parts = tuple(SegmentPart(group) for group in segment.groups)
                found = _OpenSegment(file, segment, parts)
            except DamageError as error:
                reason = str(error).removeprefix(f"{file.name}: ")
                found = Damage(file.name, 0, file.num_bytes, reason)
        known._segments[file] = found
        return found

    def _open_journal(self, path: Path, known: Index) -> _OpenJournal | Damage:
        try:
            fd = open_regular(path)
        except DamageError as error:
            return _no_file(path, error)
        try:
            file = JournalFile(path, read_at(fd, FILE_HEADER_BYTES, 0))
            found = known._journals.get(file) or self._journals.get(file)
            if found is None:
                found = _OpenJournal(file, Scan(f"{path.parent.name}/{path.name}"), [])
            items = [item for item in found.items if isinstance(item, Frame) or not item.is_tail]
            items += found.scan.advance(fd)
        finally:
            os.close(fd)
        known._journals[file] = _OpenJournal(file, found.scan, items)
        return known._journals[file]


def _no_file(path: Path, error: DamageError) -> Damage:
    name = f"{path.parent.name}/{path.name}"
    return Damage(name, 0, 0, str(error).removeprefix(f"{name}: "))


class _LogBuilder:
    """Puts together what the files of one writer hold, whatever order they come in.

    What is in a file counts, not what the file is named; but no file of another writer is read.
    """

    def __init__(self, log: WriterLog) -> None:
        self._log = log
        self._token: str | None = None
        self._seen: set[int] = set()
        self._tables: dict[str, tuple[int, Table]] = {}  # With the number of its frame.
        self._spans: list[tuple[int, int, str, bool]] = []  # first, end, file, is damaged

    def find_token(self, files: Sequence[_OpenSegment | Damage | _OpenJournal]) -> None:
        """Find out who wrote the files: what most of them say, or nobody if they are at odds."""
        tokens = [
            file.token
            for file in files
            if not isinstance(file, Damage) and file.token is not None and self._is_here(file)
        ]
        token, count = Counter(tokens).most_common(1)[0] if tokens else (None, 0)
        self._token = token if 2 * count > len(tokens) else None

    def add_segment(self, opened: _OpenSegment | Damage, first: int, end: int) -> None:
        if isinstance(opened, Damage):
            self._leave_out(opened, first, end)
            return
        refused = self._refuse(opened)
        if refused is not None:
            self._leave_out(refused, first, end)
            return
        log = self._log
        segment, numbers = opened.segment, opened.numbers
        damage = [Damage.of(item) for item in segment.damage]
        log.damage += damage
        if numbers is not None:
            start, last = numbers
            if start < first or last >= end or (start > first and not damage):
                self._report_name(opened.name, start, last)
                first, end = start, last + 1
        self._spans.append((first, end, opened.name, bool(damage)))
        for item in segment.frames:
            if item["sequence"] not in self._seen:
                self._seen.add(item["sequence"])
                self._add_event(item)
        for table in segment.tables:
            arrays = {e["field"]: partial(segment.table, e) for e in table["arrays"]}
            dims = {e["field"]: tuple(e["dims"]) for e in table["arrays"]}
            self._add_table(first, table["name"], Table(table["attributes"], arrays, dims))
        for part in opened.parts:
            self._seen.update(record.sequence for record in part.records)
            log.parts.setdefault((part.measure, part.source), []).append(part)

    def add_journal(
        self, journal: _OpenJournal | Damage, first: int, *, is_live: bool, is_last: bool
    ) -> None:
        refused = journal if isinstance(journal, Damage) else self._refuse(journal)
        if refused is not None:
            self._leave_out(refused, first, first)
            return
        assert not isinstance(journal, Damage)  # It was refused.
        log = self._log
        parts: dict[tuple[str, str], JournalPart] = {}
        start, end, is_damaged = first, first, False
        # What a power loss left of a journal after its segment was whole is of no use.
        is_sealed = any(begin == first and not span[-1] for begin, *span in self._spans)
        for item in journal.items:
            if isinstance(item, Damage):
                # The tail of a live journal is a record on its way.
                if is_sealed or (item.is_tail and is_live and is_last):
                    continue
                if item.is_cut_off and is_last:
                    log.unfinished.append(item)
                    continue
                log.damage.append(item)
                is_damaged = True
                continue
            start, end = min(start, item.sequence), item.sequence + 1
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
                table = Table(item.body["attributes"], arrays, dims)
                self._add_table(item.sequence, item.body["name"], table)
            else:
                numbers = {"kind": item.kind, "step": item.step, "sequence": item.sequence}
                self._add_event({**numbers, **item.body})
        stated = journal.scan.first_sequence
        if start < first or stated not in (None, first):
            start = start if stated is None else stated
            self._report_name(journal.name, start, end - 1)
        self._spans.append((start, end, journal.name, is_damaged))
        for key, part in parts.items():
            log.parts.setdefault(key, []).append(part)

    def missing(self) -> set[Damage]:
        """Return what is missing between the files."""
        found = set()
        expected, may_be_missing = 0, False
        for first, end, name, is_damaged in sorted(self._spans):
            # Frames behind damage were reported with it.
            if first > expected and not may_be_missing:
                reason = f"frames {expected} to {first - 1} are missing: a file was lost"
                found.add(Damage(name, 0, 0, f"{reason} before this one"))
            if end >= expected:
                expected, may_be_missing = end, is_damaged
        return found

    def finish(self) -> WriterLog:
        """Return the whole, in the order in which it was written."""
        log = self._log
        log.damage = list(dict.fromkeys([*log.damage, *sorted(self.missing(), key=str)]))
        log.tables = {name: table for name, (_, table) in self._tables.items()}
        log.events.sort(key=lambda event: int(event["sequence"]))
        for parts in log.parts.values():
            parts.sort(key=lambda part: part.records[0].sequence)
        by_first = sorted(log.parts.items(), key=lambda item: item[1][0].records[0].sequence)
        log.parts = dict(by_first)
        return log

    def _is_here(self, file: _OpenSegment | _OpenJournal) -> bool:
        said = file.attempt.get("attempt"), file.attempt.get("rank")
        return not file.attempt or said == (self._log.attempt, self._log.rank)

    def _refuse(self, file: _OpenSegment | _OpenJournal) -> Damage | None:
        """Say why a file is not of this writer, if it is not."""
        if not self._is_here(file):
            attempt, rank = file.attempt.get("attempt"), file.attempt.get("rank")
            reason = f"it belongs into another folder: it is of attempt {attempt}, rank {rank}"
        elif file.token not in (None, self._token):
            reason = "it was written by another process than the other files of the folder"
        else:
            return None
        return Damage(file.name, 0, file.num_bytes, reason)

    def _leave_out(self, damage: Damage, first: int, end: int) -> None:
        self._log.damage.append(damage)
        self._spans.append((first, end, damage.path, True))

    def _report_name(self, name: str, first: int, last: int) -> None:
        reason = f"it holds frames {first} to {last}, others than its name states"
        self._log.damage.append(Damage(name, 0, 0, reason))

    def _add_event(self, item: dict[str, Any]) -> None:
        if item["kind"] != "attempt":
            self._log.events.append(item)
        elif item["sequence"] >= self._log.about.get("sequence", 0):
            self._log.about = {key: item[key] for key in item if key != "token"}

    def _add_table(self, sequence: int, name: str, table: Table) -> None:
        if sequence >= self._tables.get(name, (0, table))[0]:
            self._tables[name] = (sequence, table)
