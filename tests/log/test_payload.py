"""The payload of a frame: where arrays lie in it, and which it takes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sonde.exceptions import InvalidInputError
from sonde.log import LogArray
from sonde.log.format.payload import check_arrays, fill_payload, lay_out


def test_arrays_start_at_multiples_of_eight_bytes() -> None:
    arrays = [LogArray(str(size), np.zeros(size, np.uint8), ("n",)) for size in (1, 0, 8, 9, 3)]
    layout = lay_out(arrays)
    assert [entry.offset for entry in layout.entries] == [0, 8, 8, 16, 32]
    assert layout.num_bytes == 40


def test_payload_holds_nothing_of_the_buffer_it_reuses() -> None:
    arrays = [LogArray("a", np.ones(3, np.uint8), ("n",)), LogArray("b", np.ones(1), ("n",))]
    layout = lay_out(arrays)
    payload = np.full(layout.num_bytes, 255, np.uint8)
    fill_payload(payload, layout, arrays)
    assert payload.tobytes() == b"\1\1\1" + bytes(5) + struct.pack("<d", 1)


@pytest.mark.parametrize("transform", [lambda a: a, lambda a: a.T, lambda a: a.astype(">f8")])
def test_payload_is_the_same_however_the_arrays_lie_in_memory(
    transform: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
) -> None:
    values = np.arange(12.0).reshape(3, 4)
    given = transform(values)
    arrays = [LogArray("a", given, ("n", "m")), LogArray("b", given, ("n", "m"))]
    layout = lay_out(arrays)
    payload = np.full(layout.num_bytes, 255, np.uint8)
    fill_payload(payload, layout, arrays)
    expected = np.ascontiguousarray(given).astype("<f8").tobytes()
    assert payload.tobytes() == 2 * expected


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            [LogArray("z", np.zeros(1, complex), ("n",), "fc")],
            r"array 'fc:z' has dtype complex128, which the log cannot store; convert it to one of: "
            r"bfloat16, bool, float16,",
        ),
        (
            [LogArray("z", np.zeros((2, 3)), ("n",))],
            r"array 'z' has shape \(2, 3\) but dims \('n',\); expected one name per axis",
        ),
        (
            [LogArray("z", np.zeros(1), ("n",), "fc")] * 2,
            r"array 'fc:z' is given twice in one record",
        ),
        (
            [LogArray("z", np.zeros(1), ("n",), dtype="bfloat16")],
            r"array 'z' is to be stored as bfloat16 but has dtype float64; expected uint16",
        ),
        (
            [LogArray("z", np.zeros(1), ("n",), dtype="float32")],
            r"array 'z' is to be stored as float32 but has dtype float64; expected float32",
        ),
    ],
)
def test_array_the_log_cannot_hold_is_refused(arrays: list[LogArray], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_arrays(arrays)
