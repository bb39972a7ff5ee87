"""A look at a model before it is recorded: one pass of ours, on what the training calls it with.

It shows which axis of the inputs holds the examples, by the layers that know their own, and how
often each layer is called. Models that a pass may disturb, or that fail, are not looked at.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sonde.hooks import Probe
from sonde.hooks.examples.probe import call, device_of, undisturbed
from sonde.hooks.model.layers import layers_of
from sonde.hooks.model.ranks import has_sharded_parameters
from sonde.hooks.model.state import MadeParametersError
from sonde.hooks.model.taps import map_tensors, tapped, tensor_leaves
from sonde.hooks.training.batch_axes import is_plain


@dataclass
class Survey:
    """What one pass has shown.

    Attributes:
        batch_dim: The axis of the model's inputs that holds the examples.
        num_calls: How often each layer was called.
    """

    batch_dim: int = 0
    num_calls: Counter[str] = field(default_factory=Counter)


def survey(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Survey:
    """Run a model once on copies of its arguments, and leave no trace of it.

    Args:
        model: The model, without wrappers.
        args: Its arguments by position.
        kwargs: Its arguments by name.
    """
    found = Survey()
    if has_sharded_parameters(model) or not all(map(is_plain, (*args, *kwargs.values()))):
        return found
    seen: list[tuple[int, int]] = []

    def on_call(name: str, module: nn.Module, given: Any, _: Any) -> None:
        found.num_calls[name.partition("#")[0]] += 1
        axis = _axis_of_examples(module, given)
        if axis is not None:
            seen.append((given.shape[axis], axis))

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().clone()

    try:
        with undisturbed(model), torch.no_grad(), tapped(layers_of(model), on_call):
            model(*map_tensors(args, copied), **map_tensors(kwargs, copied))
    except Exception:  # What is recorded will tell.
        return Survey()
    if len({size for size, _ in seen}) == 1:
        found.batch_dim = _batch_dim([*args, *kwargs.values()], *seen[0])
    return found


def why_no_probe(model: nn.Module, probe: Probe) -> str | None:
    """Say why a model cannot be run on some of a probe's examples; None where it can.

    Args:
        model: The model.
        probe: The examples.
    """
    if has_sharded_parameters(model):
        return None
    for number in (min(2, probe.num_examples), min(probe.batch_size, probe.num_examples)):
        try:
            with undisturbed(model), torch.no_grad():
                call(model, probe.rows(slice(0, number), device_of(model))[0])
        except MadeParametersError:
            return None  # It is measured once the training has made them.
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            return f"the model does not run on {number} of its examples alone ({reason})"
    return None


def _axis_of_examples(module: nn.Module, given: Any) -> int | None:
    """Return the axis of the examples in the input of a layer that knows it."""
    if not isinstance(given, Tensor):
        return None
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and given.ndim == 3:
        return 0 if module.batch_first else 1
    if isinstance(module, nn.RNNCellBase) and given.ndim == 2:
        return 0
    return None


def _batch_dim(inputs: list[Any], num_examples: int, axis: int) -> int:
    """Return the axis of the inputs that has the number of examples, as a layer within knows it.

    Args:
        inputs: The model's arguments.
        num_examples: The number.
        axis: Where the layer has them; it decides where several axes have that size.
    """
    for _, tensor in tensor_leaves(inputs):
        if tensor.ndim > 1:
            axes = [at for at in (0, 1) if tensor.shape[at] == num_examples]
            return axes[0] if len(axes) == 1 else axis if len(axes) == 2 else 0
    return 0
