"""Sharding: a probe whose examples are divided between the ranks of a distributed training.

Every rank evaluates a stretch of the examples, in their order, and rank 0 alone records what all
of them found. Ranks talk to each other only at the same points, through the default process group:
at the end of a pass each says what it has, or what failed, so that all of them go on or none. A
rank whose stretch is shorter runs the model as often as the others, because with sharded parameters
(FSDP2) a forward pass is something that all ranks do together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sonde.exceptions import InvalidInputError, MismatchError

from .walks import modules_of

_Said = TypeVar("_Said")


@dataclass(frozen=True)
class Shards:
    """How the examples of a probe are divided.

    Attributes:
        rank: This process.
        bounds: Where the stretch of each rank starts, and the end of the last one.
        batch_size: How many examples are evaluated at once.
    """

    rank: int
    bounds: tuple[int, ...]
    batch_size: int

    @property
    def num_ranks(self) -> int:
        """The number of ranks."""
        return len(self.bounds) - 1

    @property
    def sizes(self) -> list[int]:
        """The number of examples of each rank."""
        return [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def num_examples(self) -> int:
        """The number of examples of this rank."""
        return self.sizes[self.rank]

    @property
    def largest(self) -> int:
        """The number of examples of the rank that has most."""
        return max(self.sizes)

    def batches(self) -> Iterator[tuple[slice, bool]]:
        """Yield the rows of each batch of this rank; as many batches on every rank.

        Yields:
            The rows, and whether they count. A batch that does not count is padding: it keeps the
            collective operations of all ranks in step.
        """
        start, end = self.bounds[self.rank], self.bounds[self.rank + 1]
        for offset in range(0, self.largest, self.batch_size):
            rows = slice(start + offset, min(start + offset + self.batch_size, end))
            is_own = rows.start < end
            yield rows if is_own else slice(0, 1), is_own

    def all_batch_sizes(self) -> list[int]:
        """Return the number of examples of every batch of every rank, in the order of examples."""
        return [
            min(self.batch_size, size - start)
            for size in self.sizes
            for start in range(0, size, self.batch_size)
        ]

    @property
    def is_first(self) -> bool:
        """Whether this rank records what all of them found."""
        return self.rank == 0

    def unlike_size(self) -> int:
        """Return a small number of examples that no batch of any rank has."""
        taken = {min(self.batch_size, size) for size in self.sizes}
        taken |= {size % self.batch_size for size in self.sizes}
        unlike = next(size for size in (2, 1, 3, 4) if size not in taken)
        return min(unlike, self.bounds[-1])


def shards_of(num_examples: int, batch_size: int, *, unit: int = 1) -> Shards:
    """Divide examples into stretches of nearly the same size, one for each rank.

    Args:
        num_examples: Their number.
        batch_size: How many are evaluated at once.
        unit: The number of examples that must not be divided.
    """
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    num_units = -(-num_examples // unit)
    bounds = (min(num_units * at // num_ranks * unit, num_examples) for at in range(num_ranks + 1))
    return Shards(rank, tuple(bounds), batch_size)


def is_distributed() -> bool:
    """Whether this process is one of several that can talk to each other."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return bool(distributed.get_world_size() > 1)


def has_sharded_parameters(model: nn.Module) -> bool:
    """Whether every forward pass of a model is one of all ranks, as under FSDP2."""
    return bool(_sharded_modules(model))


def take_buffers_of_first(model: nn.Module) -> None:
    """Give a model the buffers of rank 0, which `undisturbed` takes back.

    Running statistics differ between ranks: DistributedDataParallel evens them out in the next
    forward pass of the training only.
    """
    with torch.no_grad():
        for buffer in model.buffers():
            of_first = buffer.detach().clone(memory_format=torch.contiguous_format)
            torch.distributed.broadcast(of_first, 0)
            buffer.copy_(of_first)


def let_go_of_gathered(model: nn.Module) -> None:
    """Free the whole parameters that a forward pass left in a model with sharded ones.

    The outermost module keeps them for a backward pass, which one of a probe never has; the next
    step of the training would take them for up to date.
    """
    for module in _sharded_modules(model):
        module.reshard()


