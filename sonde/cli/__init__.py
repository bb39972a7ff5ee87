"""The command line `sonde`."""

from .commands import app, main

__all__ = ["app", "main"]
