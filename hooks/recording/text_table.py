"""Lists that print as a table, in a terminal and in a notebook."""

from __future__ import annotations

import html
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

Item = TypeVar("Item")


class TextTable(Sequence[Item]):
    """A list whose items are rows of a table.

    Args:
        items: The items.
    """

    _columns: ClassVar[tuple[str, ...]]

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = list(items)

    def __getitem__(self, position: Any) -> Any:  # Any: an index gives an item, a slice a list.
        return self._items[position]

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        rows = [self._columns, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{column}</th>" for column in self._columns)
        rows = (
            "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) for cells in self._rows()
        )
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><tr>{head}</tr>{body}</table>"

    @abstractmethod
    def _rows(self) -> Iterator[tuple[str, ...]]:
        """Yield the cells of each item."""
