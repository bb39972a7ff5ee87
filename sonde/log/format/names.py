"""Names of arrays, in a segment and in xarray."""

from __future__ import annotations


def link_name(name: str) -> str:
    """Make a link name of any string.

    HDF5 forbids `/`, gives `.` a meaning of its own, and takes only what UTF-8 can encode.
    """
    kept = "".join(
        f"%{ord(char):02X}" if char in "%/:" or char < " " or "\ud800" <= char < "\ue000" else char
        for char in name
    )
    return {"": "%", ".": "%2E", "..": "%2E%2E"}.get(kept, kept)


def stream_name(layer: str | None, field: str) -> str:
    """Name a stream, in a segment and in xarray: `layer:field`, or `field` without a layer."""
    return link_name(field) if layer is None else f"{link_name(layer)}:{link_name(field)}"