@contextmanager
def gradients_unsynced(model: nn.Module) -> Iterator[None]:
    """Let backward passes leave alone what a training with sharded parameters has accumulated.

    The end of one makes the ranks add up whatever gradients there are, those of micro-batches
    before it, too.
    """
    groups = [group for module in _sharded_modules(model) for group in _groups_of(module)]
    before = [(group.reduce_grads, group.all_reduce_grads) for group in groups]
    try:
        for group in groups:
            group.reduce_grads = group.all_reduce_grads = False
        yield
    finally:
        for group, (reduces, all_reduces) in zip(groups, before, strict=True):
            group.reduce_grads, group.all_reduce_grads = reduces, all_reduces


def sharding_modules(model: nn.Module) -> dict[nn.Parameter, Any]:
    """Return which module shards each sharded parameter of a model; none is, but under FSDP2.

    Args:
        model: The model, while no pass of it runs.
    """
    # A module comes before those within, which shard their parameters themselves.
    return {
        parameter: module for module in _sharded_modules(model) for parameter in module.parameters()
    }


def tell_all(said: _Said) -> list[_Said]:
    """Return what every rank says, in their order; each waits for all others."""
    everything: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everything, said)
    return everything


def agree(error: Exception | None) -> None:
    """Go on if every rank can.

    Args:
        error: What failed on this one.

    Raises:
        InvalidInputError: If something failed on any of them; on all of them.
    """
    texts = tell_all(None if error is None else f"{type(error).__name__}: {error}")
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    if failed:
        raise InvalidInputError("; ".join(failed)) from error


def agreed(function: Callable[[], _Said]) -> _Said:
    """Return what a function returns, once it has succeeded on every rank.

    Args:
        function: What does not wait for other ranks, but in the model's own passes.

    Raises:
        InvalidInputError: If it failed on any of them; on all of them.
    """
    result, error = None, None
    try:
        result = function()
    except Exception as failed:  # Whatever it is, the other ranks have to know.
        error = failed
    agree(error)
    return cast(_Said, result)


def agree_on_sources(sources: Sequence[tuple[str, str, Any]]) -> None:
    """Let all ranks measure the same examples, or none.

    Args:
        sources: What this rank measures together with the others: measure, source, and the
            description of the probe.

    Raises:
        MismatchError: If ranks differ, on all of them.
    """
    for rank, others in enumerate(everything := tell_all(list(sources))):
        if others != everything[0]:
            raise MismatchError(
                f"rank {rank} measures {_listed(others)}, rank 0 {_listed(everything[0])}; a "
                "sharded probe or model is evaluated by all ranks together, so give each rank the "
                "same measures and the same whole probe"
            )


def collect(value: _Said) -> list[_Said] | None:
    """Return what every rank has, in their order, on rank 0; None on the others."""
    is_first = torch.distributed.get_rank() == 0
    everything: list[Any] | None = None
    if is_first:
        everything = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(value, everything)
    return everything


def each_rank_features(own: Tensor, sizes: Sequence[int]) -> Iterator[Tensor]:
    """Yield the features of every rank, in their order, to all of them.

    Args:
        own: Those of this rank, [examples of the rank, features].
        sizes: The number of examples of each rank.
    """
    rank = torch.distributed.get_rank()
    for source, size in enumerate(sizes):
        features = own if source == rank else own.new_empty(size, own.shape[1])
        if size:
            torch.distributed.broadcast(features, source)
        yield features


def _sharded_modules(model: nn.Module) -> list[Any]:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # Not imported: not used.
    if fsdp is None or not is_distributed():
        return []
    return [module for module in modules_of(model) if isinstance(module, fsdp.FSDPModule)]


def _groups_of(module: Any) -> list[Any]:
    # `set_requires_gradient_sync` sets the same, but nothing public tells what it was.
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _listed(sources: Sequence[tuple[str, str, Any]]) -> str:
    texts = [f"{measure} of '{source}' ({about})" for measure, source, about in sources]
    return ", ".join(texts) or "nothing"
