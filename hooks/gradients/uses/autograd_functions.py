"""Autograd functions, within which no graph is made and nothing can be followed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import Node, get_gradient_edge

# How many operations may make an input of a parameter, such as a view of it.
_DEPTH = 4


@dataclass(frozen=True)
class RunningFunction:
    """An autograd function whose forward pass is running.

    Attributes:
        name: Its name.
        node: Its place in the graph; None of one that has `setup_context`, which is not given it.
    """

    name: str
    node: Node | None = None

    def is_given(self, parameter: nn.Parameter) -> bool:
        """Return whether its inputs are made of a parameter, so that gradients come back as theirs.

        What it has otherwise, it may go back to by itself, as checkpoints do.
        """
        if self.node is None or not parameter.requires_grad:
            return True
        end = get_gradient_edge(parameter).node
        nodes = [self.node]
        for _ in range(_DEPTH):
            nodes = [of for node in nodes for of, _ in node.next_functions if of is not None]
            if any(node is end for node in nodes):
                return True
        return False


def running_function() -> RunningFunction | None:
    """Return the autograd function whose forward pass is running; None if none is."""
    frame: FrameType | None = sys._getframe()
    codes = []
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward":
            given = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if isinstance(given, FunctionCtx):
                node: Any = given  # It is both.
                return RunningFunction(type(given).__name__.removesuffix("Backward"), node)
            codes.append(code)
        frame = frame.f_back
    # Those that have `setup_context` get none.
    names = dict(_functions(torch.autograd.Function)) if codes else {}
    return next((RunningFunction(names[code]) for code in codes if code in names), None)


def _functions(base: Any) -> Iterator[tuple[CodeType, str]]:
    for function in base.__subclasses__():
        forward: Any = inspect.unwrap(function.forward)
        code = getattr(forward, "__code__", None)
        if code is not None:
            yield code, function.__name__
        yield from _functions(function)
