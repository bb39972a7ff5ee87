"""What a recorder checks, agrees on and says of itself before the training starts."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.arguments import check_whole
from sonde.hooks.measures.base import Measure
from sonde.hooks.model.ranks import agree_on_sources, has_sharded_parameters, is_distributed
from sonde.hooks.schedule import Schedule
from sonde.sizes import size_text

from .environment import describe_model, environment
from .estimate import Estimate
from .sources import check_names, name_probes


def check_arguments(
    measures: Iterable[Measure], on_error: str, steps_per_epoch: int | None
) -> list[Measure]:
    """Return the measures, and refuse arguments that are none.

    Raises:
        InvalidInputError: If one is not what it should be.
    """
    found = list(measures) if isinstance(measures, Iterable) else [measures]
    if not isinstance(measures, Iterable) or not all(isinstance(m, Measure) for m in found):
        raise InvalidInputError(
            f"`measures` must be a list of measures, such as [sonde.Activations(probe)]; "
            f"got {measures!r}"
        )
    if on_error not in ("warn", "raise"):
        raise InvalidInputError(f"`on_error` (={on_error!r}) must be 'warn' or 'raise'")
    if steps_per_epoch is not None:
        check_whole("steps_per_epoch", steps_per_epoch, 1)
    return found


def check_size(estimated: Estimate, max_step_bytes: int) -> None:
    """Refuse to write too much at once.

    Raises:
        InvalidInputError: If a step at which everything is due would.
    """
    if estimated.step_bytes > max_step_bytes:
        raise InvalidInputError(
            f"a step would write {size_text(estimated.step_bytes)}, more than `max_step_bytes` "
            f"({size_text(max_step_bytes)}) allows:\n{estimated}\nTake fewer examples or "
            "layers, store=Sketch() or Gram(block=…); or raise the limit"
        )


def prepare(measures: Sequence[Measure], model: nn.Module, num_ranks: int) -> None:
    """Name the probes, refuse what cannot be recorded, and let all ranks agree.

    Raises:
        InvalidInputError: If measures cannot be told apart, or ranks cannot talk to each other yet.
        MismatchError: If ranks were given different measures.
        SondeError: If a measure does not fit the model.
    """
    name_probes(measures)
    check_names(measures)
    for measure in measures:
        measure.check(model)
    _agree(measures, model, num_ranks)


def _agree(measures: Sequence[Measure], model: nn.Module, num_ranks: int) -> None:
    """Let all ranks evaluate together what takes all of them.

    Raises:
        InvalidInputError: If they cannot talk to each other yet.
        MismatchError: If they were given different measures.
    """
    is_sharded = has_sharded_parameters(model)
    sharded = [m for m in measures if m.is_sharded]
    together = [m for m in measures if m.training is None] if is_sharded else sharded
    if sharded and num_ranks > 1 and not is_distributed():
        raise InvalidInputError(
            f"{sharded[0].probe!r} is sharded, but the ranks cannot talk to each other yet; "
            "make the recorder after torch.distributed.init_process_group()"
        )
    if together and is_distributed():
        agree_on_sources(
            [(m.name, m.source, m.probe.describe() if m.probe else {}) for m in together]
        )


def describe(
    path: Path,
    measures: Sequence[Measure],
    when: Schedule,
    model: nn.Module,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what `run.json` says of a run."""
    return {
        "name": path.resolve().name,
        "created": _now(),
        "config": json.loads(json.dumps(dict(config or {}), default=_plain)),
        "measures": [
            {
                "measure": measure.name,
                "source": measure.source,
                "when": repr(measure.when or when),
                **measure.describe(),
            }
            for measure in measures
        ],
        "probes": {m.source: m.probe.describe() for m in measures if m.probe is not None},
        "model": describe_model(model),
        "environment": environment(),
    }


def _plain(value: object) -> object:
    """Return a number of NumPy or torch as a number, and what is no JSON value as its text."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        number = value.item()
        return number if isinstance(number, (bool, int, float, str)) else str(number)
    return str(value)


def describe_attempt(num_ranks: int, *, resume: bool, records_nothing: bool) -> dict[str, Any]:
    """Return what the log of a rank says of this attempt."""
    return {
        "world_size": num_ranks,
        # Not known yet, until a checkpoint is loaded or the first step is counted.
        "resume_step": None if resume else 0,
        "records_nothing": records_nothing,
        "started": _now(),
        "hostname": platform.node(),
    }


def _now() -> str:
    """Return the time, UTC, in ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
