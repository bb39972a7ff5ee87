"""Runs that somebody made up: values replaced in them, and all checksums made to fit again.

What is damaged by chance does not match its checksum. Here every checksum matches, so the values
themselves are what a reader meets.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng.zlib_ng import crc32

from sonde.log import LogArray, LogWriter, open_run
from sonde.log.export import export_run
from sonde.log.format.files import RUN_FILE, write_run_file
from sonde.log.reading.export_file import encode_trailer as encode_export_trailer
from sonde.log.reading.export_file import read_metadata
from sonde.log.reading.segment import Segment, encode_trailer
from sonde.log.reading.segment_file import checksum_between, identify
from sonde.log.sealing.seal import seal_run

from .files import frame_bounds, journal_of, segment_of

_FIXED = struct.Struct("<8sIIQQQqII")
_FILE_HEADER = struct.Struct("<8sIIQQII")
TRAILER = struct.Struct("<8sIIQQIQII")
_DEEP = "@deep@"
_ABSENT = object()

# Any, in this file: JSON values.

VALUES: list[Any] = [
    _ABSENT, None, True, 0, 1, -1, 2**31, 10**12, 2**63 - 1, 2**63, -(2**63), 10**400, 1.5,
    float("nan"), float("inf"), "", "\x1b[2J\x1b]0;owned\x07\n\ud800$\\frac", "x" * 100_000, [],
    [1, 2, 3], [[1]], [-1], [2**40, 2**40], {}, {"a": {"b": 1}}, "float128", "float64", _DEEP,
]  # fmt: skip
"""More than twenty kinds of values, each to stand in the place of any other."""
_NUMBERS = [0, 1, 7, 8, 2**16, 2**31, 2**32 - 1, 10**11, 10**12, 2**62, 2**63 - 1, 2**64 - 1]


@dataclass(frozen=True)
class Case:
    """One change of a run.

    Attributes:
        what: What is changed.
        file: The file, relative to the run; "" is an exported run itself.
        content: Returns what the file then holds.
    """

    what: str
    file: str
    content: Callable[[], bytes]


def write_origin(path: Path) -> None:
    """Write a small run with most of what there is."""
    path.mkdir()
    write_run_file(
        path,
        {
            "name": "origin",
            "created": "2026-01-02T03:04:05+00:00",
            "environment": {"python": "3.11", "packages": {"torch": "2"}, "devices": ["cpu"]},
            "model": {"class": "Net", "num_parameters": 12, "layers": {"fc": "Linear"}},
            "measures": [{"measure": "activations", "source": "probe", "store": "Gram()"}],
            "probes": {"probe": {"id_digest": "00ff", "num_examples": 6}},
            "config": {"seed": 0},
        },
    )
    rng = np.random.default_rng(0)
    writer = LogWriter(path, seal=False, about={"world_size": 1, "resume_step": 0})
    ids = LogArray("id", np.arange(6), ("example",))
    writer.add_table("probe", [ids, LogArray("target", np.arange(6) % 2, ("example",))])
    pairs = ("example", "other_example")
    for step in (0, 10, 20):
        rows = rng.normal(size=(6, 4)).astype("f4")
        products = rows @ rows.T
        arrays = [LogArray("gram", products, pairs, name) for name in ("fc", "conv.1")]
        arrays.append(LogArray("gram_offset", rng.normal(size=6), ("example",), "fc"))
        arrays.append(LogArray("full", np.zeros((6, 700), "f4"), ("example", "feature"), "wide"))
        writer.append("activations", "probe", step, arrays, {"reference": "mean", "nested": [1]})
        total = LogArray("gram_total", products, pairs)
        writer.append("example_gradients", "probe", step, [total, arrays[0]], {})
        logits = LogArray("logits", rows[:, :2].copy(), ("example", "class"))
        writer.append("predictions", "probe", step, [logits])
        ragged = LogArray("norm", rows[: 1 + step // 10, 0].copy(), ("n",))
        writer.append("scalars", "training", step, [LogArray("loss", np.array(0.5), ()), ragged])
    writer.note("missing", 5, measure="activations", name="fc9", reason="never called")
    writer.note("layers", 0, measure="activations", feature_shapes={"fc": [4]})
    writer.note("coverage", 0, measure="example_gradients", parameters={"fc.bias": "exact"})
    writer.note("disabled", 7, measure="margins", source="probe", reason="it failed")
    writer.close()


def paths_of(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield where every value within a value stands."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:3]
    for key, inner in items:
        yield (*at, key)
        yield from paths_of(inner, (*at, key))


def changed(value: Any, path: tuple[str | int, ...], new: Any) -> bytes:
    """Return JSON in which one value is another one."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if new is _ABSENT:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    text = json.dumps(copy)
    return text.replace(f'"{_DEEP}"', "[" * 100_000 + "]" * 100_000).encode()


