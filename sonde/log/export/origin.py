"""The run that is exported, as it is read while it may still be recorded and sealed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from sonde.exceptions import DamageError, FormatError
from sonde.log.reading.parts import Record, StreamKey
from sonde.log.reading.ranks import join

if TYPE_CHECKING:
    from sonde.log.run import Run

Writer = tuple[int, int]
"""A writer is named by its attempt and its rank."""

Address = tuple[int, int, str, str, int]
"""A record is named by attempt, rank, measure, source, and its number in the order of writing."""


@dataclass
class TableContent:
    """The tables of one source as one writer has them, read.

    Attributes:
        attributes: What else they say of themselves.
        arrays: By field; the reason in place of an array that cannot be read.
        dims: One name per axis of each array, by field.
    """

    attributes: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any] | str]
    dims: dict[str, tuple[str, ...]]

    @property
    def readable(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays that could be read."""
        return {name: a for name, a in self.arrays.items() if not isinstance(a, str)}


class Origin:
    """The run that is exported, as it is at first.

    Where journals are sealed meanwhile, their records are found again in the segments.

    Args:
        run: The run.

    Attributes:
        path: Where it is.
        writers: What the run holds, by attempt and rank.
        ranks: The ranks that wrote.
        joined: The records that a reader of the run sees.
        of_rank: The records that a reader of each rank sees.
    """

    def __init__(self, run: Run) -> None:
        self.path = run.path
        self._run = run
        self._tables: dict[tuple[Writer, str], TableContent] = {}
        self._list()
        self._retry(self._look)

    def record(self, address: Address) -> Record:
        """Return a record as it stands in the files now.

        Raises:
            FormatError: If it is gone.
        """
        found = self._records.get(address)
        if found is None:
            raise FormatError(f"{self.path} was recorded anew while it was exported")
        return found

    def read(
        self, addresses: Sequence[Address], key: StreamKey
    ) -> list[npt.NDArray[Any] | DamageError]:
        """Read a stream of several records, with the error in place of what is damaged.

        Raises:
            FormatError: If a record is gone.
            OSError: If a file cannot be read.
        """
        found: list[npt.NDArray[Any] | DamageError]
        found = self._retry(lambda: list(self._read(addresses, key)))
        return found

    def tables(self, writer: Writer, source: str) -> TableContent | None:
        """Read the tables of a source as a writer has them; None if it has none.

        Raises:
            OSError: If a file cannot be read.
        """
        if source not in self.writers[writer].tables:
            return None
        if (writer, source) not in self._tables:
            content = self._retry(lambda: self._read_tables(writer, source))
            self._tables[writer, source] = content
        return self._tables[writer, source]

    def _look(self) -> None:
        self.writers = self._current
        self.ranks = sorted({rank for _, rank in self.writers})
        logs = list(self.writers.values())
        self.joined = join(logs)
        self.of_rank = {rank: join(logs, rank) for rank in self.ranks}

    def _list(self) -> None:
        """List what the files hold now."""
        self._num_refreshed = self._run.num_refreshed
        self._current = {(log.attempt, log.rank): log for log in self._run._writers}
        self._records: dict[Address, Record] = {
            (*writer, *key, record.sequence): record
            for writer, log in self._current.items()
            for key, parts in log.parts.items()
            for part in parts
            for record in part.records
        }

    def _retry(self, read: Callable[[], Any]) -> Any:  # Any: whatever is read.
        def read_listed() -> Any:
            if self._run.num_refreshed != self._num_refreshed:
                self._list()
            return read()

        return self._run.retry(read_listed)

    def _read(
        self, addresses: Sequence[Address], key: StreamKey
    ) -> Iterator[npt.NDArray[Any] | DamageError]:
        records = [self.record(address) for address in addresses]
        for part, group in groupby(records, attrgetter("part")):
            rows = [record.row for record in group]
            try:
                yield from list(part.read_many(rows, key))
            except DamageError:
                for row in rows:
                    try:
                        yield part.read(row, key)
                    except DamageError as error:
                        yield error

    def _read_tables(self, writer: Writer, source: str) -> TableContent:
        table = self._current[writer].tables[source]
        arrays: dict[str, npt.NDArray[Any] | str] = {}
        for name, read in table.arrays.items():
            try:
                arrays[name] = read()
            except DamageError as error:
                arrays[name] = str(error)
        return TableContent(table.attributes, arrays, dict(table.dims))
