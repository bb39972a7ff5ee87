"""How the commands speak: help texts, errors and warnings in a line, tables, progress, units."""

from __future__ import annotations

import inspect
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import typer
from typer.core import TyperGroup

from sonde.exceptions import SondeError
from sonde.visible import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_Item = TypeVar("_Item")

PIPED_WIDTH = 120

LINE_LENGTH = 20_000
"""How many characters of a line are shown."""

CELL_LENGTH = 400
"""How many characters of a cell are shown."""

_FOLDED_WIDTH = 20


class Group(TyperGroup):
    """A group of commands whose errors are one line on stderr and exit status 1."""

    def invoke(self, ctx: Any) -> Any:  # Any: typer's context is click's, or its own copy of it.
        """Run the command that was named.

        Raises:
            BrokenPipeError: For click, which ends the program quietly.
            Exit: With status 1, after an error was told.
        """
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except BrokenPipeError:  # Whoever read the output has enough: no error of ours.
                raise
            except (SondeError, OSError) as error:
                say(f"sonde: {_one_line(error)}", err=True)
                raise typer.Exit(1) from None


def help_of(function: Callable[..., object]) -> str:
    r"""Make the help text of a command from its docstring.

    Paragraphs are wrapped by the terminal; an `Examples:` section keeps its lines, which takes the
    mark `\b`.
    """
    text, _, examples = (inspect.getdoc(function) or "").partition("\nExamples:\n")
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    body = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    # A bracket would start markup.
    lines = "\n".join(f"  $ {line.strip()}" for line in examples.strip().splitlines())
    return f"{body}\n\n\b\nExamples:\n{lines}".replace("[", "\\[")


def console() -> Console:
    """Return the console of the results: without colours and wide enough when it is a pipe."""
    is_fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    return _console_type()(
        width=None if is_fixed else PIPED_WIDTH, highlight=False, markup=False, emoji=False
    )


@lru_cache(maxsize=1)
def _console_type() -> type[Console]:
    from rich.console import Console
    from rich.text import Text

    class VisibleConsole(Console):
        """A console to which no text gets through that commands the terminal."""

        def print(self, *objects: Any, **options: Any) -> None:  # Any: as its parent has it.
            """Print texts and tables; texts so that every character can be seen."""
            shown = [_line(item) if isinstance(item, str) else item for item in objects]
            for item in shown:
                if isinstance(item, Text):
                    item.plain = _line(item.plain)
            super().print(*shown, **options)

    return VisibleConsole


def say(text: object, *, err: bool = False) -> None:
    """Print a text in which every character can be seen.

    Args:
        text: The text.
        err: Print it on stderr.
    """
    typer.echo(_line(text), err=err)


def _line(text: object) -> str:
    return visible(text, LINE_LENGTH)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    right: Sequence[str] = (),
    title: str | None = None,
) -> Table:
    """Return a table whose cells are folded between words, and inside a word only where they must.

    Args:
        columns: Their names.
        rows: A cell per column.
        right: The columns that are aligned at the right, as numbers are.
        title: What stands above.
    """
    from rich import box
    from rich.table import Table

    cells = [[_cell(cell) for cell in row] for row in rows]
    columns = [visible(name) for name in columns]
    made = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=None if title is None else visible(title),
        title_justify="left",
        title_style="bold",
        header_style="bold",
    )
    right = [visible(name) for name in right]
    widths = _column_widths(columns, cells, right, console().width)
    for name, width in zip(columns, widths, strict=True):
        justify: Literal["left", "right"] = "right" if name in right else "left"
        made.add_column(name, justify=justify, width=width, overflow="fold")
    for row in cells:
        made.add_row(*row)
    return made


def _cell(cell: str | Text) -> str | Text:
    if isinstance(cell, str):
        return visible(cell, CELL_LENGTH)
    cell.plain = visible(cell.plain, CELL_LENGTH)
    return cell


def _column_widths(
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    right: Sequence[str],
    available: int,
) -> list[int]:
    """Share the width among columns: numbers and words stay whole as long as that is possible.

    Rich would take from the widest columns first, and cut off what lies beyond the last.
    """
    widths, least = [], []
    for index, name in enumerate(columns):
        texts = [str(row[index]) for row in rows]
        words = [word for text in (texts if name not in right else []) for word in text.split()]
        numbers = texts if name in right else []
        longest_word = max(map(len, [*name.split(), *words, *numbers]), default=1)
        least.append(longest_word if name in right else min(longest_word, _FOLDED_WIDTH))
        widths.append(max(map(len, [name, *texts])))
    available -= 2 * (len(columns) - 1)
    for smallest in (least, [4] * len(columns)):
        while sum(widths) > available:
            slack = [max(0, width - low) for width, low in zip(widths, smallest, strict=True)]
            if not any(slack):
                break
            widths[slack.index(max(slack))] -= 1
    return widths


@contextmanager
def working(text: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Show a progress bar on stderr, if that is a terminal, while the body runs.

    Args:
        text: What is being done.
        total: How many parts it has, if that is known.

    Yields:
        A function that says which part starts now.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        text = visible(text)
        task = bar.add_task(text, total=total)
        num_started = 0

        def start(part: str) -> None:
            nonlocal num_started
            bar.update(task, description=f"{text}: {visible(part)}", completed=num_started)
            num_started += 1

        yield start


def thinned(items: Sequence[_Item], limit: int) -> list[_Item]:
    """Return at most `limit` (>= 2) items, evenly spaced, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(at * (len(items) - 1) / (limit - 1))] for at in range(limit)]


def plural(count: int, noun: str) -> str:
    """Write a count and its noun: `1 layer`, `3 layers`."""
    ending = "ies" if noun.endswith("y") and count != 1 else "" if count == 1 else "s"
    return f"{count} {noun.removesuffix('y') if ending == 'ies' else noun}{ending}"


def steps_text(steps: Sequence[int], *, every: bool = False) -> str:
    """Write steps as their span, with the distance where it is constant; all of them if `every`."""
    if every or len(steps) < 3:
        return ", ".join(str(step) for step in steps) or "–"
    distances = {later - earlier for earlier, later in pairwise(steps)}
    rhythm = f", every {distances.pop()}" if len(distances) == 1 else ""
    return f"{steps[0]} to {steps[-1]}{rhythm}"


def time_text(when: str | None) -> str:
    """Write a time in ISO form as local time, to the minute."""
    if when is None:
        return "–"
    try:
        return datetime.fromisoformat(when).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return when


def age_text(when: str | None) -> str:
    """Write how long ago a time in ISO form was: `5 min ago`."""
    if when is None:
        return "–"
    seconds = time.time() - datetime.fromisoformat(when).timestamp()
    if seconds < 60:
        return "just now"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min ago"
    return f"{minutes // 60} h ago" if minutes < 48 * 60 else f"{minutes // 1440} d ago"


def iso_time(timestamp: float) -> str:
    """Write a time in seconds since 1970 in ISO form, in UTC."""
    return datetime.fromtimestamp(timestamp, timezone.utc).isoformat(timespec="seconds")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(f"sonde: warning: {_one_line(message)}", err=True)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
