"""Own work: what sonde itself runs, so that no recorder takes it for a part of the training.

Several recorders may follow one model, and the user may evaluate it through sonde meanwhile. All of
that calls every hook of the model. So an evaluation is marked, for the whole process, by the
modules and parameters that it runs: backward hooks may be called in other threads. Within a thread,
calls of ours are counted, so that operations of a hook are told from those of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .walks import modules_of, parameters_of


class _Thread(threading.local):
    depth = 0


_thread = _Thread()
_lock = threading.Lock()
_evaluated: tuple[frozenset[int], ...] = ()


def depth() -> int:
    """Return how many calls of ours, one within the other, this thread is in; 0 is the training."""
    return _thread.depth


class _Within:
    """Counts what runs within as ours; it has no state of its own, so one is enough for all."""

    def __enter__(self) -> None:
        _thread.depth += 1

    def __exit__(self, *error: object) -> None:
        _thread.depth -= 1


within = _Within()
"""A context manager around code of ours that the training calls, such as a hook."""


def parts_of(model: nn.Module) -> frozenset[int]:
    """Return the identities of a model's modules and parameters, which hold while it lives."""
    return frozenset(map(id, (*modules_of(model), *parameters_of(model))))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let no recorder take what is run of a model meanwhile for a pass of its training."""
    global _evaluated
    parts = parts_of(model)
    with _lock:
        _evaluated = (*_evaluated, parts)
    try:
        with within:
            yield
    finally:
        with _lock:
            others = list(_evaluated)
            others.remove(parts)
            _evaluated = tuple(others)


def is_evaluated(parts: frozenset[int]) -> bool:
    """Tell whether sonde evaluates something of a model now.

    Args:
        parts: Its `parts_of`.
    """
    return any(not parts.isdisjoint(others) for others in _evaluated)
