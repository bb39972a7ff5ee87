"""Decision planes: the predicted class on planes through three examples each."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.arguments import check_schedule, check_whole
from sonde.hooks.examples.digests import digest
from sonde.hooks.examples.ids import as_int64
from sonde.hooks.examples.probe import device_of, undisturbed, values_of
from sonde.hooks.losses.scores import Output, Scores, check_outputs
from sonde.hooks.record import Recording, Subject
from sonde.hooks.schedule import Schedule
from sonde.log import LogArray

from .base import Measure

Population = Literal["distinct", "any", "same"]

# Relative to the sides: three points closer to a line than this span no plane.
_MIN_HEIGHT = 1e-6
_MAX_DRAWS = 1000


@dataclass(frozen=True)
class _Planes:
    """The geometry of all planes, in float64.

    Attributes:
        triplet: Positions of the three examples, [triplets, 3].
        coordinates: The examples in plane coordinates, [triplets, 3, 2].
        extent: Lowest and highest coordinate of the grid, [triplets, 2, 2] (axis, bound).
    """

    triplet: npt.NDArray[np.int64]
    coordinates: npt.NDArray[np.float64]
    extent: npt.NDArray[np.float64]


class DecisionPlanes(Measure):
    """Record the predicted class on a grid of points of planes through three examples.

    A plane is spanned as in Somepalli et al., 2022 (2203.08124): the triplet lies at (0, 0),
    (‖x₂−x₁‖, 0) and (first, second) with second ≥ 0; the grid covers the range of the three on each
    axis, widened on both sides by `margin` times its length. Points lie in the space of the inputs
    given here and are not clipped. The grid is [row, column]: rows run along the second axis.

    The class is that of the highest of the scores [examples, classes], of which there have to be as
    many as there are classes; of two classes one logit per example may decide by its sign.

    Args:
        inputs: Examples as the model sees them (normalised), [examples, …], floating point.
        targets: Their classes, integers [examples].
        triplets: How many planes to draw, or the positions themselves, [triplets, 3].
        resolution: Points per axis.
        population: Draw triplets of three `distinct` classes, of `any`, or of the `same` class.
        margin: How far the grid reaches beyond the triplet, relative to its range.
        ids: One integer per example, as for a probe.
        seed: Draws the triplets; runs to be compared need the same.
        batch_size: How many points are evaluated at once.
        output: Which output of the model scores the classes, as for `Predictions`.
        name: The name of this source in the log.
        when: When it is due; None takes the recorder's schedule.

    Raises:
        InvalidInputError: If an argument does not fit, or a given triplet spans no plane.
    """

    name = "decision_planes"

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor | Sequence[int],
        *,
        triplets: int | npt.NDArray[np.integer[Any]] | Sequence[Sequence[int]] = 500,
        resolution: int = 50,
        population: Population = "distinct",
        margin: float = 0.1,
        ids: npt.NDArray[np.integer[Any]] | Sequence[int] | None = None,
        seed: int = 0,
        batch_size: int = 256,
        output: Output | None = None,
        name: str = "planes",
        when: Schedule | None = None,
    ) -> None:
        self._inputs = values_of("inputs", inputs).detach()
        self._targets = np.asarray(values_of("targets", targets).cpu())
        self._ids = np.arange(len(self._inputs)) if ids is None else as_int64(np.asarray(ids))
        self._triplets = triplets
        self._resolution = resolution
        self._population = population
        self._margin = margin
        self._seed = seed
        self._batch_size = batch_size
        self._name = name
        self.when = when
        self._check_arguments()
        self._scores = Scores(output, torch.from_numpy(self._targets.astype(np.int64)))

    @property
    def source(self) -> str:
        """The name given to these planes."""
        return self._name

    def check(self, model: nn.Module) -> None:
        """Draw the triplets, so that what cannot be drawn is refused before training.

        Raises:
            InvalidInputError: If the examples do not have such triplets, or the model does not give
                scores of classes, or it is not clear which output they are.
        """
        assert len(self._planes.triplet)
        few = self._inputs[:2].to(device_of(model), copy=True)
        check_outputs(model, few, lambda returned: self._classes(returned, len(few)))

    def table(self) -> Sequence[LogArray]:
        """Return the triplets, by id and class, and where they lie in their planes."""
        planes = self._planes
        return [
            LogArray("triplet", self._ids[planes.triplet], ("triplet", "corner")),
            LogArray("triplet_target", self._targets[planes.triplet], ("triplet", "corner")),
            LogArray("coordinates", planes.coordinates, ("triplet", "corner", "axis")),
            LogArray("extent", planes.extent, ("triplet", "axis", "bound")),
        ]

    def describe(self) -> dict[str, Any]:
        """Return what the run's description says of the measure."""
        return {
            "triplets": len(self._planes.triplet),
            "resolution": self._resolution,
            "population": self._population,
            "margin": self._margin,
            "seed": self._seed,
            "digest": self._digest,
        }

    def record_bytes(self, subject: Subject) -> int:
        """Estimate the bytes of one record, of at most 256 classes."""
        return len(self._planes.triplet) * self._resolution**2

    def record(self, subject: Subject) -> Recording:
        """Classify every grid point of every plane.

        Raises:
            InvalidInputError: If the model gives no class scores.
        """
        device = device_of(subject.model)
        classes = []
        num_classes = 0
        with undisturbed(subject.model), torch.no_grad():
            for points in self._point_batches(device):
                found, num_classes = self._classes(subject.model(points), len(points))
                classes.append(found.cpu())
        shape = (len(self._planes.triplet), self._resolution, self._resolution)
        labels = torch.cat(classes).numpy().reshape(shape)
        kind = np.uint8 if num_classes <= 256 else np.uint16 if num_classes <= 65536 else np.uint32
        array = LogArray("labels", labels.astype(kind), ("triplet", "row", "column"), is_owned=True)
        return Recording([array], {"digest": self._digest, "num_classes": num_classes})

    def _classes(self, returned: Any, num_points: int) -> tuple[Tensor, int]:
        """Return the class of each point by what the model returned, and the number of classes.

        Raises:
            InvalidInputError: If that does not tell it.
        """
        _, scores = self._scores.of(returned, num_points)
        if self._scores.is_sign(scores, num_points):
            return (scores.reshape(-1) > 0).long(), 2
        if self._scores.are_of_classes(scores, num_points):
            return scores.argmax(1), scores.shape[1]
        one = ", or one logit for each example" if self._scores.is_binary else ""
        hint = "where the model has another output, choose it by `output`"
        if scores.ndim > 2:
            hint = "give `output` as a function that makes them of scores of tokens or pixels"
        raise InvalidInputError(
            f"decision planes need scores [examples, classes] of at least "
            f"{max(2, self._scores.num_classes)} classes, as the targets have{one}; the model gave "
            f"{list(scores.shape)} for {num_points} examples; {hint}"
        )

    @cached_property
    def _planes(self) -> _Planes:
        if isinstance(self._triplets, int):
            triplet = _draw(
                self._inputs, self._targets, self._triplets, self._population, self._seed
            )
        else:
            triplet = np.asarray(self._triplets, np.int64)
            for positions in triplet:
                if not _spans_plane(_corners(self._inputs, positions)):
                    raise InvalidInputError(
                        f"the examples at {positions.tolist()} span no plane: two of them are "
                        "equal, or all three lie on a line"
                    )
        coordinates = np.stack([_coordinates(_corners(self._inputs, row)) for row in triplet])
        low, high = coordinates.min(1), coordinates.max(1)
        widening = self._margin * (high - low)
        return _Planes(triplet, coordinates, np.stack([low - widening, high + widening], axis=2))

    @cached_property
    def _digest(self) -> str:
        used = np.unique(self._planes.triplet)
        values = _corners(self._inputs, used)
        shape = np.array([self._resolution, self._margin])
        return digest([values, np.searchsorted(used, self._planes.triplet), shape])

    def _point_batches(self, device: torch.device) -> Iterator[Tensor]:
        """Yield grid points in order, [points, …], at most `batch_size` at a time."""
        waiting: list[Tensor] = []
        for row in range(len(self._planes.triplet)):
            for points in self._points(row, device):
                if waiting and sum(map(len, waiting)) + len(points) > self._batch_size:
                    yield torch.cat(waiting)
                    waiting = []
                waiting.append(points)
        yield torch.cat(waiting)

    def _points(self, row: int, device: torch.device) -> Iterator[Tensor]:
        """Yield the points of one plane."""
        corners = torch.from_numpy(_corners(self._inputs, self._planes.triplet[row]))
        first = corners[1] - corners[0]
        first = first / first.norm()
        second = corners[2] - corners[0]
        second = second - (first @ second) * first
        second = second / second.norm()
        (low_1, high_1), (low_2, high_2) = self._planes.extent[row].tolist()
        c1 = torch.from_numpy(np.linspace(low_1, high_1, self._resolution))
        c2 = torch.from_numpy(np.linspace(low_2, high_2, self._resolution))
        for grid in torch.cartesian_prod(c2, c1).split(self._batch_size):
            points: Tensor = corners[0] + grid @ torch.stack([second, first])
            shaped = points.reshape(-1, *self._inputs.shape[1:])
            yield shaped.to(device, self._inputs.dtype)

    def _check_arguments(self) -> None:
        check_schedule(self.when)
        if not self._inputs.is_floating_point() or self._inputs.ndim < 2:
            raise InvalidInputError(
                f"`inputs` has shape {list(self._inputs.shape)} and dtype {self._inputs.dtype}; "
                "expected floating-point examples [examples, …]"
            )
        if self._targets.shape != (len(self._inputs),) or self._targets.dtype.kind not in "iu":
            raise InvalidInputError(
                f"`targets` has shape {self._targets.shape} and dtype {self._targets.dtype}; "
                f"expected one class for each of the {len(self._inputs)} examples"
            )
        if self._population not in ("distinct", "any", "same"):
            raise InvalidInputError(
                f"`population` (={self._population!r}) must be 'distinct', 'any' or 'same'"
            )
        if self._ids.shape != (len(self._inputs),):
            raise InvalidInputError(
                f"`ids` has shape {self._ids.shape}; expected one integer for each of the "
                f"{len(self._inputs)} examples"
            )
        check_whole("batch_size", self._batch_size, 1)
        check_whole("resolution", self._resolution, 2)
        if not isinstance(self._margin, numbers.Real) or not self._margin >= 0:
            raise InvalidInputError(f"`margin` (={self._margin!r}) must be a number >= 0")
        if isinstance(self._triplets, numbers.Number | str):
            check_whole("triplets", self._triplets, 1)
            return
        given = np.asarray(self._triplets)
        if given.ndim != 2 or given.shape[1] != 3 or not len(given):
            raise InvalidInputError(f"`triplets` has shape {given.shape}; expected [triplets, 3]")
        if given.min() < 0 or given.max() >= len(self._inputs):
            raise InvalidInputError(
                f"`triplets` holds positions {given.min()} to {given.max()}; there are "
                f"{len(self._inputs)} examples"
            )


