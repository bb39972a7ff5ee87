"""Frames: the bytes of a journal."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from sonde.exceptions import FormatError
from sonde.log import LogArray, open_run
from sonde.log.format.frames import encode_index
from sonde.log.format.payload import fill_payload, lay_out
from sonde.log.writing.journal import Journal

from .conftest import write_records


def test_journal_has_the_documented_bytes(tmp_path: Path) -> None:
    arrays = [
        LogArray("loss", np.array([1.5, 2.5], np.float32), ("axis",), "fc"),
        LogArray("ok", np.array([True, False, True]), ("axis",)),
    ]
    layout = lay_out(arrays)
    payload = np.empty(layout.num_bytes, np.uint8)
    fill_payload(payload, layout, arrays)
    journal = Journal(tmp_path, 7, token=0xABCD)
    journal.append(
        encode_index("record", {"measure": "m"}, layout), layout, [payload.data], step=12
    )
    journal.close()

    head = b"SONDEJNL" + struct.pack("<IIQQI", 1, 0, 0xABCD, 7, 0)
    index = (
        b'{"kind":"record","measure":"m"}\n'
        b'[["fc","loss","float32",[2],["axis"],0],[null,"ok","bool",[3],["axis"],8]]'
    )
    index += b" " * (-len(index) % 8)
    values = struct.pack("<2f", 1.5, 2.5)
    flags = bytes([1, 0, 1, 0, 0, 0, 0, 0])
    fixed = b"\x93SONDE\r\n" + struct.pack("<IIQQQqI", len(index), 2, 0xABCD, 16, 7, 12, 0)
    rest = index + struct.pack("<II", zlib.crc32(values), zlib.crc32(flags))
    frame = fixed + struct.pack("<I", zlib.crc32(fixed + rest)) + rest + values + flags
    expected = head + struct.pack("<I", zlib.crc32(head)) + frame
    assert (tmp_path / "000000000007.journal").read_bytes() == expected


def test_journal_of_a_newer_format_is_refused(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as newer:
        newer.setattr("sonde.log.format.frames.FORMAT_VERSION", 2)
        write_records(run_path, [0])
    with pytest.raises(
        FormatError, match=r"journal has log format 2; this sonde reads up to 1\. Install a newer"
    ):
        open_run(run_path)
