"""Record a training that runs under Accelerate, by one call on every process.

What the training does is unchanged: hooks on the optimizer that really steps count steps, and
`accelerator.backward`, `save_state` and `load_state` tell what only they know.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sonde.exceptions import InvalidInputError, MissingExtraError
from sonde.hooks import Recorder
from sonde.hooks.config.config import Config, as_config

from ._batches import tell_batches
from ._starting import guarded, stepping_optimizer

try:
    from accelerate import Accelerator
    from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard
except ImportError as error:
    raise MissingExtraError("accelerate", "accelerate") from error


def attach(
    accelerator: Accelerator,
    config: Recorder | Config | str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    **options: Any,  # Any: each has a type of its own.
) -> Recorder:
    """Record a training that runs under Accelerate; call it on every process.

    It may come before `accelerator.prepare` or after it. A step is one of the optimizer, however
    many micro-batches are accumulated in it. Each process records what it trains on, and readers
    join that by `id_key`; examples that only fill up an uneven last batch are marked as
    `is_duplicate`. A probe is evaluated in the precision of the model's parameters, without the
    autocast that `prepare` builds into it.

    Checkpoints of `accelerator.save_state` hold where the recording was, and `load_state` goes on
    from there, with `resume=True`. Where a checkpoint holds nothing of that, or sonde is not there
    any more, it loads all the same. Where the trackers have a TensorBoard, it is shown the numbers
    given to `recorder.log`, and how much was recorded.

    Args:
        accelerator: The accelerator.
        config: A `Config`, the run directory, or a recorder.
        model: The model, prepared or not; with `id_key`, as the training calls it.
        optimizer: Its optimizer, prepared or not.
        options: What `Config` takes besides, and `Recorder`; of a recorder only `id_key` and
            `reduction`.

    Returns:
        The recorder, attached; close it after the training. It closes itself at interpreter exit.

    Raises:
        InvalidInputError: If an option has no such name, or an argument is not what it should be.
        SondeError: If another argument does not fit; see `Recorder`.

    Example::

        accelerator = Accelerator()
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        recorder = attach(accelerator, "runs/seed0", model, optimizer, probe=probe)
    """
    if not isinstance(accelerator, Accelerator):
        raise InvalidInputError(
            f"`accelerator` is a {type(accelerator).__name__}; expected an accelerate.Accelerator"
        )
    inner = stepping_optimizer(optimizer)
    if isinstance(config, Recorder):
        recorder, made = config, _beside(config, options)
        if not recorder.is_attached:
            recorder.attach(inner)
    else:
        made = as_config(config, options)
        recorder = made.recorder(model, inner)
    recorder.at_close(
        _tell_losses(accelerator, recorder, made.reduction),
        accelerator.register_save_state_pre_hook(_saving(accelerator, recorder)).remove,
        accelerator.register_load_state_pre_hook(_loading(accelerator, recorder)).remove,
        inner.register_step_post_hook(_showing(accelerator, recorder)).remove,
    )
    if made.id_key is not None:
        recorder.at_close(tell_batches(recorder, model, made.id_key))
    return recorder


def _beside(recorder: Recorder, options: dict[str, Any]) -> Config:
    """Return what can still be said of a recorder that is made already.

    Raises:
        InvalidInputError: If it is something else.
    """
    others = options.keys() - {"id_key", "reduction"}
    if others:
        raise InvalidInputError(
            f"{', '.join(f'`{name}`' for name in sorted(others))} beside a recorder, which is made "
            "already; only `id_key` and `reduction` can be given with one"
        )
    return Config(recorder.path, **options)


def _tell_losses(
    accelerator: Accelerator, recorder: Recorder, reduction: Literal["mean", "sum"] | None
) -> Callable[[], None]:
    """Tell a recorder what `accelerator.backward` is given; return a function that ends it."""
    original = accelerator.backward
    had_own = "backward" in vars(accelerator)

    def backward(loss: torch.Tensor, **options: Any) -> Any:
        if recorder.is_observing:
            _tell(accelerator, recorder, loss if reduction is not None else None, reduction)
        return original(loss, **options)

    def end() -> None:
        if vars(accelerator).get("backward") is not backward:
            return  # Somebody else has wrapped it since; once closed, the recorder hears nothing.
        if had_own:
            accelerator.backward = original
        else:
            del accelerator.backward

    accelerator.backward = backward
    return end


def _tell(
    accelerator: Accelerator,
    recorder: Recorder,
    loss: torch.Tensor | None,
    reduction: Literal["mean", "sum"] | None,
) -> None:
    num_real = None
    with guarded(recorder, "duplicates cannot be told"):
        num_real = _num_real(accelerator, recorder)
    if loss is not None or num_real is not None:
        # The loss is not divided by the number of accumulated micro-batches yet.
        recorder.batch(loss=loss, reduction=reduction or "mean", num_real=num_real)


def _num_real(accelerator: Accelerator, recorder: Recorder) -> int | None:
    """Return how many examples of the last batch of an epoch are not copies that fill it up.

    What fills it up comes behind all others, in the order of the processes. Accelerate's own count
    of them, `GradientState.remainder`, is missing after `skip_first_batches`.
    """
    num_ranks, rank = accelerator.num_processes, accelerator.process_index
    loader = accelerator.gradient_state.active_dataloader
    if loader is None or num_ranks == 1 or not loader.end_of_dataloader:
        return None
    if isinstance(loader, DataLoaderDispatcher):
        per_rank, num_left = -(-loader.remainder // num_ranks), loader.remainder
    elif (shard := _shard(loader)) is not None:
        if shard.drop_last or not shard.even_batches:
            return None
        per_rank = shard.batch_size // (num_ranks if shard.split_batches else 1)
        num_left = len(shard.batch_sampler.sampler) % (per_rank * num_ranks)
        num_left = num_left or per_rank * num_ranks
    else:
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, IterableDatasetShard) and not dataset.drop_last:
            recorder.warn(
                "the last batch may hold copies of other examples that are not marked: nobody "
                "knows the length of an iterable dataset"
            )
        return None
    return int(min(max(num_left - rank * per_rank, 0), per_rank))


def _shard(loader: Any) -> Any:  # Any: Accelerate ships no types.
    """Return what gives this process its batches, behind whatever skips some of them."""
    samplers: Sequence[Any] = (loader.batch_sampler, loader.sampler)
    for sampler in samplers:
        while sampler is not None and not isinstance(sampler, BatchSamplerShard):
            sampler = getattr(sampler, "batch_sampler", None)
        if sampler is not None and sampler.batch_size is not None:
            return sampler
    return None


def _saving(accelerator: Accelerator, recorder: Recorder) -> Callable[..., None]:
    def save(_: Any, __: Any, output_dir: str | os.PathLike[str]) -> None:
        with guarded(recorder, "the checkpoint lacks the recorder's state"):
            path = _state_path(output_dir, accelerator.process_index)
            draft = path.with_suffix(".partial")
            draft.write_text(json.dumps(recorder.state_dict()))
            draft.replace(path)

    return save


def _loading(accelerator: Accelerator, recorder: Recorder) -> Callable[..., None]:
    def load(_: Any, input_dir: str | os.PathLike[str]) -> None:
        # All processes are at the same step, so that of another number of them will do, too.
        paths = [_state_path(input_dir, rank) for rank in (accelerator.process_index, 0)]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            recorder.warn(
                f"the checkpoint {os.fspath(input_dir)} was written without a recorder; steps are "
                f"counted on from {recorder.num_steps}"
            )
            return
        with guarded(recorder, f"the recording does not go on from {path}"):
            recorder.load_state_dict(json.loads(path.read_text()))

    return load


def _state_path(folder: str | os.PathLike[str], rank: int) -> Path:
    return Path(folder) / f"sonde-rank{rank}.json"


def _showing(accelerator: Accelerator, recorder: Recorder) -> Callable[..., None]:
    """Return a hook that shows the user's TensorBoard what there is after each due step."""
    num_shown = recorder.num_records

    def show(*_: object) -> None:
        nonlocal num_shown
        if recorder.num_records == num_shown:
            return
        num_shown = recorder.num_records
        with guarded(recorder, "TensorBoard is shown nothing"):
            # They may have been made since, and on the main process only.
            writer = next(
                (t.tracker for t in accelerator.trackers if t.name == "tensorboard"), None
            )
            if writer is not None:
                for name, value in recorder.scalars.items():
                    writer.add_scalar(f"sonde/{name}", float(value), recorder.num_steps)
                writer.add_scalar("sonde/recorded_bytes", recorder.num_bytes, recorder.num_steps)

    return show
