"""Forcing to the disk what was appended, so that it survives a power loss."""

from __future__ import annotations

import threading
from pathlib import Path

from sonde.log.format.files import sync_file, sync_folder


class Forcing:
    """Forces the journals of one writer to the disk, never on the thread that appends.

    Args:
        folder: The writer's folder.
        every_record: Force by itself, on a thread of its own, whenever something was appended;
            what was appended while the disk worked is forced together.
    """

    def __init__(self, folder: Path, *, every_record: bool) -> None:
        self.problem: str | None = None
        self._folder = folder
        self._unforced: dict[Path, None] = {}
        self._known: set[Path] = set()
        self._has_forced_name = False
        self._num_appended = 0
        self._num_forced = 0
        self._is_closing = False
        self._is_forcing = threading.Lock()
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        if every_record:
            self._thread = threading.Thread(target=self._run, name="sonde-log-sync", daemon=True)
            self._thread.start()

    def appended(self, path: Path) -> None:
        """Take note that a journal has grown."""
        with self._condition:
            self._unforced[path] = None
            self._num_appended += 1
            self._condition.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything appended is forced, where that happens by itself.

        Returns:
            False if `timeout` seconds did not suffice.
        """
        if self._thread is None:
            return True
        with self._condition:
            return self._condition.wait_for(
                lambda: self._num_forced == self._num_appended or self._is_closing, timeout
            )

    def force(self) -> None:
        """Force everything appended so far; a failure becomes the `problem`."""
        with self._is_forcing:
            with self._condition:
                paths = list(self._unforced)
                self._unforced.clear()
            if paths and not self._folder.exists():
                # The journal goes on where it is now; sealing it forces it there.
                self.problem = (
                    f"{self._folder} was moved or deleted: what is recorded is safe from the end "
                    "of the process, not of the machine, until it is sealed"
                )
                return
            try:
                for path in paths:
                    sync_file(path)  # It may be sealed, which forced it, and gone.
                if not self._known.issuperset(paths):
                    sync_folder(self._folder)
                if not self._has_forced_name:
                    sync_folder(self._folder.parent)
                    self._has_forced_name = True
            except OSError as error:
                self.problem = f"{self._folder} could not be forced to the disk: {error}"
                with self._condition:
                    self._unforced |= dict.fromkeys(paths)
                return
            self._known = set(paths)

    def close(self) -> None:
        """Stop forcing by itself, once everything appended is forced."""
        with self._condition:
            self._is_closing = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._num_appended > self._num_forced or self._is_closing
                )
                if self._num_appended == self._num_forced:
                    return
                num_appended = self._num_appended
            self.force()
            with self._condition:
                self._num_forced = num_appended
                self._condition.notify_all()
