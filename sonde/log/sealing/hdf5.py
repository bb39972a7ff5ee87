"""HDF5 the way sonde writes it: contiguous or chunked datasets whose axes have names.

Axes carry HDF5 dimension scales, so that h5py, xarray (engine h5netcdf) and `h5dump` show names.
The attributes that tie a dataset to its scales are written directly: libhdf5's own function
rewrites the list of references at every call, which takes seconds for a thousand datasets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from sonde.log.format.names import link_name
from sonde.log.format.payload import storage_dtype

_COORDINATES = {"example": "id", "other_example": "id"}
_TABLE_NAMES = frozenset("sequence presence crc32 streams offsets".split())
# Names of a group's own. No stream is called so, and none contains "::", which sets helpers apart.
RESERVED_NAMES = _TABLE_NAMES | frozenset("step stream axis element byte".split())
_REFERENCES = h5py.vlen_dtype(h5py.ref_dtype)
_BACK_REFERENCE = np.dtype([("dataset", h5py.ref_dtype), ("dimension", np.int32)])


class NamedGroup:
    """A group of an HDF5 file being written, whose datasets share dimension scales.

    Args:
        group: The group.
        coordinates: Arrays of the source, such as `id`, that become the values of a scale.
        reserved: Names that no stream may have.
    """

    def __init__(
        self,
        group: h5py.Group,
        coordinates: Mapping[str, npt.NDArray[Any]] | None = None,
        reserved: Set[str] = RESERVED_NAMES,
    ) -> None:
        self.group = group
        self._coordinates = coordinates or {}
        self._reserved = reserved
        self._scales: dict[tuple[str, int], h5py.Dataset] = {}
        self._references: dict[tuple[str, int], npt.NDArray[Any]] = {}
        self._attached: dict[tuple[str, int], list[tuple[h5py.Reference, int]]] = {}

    def free_name(self, label: str) -> str:
        """Return a name for the dataset of a stream; one that is taken gets a suffix."""
        return f"{label}::data" if label in self._reserved or label in self.group else label

    def add_scale(self, dim: str, values: npt.NDArray[Any]) -> None:
        """Write the values of a dimension."""
        self.group[dim] = values
        self.group[dim].make_scale(dim)
        self._scales[dim, len(values)] = self.group[dim]

    def create(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        dims: Sequence[str],
        creation: h5py.h5p.PropDCID,
    ) -> h5py.h5d.DatasetID:
        """Create a dataset, without writing it.

        Args:
            name: Its name.
            shape: Its shape.
            dtype: The element type.
            dims: One name per axis.
            creation: How it is stored.
        """
        space = h5py.h5s.create_simple(shape)
        dataset = h5py.h5d.create(self.group.id, name.encode(), hdf5_type(dtype), space, creation)
        self._attach(dataset, shape, dims)
        return dataset

    def write(
        self, name: str, values: npt.NDArray[Any], dims: Sequence[str], dtype: str | None = None
    ) -> h5py.h5d.DatasetID:
        """Write a small array as a contiguous dataset.

        Args:
            name: Its name.
            values: The array.
            dims: One name per axis.
            dtype: The element type, when it is not the one of `values` (`bfloat16`).
        """
        dataset = self.create(name, values.shape, dtype or values.dtype.name, dims, contiguous())
        write_raw(dataset, values)
        return dataset

    def finish(self) -> None:
        """Tell the scales which datasets they belong to; to be called last."""
        for key, attached in self._attached.items():
            references = np.array(attached, dtype=_BACK_REFERENCE)
            self._scales[key].attrs.create("REFERENCE_LIST", references)

    def _attach(
        self, dataset: h5py.h5d.DatasetID, shape: tuple[int, ...], dims: Sequence[str]
    ) -> None:
        if not dims:
            return
        reference = h5py.h5r.create(dataset, b".", h5py.h5r.OBJECT)
        scales = np.empty(len(dims), _REFERENCES)
        for axis, key in enumerate(zip(dims, shape, strict=True)):
            if key not in self._scales:
                self._scales[key] = self._new_scale(*key)
            if key not in self._references:
                self._references[key] = np.array([self._scales[key].ref], h5py.ref_dtype)
                self._attached[key] = []
            scales[axis] = self._references[key]
            self._attached[key].append((reference, axis))
        kind, memory_kind = _reference_lists()
        attribute = h5py.h5a.create(dataset, b"DIMENSION_LIST", kind, _space(len(dims)))
        attribute.write(scales, mtype=memory_kind)

    def _new_scale(self, dim: str, size: int) -> h5py.Dataset:
        name = self._scale_name(dim, size)
        ids = self._coordinates.get(_COORDINATES.get(dim, ""))
        if name == dim and ids is not None and ids.shape == (size,):
            self.group[name] = ids
            self.group[name].make_scale(name)
            return self.group[name]
        # A size but no values, the way netCDF-4 writes a dimension.
        scale = self.group.create_dataset(name, (size,), np.int8, track_times=False)
        scale.make_scale(f"This is a netCDF dimension but not a netCDF variable. {size:9d}")
        return scale

    def _scale_name(self, dim: str, size: int) -> str:
        """Name a dimension; a second size of the same name is told apart by its size."""
        name = link_name(dim)
        if any(known == dim for known, _ in self._scales):
            name = f"{name}_{size}"
        while name in self.group or name in _TABLE_NAMES:
            name += "_"
        return name


def contiguous() -> h5py.h5p.PropDCID:
    """Return how a dataset is stored in one piece, whose place is known before it is written."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    return creation


