"""Writing what measures recorded: arrays, what is missing, and one warning of each trouble."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from sonde.exceptions import SondeWarning
from sonde.hooks.measures.base import Measure
from sonde.hooks.record import Recording
from sonde.hooks.stores.host_copies import wait_for_copies
from sonde.log import LogWriter
from sonde.visible import visible_lines


class RecordLog:
    """Writes records, and says what there is to say once.

    Args:
        writer: The log.
        is_start_stated: The log says already at which step this attempt starts.

    Attributes:
        writer: The same.
        num_records: The number of records written.
        num_bytes: The bytes of their arrays.
    """

    def __init__(self, writer: LogWriter, *, is_start_stated: bool = True) -> None:
        self.writer = writer
        self._is_start_stated = is_start_stated
        self.num_records = 0
        self.num_bytes = 0
        self._facts: dict[tuple[str, str, str], Any] = {}
        self._warned: set[str] = set()

    def resume_at(self, step: int) -> None:
        """State that this attempt goes on at a step; earlier attempts count up to it."""
        self._is_start_stated = True
        self.writer.resume_at(step)

    def state_start(self) -> None:
        """State, unless something else was stated, that this attempt starts at step 0."""
        if not self._is_start_stated:
            self.resume_at(0)

    def write(self, measure: Measure, recording: Recording, step: int) -> None:
        """Write what a measure recorded at a step."""
        for event, facts in recording.notes.items():
            if self._is_news(measure, event, facts):
                self.note(event, step, measure=measure.name, source=measure.source, **facts)
        news = {
            name: reason
            for name, reason in recording.missing.items()
            if self._is_news(measure, f"missing {name}", reason)
        }
        for name, reason in news.items():
            about = {"measure": measure.name, "source": measure.source}
            self.note("missing", step, **about, name=name, reason=reason)
        if news:
            listed = "; ".join(f"{name}: {reason}" for name, reason in list(news.items())[:5])
            more = f"; and {len(news) - 5} more" if len(news) > 5 else ""
            self.warn(f"{measure.name} of '{measure.source}' lacks {listed}{more}")
        for kind, message in recording.warnings.items():
            once = f"{measure.name} of '{measure.source}' {kind}"
            if not self.has_warned(once):
                self.note(kind, step, measure=measure.name, source=measure.source, reason=message)
                self.warn(f"{measure.name} of '{measure.source}' at step {step}: {message}", once)
        if recording.arrays:
            wait_for_copies()
            self.num_records += 1
            self.num_bytes += sum(array.values.nbytes for array in recording.arrays)
            self.writer.append(
                measure.name, measure.source, step, recording.arrays, recording.attributes
            )

    def note(self, event: str, step: int, **facts: Any) -> None:
        """Note something that happened at a step."""
        self.writer.note(event, step, **facts)

    def has_warned(self, message: str) -> bool:
        """Tell whether a message, or what tells messages of its kind, was warned of."""
        return message in self._warned

    def warn(self, message: str, once: str | None = None) -> None:
        """Warn, unless that was done; raise nothing.

        Args:
            message: What of.
            once: What tells messages of the same kind; None is the message itself.
        """
        if (once or message) in self._warned:
            return
        self._warned.add(once or message)
        try:
            warnings.warn(f"sonde: {message}", SondeWarning, stacklevel=2)
        except SondeWarning:
            # The user turns warnings into errors; ours must not end the training.
            print(f"sonde: {visible_lines(message)}", file=sys.stderr)

    def warn_of_trouble(self) -> None:
        """Warn of what keeps records from being written."""
        if self.writer.problem is not None:
            self.warn(self.writer.problem, once="writer")

    def _is_news(self, measure: Measure, what: str, facts: Any) -> bool:
        key = (measure.name, measure.source, what)
        if self._facts.get(key) == facts:
            return False
        self._facts[key] = facts
        return True
