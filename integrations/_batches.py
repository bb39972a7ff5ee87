"""Ids of examples from the batches a model is called with, for recorders of the training itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sonde.exceptions import InvalidInputError
from sonde.hooks import Recorder
from sonde.hooks.model.layers import unwrap
from sonde.hooks.model.taps import add_hook


def tell_batches(
    recorder: Recorder | None, model: nn.Module, id_key: str | int
) -> Callable[[], None]:
    """Tell a recorder the ids of every batch that a model is called with, before it is called.

    Ids are read from the model's keyword arguments, or from its first argument that is a mapping.
    A keyword argument that the model's forward does not accept is taken out for it. All but that
    is done only where a step of the training is recorded.

    Args:
        recorder: The recorder; without one, ids are only taken out.
        model: The model as it is called, wrapped or not.
        id_key: Which entry holds one integer per example.

    Returns:
        A function that ends it, and leaves the model as it was.

    Raises:
        InvalidInputError: If `id_key` is no text.
    """
    if not isinstance(id_key, str):
        raise InvalidInputError(
            f"`id_key` (={id_key!r}) must be the name of an entry of a batch, which reaches the "
            "model as a keyword argument or in a mapping"
        )
    is_accepted = _accepts(unwrap(model), id_key)

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        is_seen = not torch.compiler.is_compiling() and torch.is_grad_enabled()
        if recorder is not None and is_seen:
            tell_ids(recorder, (*args, kwargs), id_key)
        if is_accepted or id_key not in kwargs:
            return None
        return args, {name: value for name, value in kwargs.items() if name != id_key}

    # Before the hooks of the recorder, which may be there already.
    return add_hook(model, before, is_before=True, first=True)


def tell_ids(recorder: Recorder, batch: Any, id_key: str | int) -> None:
    """Tell a recorder the ids in a batch whose forward pass is still to come; raise nothing.

    Args:
        recorder: The recorder; where it observes no step, nothing is done.
        batch: The batch; see `find_ids`.
        id_key: Where it holds the ids.
    """
    if not recorder.is_observing:
        return
    try:
        ids = find_ids(batch, id_key)
        if ids is None:
            recorder.warn(f"the batch has no ids by `id_key` (={id_key!r}): {_outline(batch)}")
        else:
            recorder.batch(ids=ids).lies_ahead()
    except Exception as error:  # Nothing of ours may end a training.
        recorder.warn(f"ids cannot be read from the batch: {type(error).__name__}: {error}")


def find_ids(batch: Any, id_key: str | int) -> Any:
    """Return the ids in a batch; None if there are none.

    Args:
        batch: A mapping with the ids as an entry, or a sequence with such a mapping or, where the
            key is a number, with the ids themselves.
        id_key: The name of the entry, or its position.
    """
    if isinstance(batch, Mapping):
        return batch.get(id_key)
    if not isinstance(batch, list | tuple):
        return None
    if isinstance(id_key, int):
        return batch[id_key] if -len(batch) <= id_key < len(batch) else None
    found = (item[id_key] for item in batch if isinstance(item, Mapping) and id_key in item)
    return next(found, None)


def _accepts(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(type(model).forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _outline(batch: Any) -> str:
    """Say what a batch holds, for a message."""
    if isinstance(batch, Mapping):
        return f"its entries are {', '.join(map(repr, batch))}"
    if isinstance(batch, list | tuple):
        parts = [_outline(item) for item in batch if isinstance(item, Mapping) and item]
        return "; ".join(parts) or f"it is a {type(batch).__name__} of {len(batch)} without names"
    return f"it is a {type(batch).__name__}"