def chunked(chunk: tuple[int, ...], dtype: str) -> h5py.h5p.PropDCID:
    """Return how a dataset is stored in chunks, of which those that are not written take no place.

    Args:
        chunk: The shape of a chunk.
        dtype: The element type; where nothing is written, floats read as NaN, others as 0.
    """
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk(chunk)
    creation.set_fill_time(h5py.h5d.FILL_TIME_ALLOC)
    creation.set_obj_track_times(False)
    if "float" in dtype:
        creation.set_fill_value(np.array(np.nan, "f4" if dtype == "bfloat16" else dtype))
    return creation


def set_text(dataset: h5py.h5d.DatasetID, name: str, text: str) -> None:
    """Write an attribute of text, in UTF-8; what that cannot encode is written as its escape."""
    encoded = text.encode(errors="backslashreplace") or b"\0"
    kind = _text_kind(len(encoded))
    attribute = h5py.h5a.create(dataset, name.encode(), kind, _space(None))
    attribute.write(np.array(encoded, f"S{len(encoded)}"), mtype=kind)


# Made once: a segment of a thousand streams has thousands of attributes.
@lru_cache(maxsize=256)
def _text_kind(num_bytes: int) -> h5py.h5t.TypeID:
    kind = h5py.h5t.C_S1.copy()
    kind.set_size(num_bytes)
    kind.set_cset(h5py.h5t.CSET_UTF8)
    return kind


@lru_cache(maxsize=64)
def _space(size: int | None) -> h5py.h5s.SpaceID:
    """Return the space of an attribute: of one value, or of a list."""
    return h5py.h5s.create(h5py.h5s.SCALAR) if size is None else h5py.h5s.create_simple((size,))


@lru_cache(maxsize=1)
def _reference_lists() -> tuple[h5py.h5t.TypeID, h5py.h5t.TypeID]:
    """Return the type of lists of references, in the file and in memory."""
    return h5py.h5t.vlen_create(h5py.h5t.STD_REF_OBJ), h5py.h5t.py_create(_REFERENCES)


def offset_of(dataset: h5py.h5d.DatasetID) -> int:
    """Return where a contiguous dataset starts in the file; an empty one starts nowhere."""
    return dataset.get_offset() or 0


def hdf5_type(dtype: str) -> h5py.h5t.TypeID:
    """Return the HDF5 type of an element type of the log."""
    if dtype != "bfloat16":
        return h5py.h5t.py_create(storage_dtype(dtype), logical=True)
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    return kind


def write_raw(dataset: h5py.h5d.DatasetID, values: npt.NDArray[Any]) -> None:
    """Write a whole dataset as it is in memory; libhdf5 converts nothing."""
    if values.size:
        contiguous_values = np.ascontiguousarray(values).reshape(values.shape)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, contiguous_values, dataset.get_type())
