"""Closing what is still open when a training process ends, however it ends."""

from __future__ import annotations

import atexit
import builtins
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Protocol

from sonde.log.format.endings import why_ended

# How long a process that was told to terminate may take to write what is queued.
_TERMINATION_SECONDS = 5.0


class Closable(Protocol):
    """Something that writes a run and has to be closed."""

    path: Path

    def close(self, reason: str = "closed", timeout: float | None = None) -> None:
        """Write what is queued and close."""


# Strong references: what nobody else holds any more has to be closed all the same.
_open: dict[int, Closable] = {}
_pid = os.getpid()


def register(closable: Closable) -> None:
    """Close something at interpreter exit, and at SIGTERM where nobody handles that signal."""
    global _pid
    if os.getpid() != _pid:  # What a forked child inherits is its parent's to close.
        _open.clear()
        _pid = os.getpid()
    if not _open:
        atexit.unregister(_close_at_exit)
        atexit.register(_close_at_exit)
    _open[id(closable)] = closable
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_termination)


def forget(closable: Closable) -> None:
    """Stop caring for something that was closed."""
    _open.pop(id(closable), None)
    if _open:
        return
    atexit.unregister(_close_at_exit)
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) is _on_termination:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def still_open() -> list[Closable]:
    """Return what was registered and not closed yet."""
    return list(_open.values())


def _close_at_exit() -> None:
    """Close, and say of which exception the process ends, if it does."""
    error = getattr(sys, "last_value", None)
    # An interactive session has shown that of any earlier line, and went on.
    is_interactive = hasattr(sys, "ps1") or hasattr(builtins, "__IPYTHON__")
    _close_all("exit" if error is None or is_interactive else why_ended(error), None)


def _close_all(reason: str, timeout: float | None) -> None:
    if os.getpid() != _pid:
        return
    for closable in still_open():
        closable.close(reason, timeout)


def _on_termination(number: int, frame: FrameType | None) -> None:
    """Close, then die of the signal as the process would have without us."""
    try:
        _close_all("SIGTERM", _TERMINATION_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
