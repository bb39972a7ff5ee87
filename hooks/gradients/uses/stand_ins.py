"""Held parameters: which tensor stands for a parameter of the model while a pass runs.

With sharded parameters (FSDP2) the model owns parts, and its layers hold other, whole parameters
while they run. They are the same ones in every pass, and are known by their place in the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import nn

from sonde.hooks.model.ranks import sharding_modules
from sonde.hooks.model.walks import modules_of


class HeldParameters:
    """Tells which parameter of a model a layer's parameter stands for.

    Args:
        model: The model, while no pass of it runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (module, name, parameter)
            for module in modules_of(model)
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._owners = {parameter: parameter for _, _, parameter in self._places}
        self._held: dict[nn.Parameter, nn.Parameter] = {}

    def owner_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the parameter of the model that stood where this one stands now; or itself."""
        if parameter not in self._owners:
            # Once for all layers of a module whose parameters are gathered together.
            for module, name, owner in self._places:
                held = module._parameters.get(name)
                if held is not None and held not in self._owners:
                    self._owners[held] = owner
                    self._held[owner] = held
            self._owners.setdefault(parameter, parameter)
        return self._owners[parameter]

    def held_for(self, owner: nn.Parameter) -> nn.Parameter:
        """Return what layers held of a parameter when they ran: itself, unless it is sharded."""
        return self._held.get(owner, owner)


class GatheredValues:
    """Gathers sharded parameters, one FSDP module at a time.

    All ranks have to ask for the same parameters, in the same order.

    Args:
        model: The model, while no pass of it runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._shards_of = sharding_modules(model)
        self._gathered: list[Any] = []

    def gather(self, owners: Iterable[nn.Parameter]) -> None:
        """Gather some of the model's parameters, and release all others."""
        if not self._shards_of:
            return
        wanted = list(dict.fromkeys(self._shards_of[p] for p in owners if p in self._shards_of))
        if wanted != self._gathered:
            self._let_go()
            self._gathered = wanted
            for module in wanted:
                module.unshard()

    def _let_go(self) -> None:
        for module in self._gathered:
            module.reshard()
        self._gathered = []

    def __enter__(self) -> GatheredValues:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._let_go()
