"""Text of others, made safe to show: names in a log may come from anybody.

A name may hold characters that clear a terminal, set its title, or begin a new line that looks like
one of sonde's; and it may be longer than any screen.
"""

from __future__ import annotations

NAME_LENGTH = 120
"""How many characters of a name are shown."""

TEXT_LENGTH = 4000
"""How many characters of a message are shown."""


def visible(value: object, limit: int = NAME_LENGTH) -> str:
    r"""Return a text in one line whose every character can be seen, at most so many of them.

    Args:
        value: A name, or anything else that is shown as text.
        limit: How many characters are kept; of longer texts the beginning and the end.

    Returns:
        The text, with escapes as in Python's `repr` for what cannot be seen: `\x1b`, `\n`.

    Example:
        >>> visible("conv1\n\x1b[2J")
        'conv1\\n\\x1b[2J'
    """
    text = str(value)
    if len(text) > limit:
        end = limit // 4
        text = f"{text[: limit - end - 1]}…{text[-end:]}"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def visible_lines(value: object, limit: int = TEXT_LENGTH) -> str:
    """Return a text whose every character can be seen, and whose line breaks stay."""
    text = str(value)
    if len(text) <= limit and text.isprintable():
        return text
    return "\n".join(visible(line, limit) for line in text[: 2 * limit].split("\n"))


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
