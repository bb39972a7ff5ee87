"""Names of arrays: what HDF5 cannot hold is escaped, and none are alike."""

from __future__ import annotations

import pytest

from sonde.log.format.names import link_name, stream_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layer1.0.conv", "layer1.0.conv"),
        ("", "%"),
        (".", "%2E"),
        ("..", "%2E%2E"),
        ("a/b:c%d", "a%2Fb%3Ac%25d"),
        ("\0\n", "%00%0A"),
        ("größe", "größe"),
    ],
)
def test_link_name_escapes_what_hdf5_cannot_hold(name: str, expected: str) -> None:
    assert link_name(name) == expected


def test_stream_names_of_different_streams_differ() -> None:
    parts = ["", ".", "a", "a:b", "b", ":", "%", "%3A", "a/b"]
    keys = [(layer, field) for layer in (None, *parts) for field in parts]
    assert len({stream_name(*key) for key in keys}) == len(keys)
