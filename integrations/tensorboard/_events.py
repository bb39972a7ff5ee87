"""Write event files: the record file TensorBoard reads, with its own message types.

Only the package `tensorboard` is needed. Its `EventFileWriter` would choose the file name and write
in a thread; here the file is complete before it gets its name, so that a TensorBoard that watches
the folder never sees half of it, and an export that fails leaves the one before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sonde.exceptions import SondeError

_SUFFIX = ".sonde"


@dataclass(frozen=True)
class EventWriter:
    """Adds values to one event file.

    Attributes:
        add: Writes one event, given as keyword arguments of TensorBoard's `Event`.
    """

    add: Callable[..., None]

    def scalar(self, tag: str, value: float, step: int, seconds: float) -> None:
        """Add a number; `seconds` is when it was recorded, since 1970."""
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb  # type: ignore[import-untyped]  # ships no types

        self.add(summary=scalar_pb(tag, value), step=step, wall_time=seconds)

    def image(self, tag: str, png: bytes, size: tuple[int, int], step: int, seconds: float) -> None:
        """Add a picture, encoded as PNG, of the given width and height in pixels."""
        from tensorboard.compat.proto import summary_pb2, tensor_pb2, types_pb2  # type: ignore[import-untyped]  # ships no types
        from tensorboard.plugins.image.metadata import create_summary_metadata  # type: ignore[import-untyped]  # ships no types

        # The images plugin reads a list of strings: width, height, then one PNG per picture.
        strings = [str(length).encode() for length in size] + [png]
        tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=strings)
        tensor.tensor_shape.dim.add(size=len(strings))
        metadata = create_summary_metadata(display_name=None, description=None)
        metadata.data_class = summary_pb2.DATA_CLASS_BLOB_SEQUENCE
        summary = summary_pb2.Summary()
        summary.value.add(tag=tag, metadata=metadata, tensor=tensor)
        self.add(summary=summary, step=step, wall_time=seconds)


@contextmanager
def event_file(folder: Path) -> Iterator[EventWriter]:
    """Write an event file into a folder, in place of the ones written there before.

    Args:
        folder: Where it goes; created if it is not there. Event files of others stay.

    Yields:
        The writer; the file gets its name when the body ends without an error.

    Raises:
        SondeError: If tensorboard is not installed.
        OSError: If the file cannot be written.
    """
    event_pb2, record_writer = _import_tensorboard()
    folder.mkdir(parents=True, exist_ok=True)
    older = sorted(folder.glob(f"events.out.tfevents.*{_SUFFIX}"))
    now = time.time_ns()
    # TensorBoard reads files in the order of their names.
    path = folder / f"events.out.tfevents.{now // 10**9:010d}.{now % 10**9:09d}{_SUFFIX}"
    temporary = folder / f".{path.name}".replace("tfevents", "partial")
    try:
        with temporary.open("wb") as file:
            records = record_writer.RecordWriter(file)

            def add(**content: Any) -> None:  # Any: fields of a protocol buffer message.
                records.write(event_pb2.Event(**content).SerializeToString())

            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            add(wall_time=now / 1e9, file_version="brain.Event:2")
            # A TensorBoard that is open drops what it had of this folder.
            add(wall_time=now / 1e9, step=0, session_log=start)
            yield EventWriter(add)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for file_before in older:
        file_before.unlink(missing_ok=True)


def _import_tensorboard() -> tuple[Any, Any]:  # Any: modules without types.
    try:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer import record_writer  # type: ignore[import-untyped]  # ships no types
    except ImportError as error:
        raise SondeError(
            "the export needs the package tensorboard, which is not installed; "
            'install it: pip install "sonde[tensorboard]"'
        ) from error
    return event_pb2, record_writer
