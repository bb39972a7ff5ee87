"""The one limit of time in the tests: it ends what hangs, and never judges what is slow."""

LIMIT_SECONDS = 900
"""Far more than anything takes on a machine that is busy with other work."""
