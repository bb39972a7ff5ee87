"""The records of one layer, as readers see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .measure_log import MeasureLog


class LayerLog:
    """The records of one layer of a measure.

    Args:
        log: The measure.
        name: The layer.
    """

    def __init__(self, log: MeasureLog, name: str) -> None:
        self._log = log
        self.name = name

    @property
    def steps(self) -> list[int]:
        """The steps at which this layer was recorded."""
        return sorted({s for field in self.fields for s in self._log.steps_of(field, self.name)})

    @property
    def fields(self) -> list[str]:
        """What was kept of the layer, such as `gram` or `full`."""
        return self._log.fields(self.name)

    def gram(self, step: int = -1, *, relative: bool = False) -> npt.NDArray[np.float64]:
        """Return the layer's Gram matrix, float64 [examples, examples]; see `MeasureLog.gram`."""
        return self._log.gram(step, self.name, relative=relative)

    def features(self, step: int = -1, *, as_stored: bool = False) -> npt.NDArray[Any]:
        """Return the layer's stored [examples, features]; see `MeasureLog.features`."""
        return self._log.features(self.name, step, as_stored=as_stored)

    def array(self, field: str, step: int = -1, *, as_stored: bool = False) -> npt.NDArray[Any]:
        """Return one array of the layer; see `MeasureLog.array`."""
        return self._log.array(field, step, self.name, as_stored=as_stored)

    def __repr__(self) -> str:
        return f"<layer {self.name!r}: {', '.join(self.fields)} at {len(self.steps)} steps>"
