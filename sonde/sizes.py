"""Sizes in bytes, as people read them."""

from __future__ import annotations


def size_text(num_bytes: float) -> str:
    """Write a size with its unit: `1.2 MiB`."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024:
            break
        num_bytes, unit = num_bytes / 1024, larger
    return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