def _draw(
    inputs: Tensor,
    targets: npt.NDArray[np.integer[Any]],
    num_triplets: int,
    population: Population,
    seed: int,
) -> npt.NDArray[np.int64]:
    """Draw triplets of examples that span a plane.

    Raises:
        InvalidInputError: If there are none, or too few.
    """
    random = np.random.default_rng(seed)
    by_class = [np.flatnonzero(targets == target) for target in np.unique(targets)]
    large = [members for members in by_class if len(members) >= 3]
    enough = {"distinct": len(by_class) >= 3, "any": len(targets) >= 3, "same": bool(large)}
    if not enough[population]:
        raise InvalidInputError(
            f"cannot draw triplets (population {population!r}) from {len(targets)} examples of "
            f"{len(by_class)} classes; give more examples, or another `population`"
        )
    drawn: list[npt.NDArray[np.int64]] = []
    failures = 0
    while len(drawn) < num_triplets:
        if population == "distinct":
            classes = random.choice(len(by_class), 3, replace=False)
            corners = np.array([random.choice(by_class[c]) for c in classes])
        else:
            pool = large[random.integers(len(large))] if population == "same" else len(targets)
            corners = random.choice(pool, 3, replace=False)
        if _spans_plane(_corners(inputs, corners)):
            drawn.append(corners.astype(np.int64))
        else:
            failures += 1
            if failures > _MAX_DRAWS:
                raise InvalidInputError(
                    f"{failures} drawn triplets span no plane; the examples repeat, or lie on a "
                    "line"
                )
    return np.stack(drawn)


def _corners(inputs: Tensor, positions: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
    """Return some examples, flattened, [positions, features]."""
    chosen = inputs[torch.from_numpy(positions.astype(np.int64))]
    flat: npt.NDArray[np.float64] = chosen.flatten(1).double().cpu().numpy()
    return flat


def _coordinates(corners: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return where three points lie in the plane through them, [3, 2]."""
    side, other = corners[1] - corners[0], corners[2] - corners[0]
    length = float(np.linalg.norm(side))
    first = float(side @ other) / length
    second = float(np.linalg.norm(other - first * side / length))
    return np.array([[0.0, 0.0], [length, 0.0], [first, second]])


def _spans_plane(corners: npt.NDArray[np.float64]) -> bool:
    side = np.linalg.norm(corners[1] - corners[0])
    other = np.linalg.norm(corners[2] - corners[0])
    if side == 0 or other == 0:
        return False
    return bool(_coordinates(corners)[2, 1] > _MIN_HEIGHT * max(side, other))