def cases_of_description(run: Path) -> Iterator[Case]:
    """Yield changes of `run.json`."""
    described = json.loads((run / RUN_FILE).read_text())
    del described["crc32"]
    for path in paths_of(described):
        for new in VALUES:

            def content(path: tuple[str | int, ...] = path, new: Any = new) -> bytes:
                text = changed(described, path, new)
                try:
                    checksum = crc32(json.dumps(json.loads(text), sort_keys=True).encode())
                except RecursionError:
                    checksum = 0
                return text[:-1] + b', "crc32": %d}' % checksum

            yield Case(f"run.json {path} = {_short(new)}", RUN_FILE, content)


def cases_of_journal(run: Path) -> Iterator[Case]:
    """Yield changes of the frames of a journal."""
    journal = journal_of(run)
    whole = journal.read_bytes()
    name = str(journal.relative_to(run))
    for column in (1, 3, 4):
        for number in _NUMBERS:

            def header(column: int = column, number: int = number) -> bytes:
                fields = list(_FILE_HEADER.unpack(whole[: _FILE_HEADER.size]))
                fields[column] = number % 2 ** (32 if column == 1 else 64)
                head = _FILE_HEADER.pack(*fields)[:-4]
                return head + struct.pack("<I", crc32(head)) + whole[_FILE_HEADER.size :]

            yield Case(f"journal header {column} = {number}", name, header)
    for order, (start, end) in enumerate(frame_bounds(journal)):
        fields = list(_FIXED.unpack(whole[start : start + _FIXED.size]))
        index_end = start + _FIXED.size + fields[1]
        lines = whole[start + _FIXED.size : index_end].split(b"\n")
        rest = whole[index_end:end]
        for column in (1, 2, 3, 4, 5, 6):
            for number in _NUMBERS:

                def frame(
                    column: int = column, number: int = number, start: int = start, end: int = end
                ) -> bytes:
                    fields = list(_FIXED.unpack(whole[start : start + _FIXED.size]))
                    bits = 32 if column < 3 else 63 if column == 6 else 64
                    fields[column] = number % 2**bits
                    table = whole[start + _FIXED.size :]
                    length = fields[1] + -(-4 * fields[2] // 8) * 8
                    head = _FIXED.pack(*fields)[:-4]
                    head += struct.pack("<I", crc32(table[:length], crc32(head)))
                    return whole[:start] + head + whole[start + _FIXED.size :]

                yield Case(f"frame {order} header {column} = {number}", name, frame)
        for line in (0, 1):
            value = json.loads(lines[line])
            for path in paths_of(value):
                for new in VALUES:

                    def index(
                        line: int = line,
                        path: tuple[str | int, ...] = path,
                        new: Any = new,
                        value: Any = value,
                        lines: list[bytes] = lines,
                        start: int = start,
                        end: int = end,
                        rest: bytes = rest,
                    ) -> bytes:
                        both = list(lines)
                        both[line] = changed(value, path, new)
                        encoded = b"\n".join(both)
                        encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
                        fields = list(_FIXED.unpack(whole[start : start + _FIXED.size]))
                        fields[1] = len(encoded)
                        table = rest[: -(-4 * fields[2] // 8) * 8]
                        head = _FIXED.pack(*fields)[:-4]
                        head += struct.pack("<I", crc32(encoded + table, crc32(head)))
                        return whole[:start] + head + encoded + rest + whole[end:]

                    yield Case(f"frame {order} line {line} {path} = {_short(new)}", name, index)


def cases_of_segment(run: Path) -> Iterator[Case]:
    """Yield changes of the metadata, the streams and the trailer of a segment."""
    path = segment_of(run)
    name, whole = str(path.relative_to(run)), path.read_bytes()
    segment = Segment(identify(path))
    stretches = [stretch for group in segment.groups for stretch in group.stretches()]
    _, _, _, at, size, *_ = TRAILER.unpack(whole[-TRAILER.size :])
    metadata = json.loads(whole[at : at + size])
    yield from _cases_of_metadata(whole, name, metadata, stretches, path, encode_trailer)
    for number, group in enumerate(metadata["groups"]):
        place = group["streams"]
        offset, length = place["offset"], place["shape"][0]
        streams = json.loads(whole[offset : offset + length])
        for where in paths_of(streams):
            for new in VALUES:

                def content(
                    where: tuple[str | int, ...] = where,
                    new: Any = new,
                    number: int = number,
                    streams: Any = streams,
                ) -> bytes:
                    encoded = changed(streams, where, new)
                    copy = json.loads(json.dumps(metadata))
                    copy["groups"][number]["streams"].update(
                        offset=len(whole) - TRAILER.size,
                        shape=[len(encoded)],
                        crc32=crc32(encoded),
                    )
                    body = whole[: -TRAILER.size] + encoded
                    return _closed(body, json.dumps(copy).encode(), stretches, path, encode_trailer)

                yield Case(f"segment streams {number} {where} = {_short(new)}", name, content)


def cases_of_export(path: Path) -> Iterator[Case]:
    """Yield changes of the metadata, the chunks and the trailer of an exported run."""
    whole = path.read_bytes()
    metadata = read_metadata(identify(path)).content
    place = metadata["chunks"]
    begin, count = place["offset"], place["shape"][0]
    chunks = np.frombuffer(whole, "<i8", 3 * count, begin).reshape(count, 3)
    stretches = [(offset, size) for offset, size, _ in chunks.tolist()]
    yield from _cases_of_metadata(whole, "", metadata, stretches, path, encode_export_trailer)
    for number, group in enumerate(metadata["groups"]):
        for column, stream in enumerate(group["streams"]):
            listed = stream["chunks"]
            if not listed["count"]:
                continue
            for part in (0, 1, 2):
                for new in (-1, 0, 1, 2**31, 2**62):

                    def content(
                        number: int = number,
                        column: int = column,
                        first: int = listed["first"],
                        count: int = listed["count"],
                        part: int = part,
                        new: int = new,
                    ) -> bytes:
                        table = chunks.copy()
                        table[first, part] = new
                        body = bytearray(whole[: -TRAILER.size])
                        body[begin : begin + table.nbytes] = table.tobytes()
                        copy = json.loads(json.dumps(metadata))
                        stream = copy["groups"][number]["streams"][column]
                        stream["chunks"]["crc32"] = crc32(table[first : first + count].tobytes())
                        encoded = json.dumps(copy).encode()
                        return _closed(bytes(body), encoded, stretches, path, encode_export_trailer)

                    yield Case(f"export chunk {number} {column} {part} = {new}", "", content)


def _cases_of_metadata(
    whole: bytes,
    name: str,
    metadata: Any,
    stretches: list[tuple[int, int]],
    path: Path,
    close: Callable[[int, bytes, int, int], bytes],
) -> Iterator[Case]:
    for where in paths_of(metadata):
        for new in VALUES:

            def content(where: tuple[str | int, ...] = where, new: Any = new) -> bytes:
                body = whole[: -TRAILER.size]
                return _closed(body, changed(metadata, where, new), stretches, path, close)

            yield Case(f"{path.name[-12:]} {where} = {_short(new)}", name, content)
    for column in (1, 3, 4, 5, 6, 7):
        for number in _NUMBERS:

            def trailer(column: int = column, number: int = number) -> bytes:
                fields = list(TRAILER.unpack(whole[-TRAILER.size :]))
                fields[column] = number % 2 ** (32 if column in (1, 5, 7) else 64)
                head = TRAILER.pack(*fields)[:-4]
                return whole[: -TRAILER.size] + head + struct.pack("<I", crc32(head))

            yield Case(f"{path.name[-12:]} trailer {column} = {number}", name, trailer)


def _closed(
    body: bytes,
    encoded: bytes,
    stretches: list[tuple[int, int]],
    path: Path,
    close: Callable[[int, bytes, int, int], bytes],
) -> bytes:
    """Append metadata to a file, and the trailer that fits."""
    whole = body + encoded
    scratch = path.with_name("body.tmp")
    scratch.write_bytes(whole)
    with scratch.open("rb") as file:
        checksum = checksum_between(file.fileno(), len(whole), stretches)
    scratch.unlink()
    return whole + close(len(body), encoded, len(whole), checksum)


def make_origins(root: Path) -> dict[str, Path]:
    """Write the run as a journal, as a segment, and as an exported file."""
    write_origin(root / "journal")
    write_origin(root / "segment")
    seal_run(root / "segment")
    for compression in ("gzip", "zstd"):
        export_run(open_run(root / "segment"), root / f"{compression}.h5", compression=compression)
    return {name: root / name for name in ("journal", "segment", "gzip.h5", "zstd.h5")}


def all_cases(origins: dict[str, Path]) -> dict[str, list[Case]]:
    """Return every change of every origin, in an order that is the same every time."""
    found = {
        "journal": [*cases_of_journal(origins["journal"])],
        "segment": [
            *cases_of_segment(origins["segment"]),
            *cases_of_description(origins["segment"]),
        ],
        "gzip.h5": list(cases_of_export(origins["gzip.h5"])),
        "zstd.h5": list(cases_of_export(origins["zstd.h5"])),
    }
    for name, cases in found.items():
        random.Random(name).shuffle(cases)
    return found


def _short(value: Any) -> str:
    return "absent" if value is _ABSENT else ascii(value)[:24]
