"""Where a value stands in a configuration file, and the errors that say so."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sonde.exceptions import InvalidInputError, SondeError

# What YAML refers to over and over, such as a list of lists of itself, would fill any memory.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200


@dataclass(frozen=True)
class Place:
    """Where a value stands in a file.

    Attributes:
        file: The file.
        keys: The keys on the way to the value.
    """

    file: Path
    keys: str = ""

    def below(self, key: str | int) -> Place:
        """Return the place of an entry of the value."""
        if isinstance(key, int):
            return Place(self.file, f"{self.keys}[{key}]")
        return Place(self.file, f"{self.keys}.{key}" if self.keys else key)

    def error(self, problem: object) -> InvalidInputError:
        """Return an error that says where something is wrong."""
        return _PlacedError(": ".join([str(self.file), *filter(None, [self.keys]), str(problem)]))

    def unexpected(self, given: object, expected: str) -> InvalidInputError:
        """Return the error of a value of another kind than expected."""
        return self.error(f"got {_REPR.repr(given)}; expected {expected}")

    def unknown(self, name: object, known: Sequence[str], what: str) -> InvalidInputError:
        """Return the error of a name that is not known, with those that are near."""
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"near: {', '.join(near)}" if near else f"expected one of: {', '.join(known)}"
        return self.error(f"got {name!r}, which is no {what}; {hint}")

    @contextmanager
    def told(self) -> Iterator[None]:
        """Say in errors of what is called within where in the file their cause stands.

        Raises:
            InvalidInputError: In place of any `SondeError`.
        """
        try:
            yield
        except SondeError as error:
            raise error if isinstance(error, _PlacedError) else self.error(error) from error


class _PlacedError(InvalidInputError):
    """An error that says its place already."""
