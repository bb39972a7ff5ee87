"""Record what an Ignite engine trains, by a handler."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sonde.exceptions import MissingExtraError
from sonde.hooks import Recorder
from sonde.hooks.config.config import Config, as_config
from sonde.log.format.endings import why_ended

from ._batches import tell_ids
from ._starting import Trainings, guarded

try:
    from ignite.engine import Engine, Events
except ImportError as error:
    raise MissingExtraError("ignite", "pytorch-ignite") from error


class SondeHandler:
    """Records the training that an engine runs.

    Steps are counted by the optimizer, epochs by the engine; `Scalars` notes what the engine puts
    out, where that is a number or a mapping of numbers. Ids are read from the engine's batch where
    `id_key` says so: the name of an entry, or a position in batches that are tuples. An engine
    keeps the loss to itself: wrap the loss function by `watch_loss`, and with `reduction` gradients
    in band are those of single examples.

    A checkpoint holds where the recording was if the handler is among what is saved, and the run is
    gone on with if it is among what is loaded before the engine runs. An evaluator needs no handler
    and is not recorded.

    Args:
        config: A `Config`, or the run directory.
        model: The model that is trained.
        optimizer: Its optimizer.
        options: What `Config` takes besides, and `Recorder`.

    Raises:
        InvalidInputError: If an argument does not fit.

    Attributes:
        recorder: The recorder, from the beginning of the training on.

    Example::

        handler = SondeHandler("runs/seed0", model, optimizer).attach(trainer)
        checkpoint = Checkpoint({"trainer": trainer, "sonde": handler, …}, "checkpoints")
    """

    def __init__(
        self,
        config: Config | str | os.PathLike[str],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **options: Any,
    ) -> None:
        self._config = as_config(config, options)
        self._model = model
        self._optimizer = optimizer
        self._loaded: Mapping[str, Any] | None = None
        self._trainings = Trainings(self._config)
        self.recorder: Recorder | None = None

    def attach(self, engine: Engine) -> SondeHandler:
        """Record what an engine trains; attach it before what saves checkpoints.

        Args:
            engine: The engine that trains.

        Returns:
            The handler.
        """
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._tell_batch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._end_iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
        engine.add_event_handler(Events.COMPLETED, self._end)
        engine.add_event_handler(Events.TERMINATE, self._end)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._end_by_exception)
        return self

    def watch_loss(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a loss function that tells the recorder of each loss that is trained on.

        Args:
            loss: The loss function.

        Returns:
            A function that returns the same.
        """

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            value = loss(*args, **kwargs)
            recorder, reduction = self.recorder, self._config.reduction
            if recorder is not None and reduction is not None and recorder.is_observing:
                with guarded(recorder, "the loss cannot be read"):
                    if value.requires_grad:
                        recorder.batch(loss=value, reduction=reduction)
            return value

        return watched

    def close(self, reason: str = "closed") -> None:
        """Close the run; safe to call twice."""
        if self.recorder is not None:
            self.recorder.close(reason)

    def state_dict(self) -> dict[str, Any]:
        """Return the recorder's state, for a checkpoint."""
        if self.recorder is not None:
            with guarded(self.recorder, "the checkpoint lacks the recorder's state"):
                return self.recorder.state_dict()
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the recorder's state in a checkpoint until the engine runs."""
        self._loaded = state or None

    def _start(self, engine: Engine) -> None:
        self.close()
        loaded, self._loaded = self._loaded, None
        was_recorded = loaded is not None or self.recorder is not None
        if not engine.state.iteration:
            loaded = None
        elif self.recorder is not None and loaded is None:  # The same engine runs on.
            loaded = self.recorder.state_dict(sync=False)
        elif loaded is None:
            epoch = engine.state.epoch
            loaded = {"version": 1, "num_steps": engine.state.iteration, "num_epochs": epoch}
        self.recorder = self._trainings.begin(self._model, self._optimizer, loaded)
        if self.recorder is None:
            return
        if loaded is not None and not was_recorded:
            self.recorder.warn(
                "the checkpoint holds no state of the handler; steps are counted on from "
                f"{engine.state.iteration}, the number of the engine's iterations"
            )
        self._count_epochs(engine)

    def _tell_batch(self, engine: Engine) -> None:
        if self.recorder is not None and self._config.id_key is not None:
            tell_ids(self.recorder, engine.state.batch, self._config.id_key)

    def _end_iteration(self, engine: Engine) -> None:
        if self.recorder is None:
            return
        with guarded(self.recorder, "what the engine puts out cannot be read"):
            self.recorder.log(**_numbers(engine.state.output))
        self._count_epochs(engine)

    def _end_epoch(self, engine: Engine) -> None:
        """Count an epoch whose length nobody knew."""
        if self.recorder is not None and self.recorder.num_epochs < engine.state.epoch:
            self.recorder.epoch()

    def _end(self, engine: Engine) -> None:
        self._trainings.end()
        self.close()

    def _end_by_exception(self, engine: Engine, error: BaseException) -> None:
        """Close the run, and let the exception go on as it would have without the handler.

        Raises:
            BaseException: That which was raised, if nobody else handles it.
        """
        self.close(why_ended(error))
        # Private, but an engine that has any handler of exceptions raises them no more.
        if len(engine._event_handlers[Events.EXCEPTION_RAISED]) == 1:
            raise error

    def _count_epochs(self, engine: Engine) -> None:
        """Count an epoch with its last iteration, as checkpoints after it hold it already."""
        length = engine.state.epoch_length
        if self.recorder is not None and length:
            if self.recorder.num_epochs < engine.state.iteration // length:
                self.recorder.epoch()


def _numbers(output: Any) -> dict[str, Any]:
    """Return what of an engine's output is a number, by name; one that has none is the loss."""
    named = output if isinstance(output, Mapping) else {"loss": output}
    return {
        str(name): value
        for name, value in named.items()
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    }
