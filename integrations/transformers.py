"""Record what `transformers.Trainer` trains, by a callback."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sonde.exceptions import InvalidInputError, MissingExtraError
from sonde.hooks import Recorder
from sonde.hooks.config.config import Config, as_config
from sonde.hooks.model.taps import add_hook

from ._batches import tell_batches
from ._starting import Trainings, guarded, stepping_optimizer

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import TrainerControl, TrainerState
    from transformers.training_args import TrainingArguments
except ImportError as error:
    raise MissingExtraError("transformers", "transformers") from error

# Under which the Trainer's own state, and with it every checkpoint, holds that of the recorder.
_STATE = "sonde"
# How fast it runs is nothing of the training; the optimizer itself says the learning rate.
_NOT_LOGGED = ("_runtime", "_per_second", "learning_rate", "epoch", "total_flos")


class SondeCallback(TrainerCallback):
    """Records the training of a `Trainer`.

    Steps and epochs are counted by themselves, what the Trainer logs is noted for `Scalars`, and
    each of its checkpoints holds where the recording was: `trainer.train(resume_from_checkpoint=…)`
    goes on with the run. The Trainer tells nothing of an exception that ends the training; the run
    is then closed at the end of the process, or by `close()`.

    A callback sees neither batch nor loss. Ids are read from what the model is called with, where
    `id_key` says so; a Trainer drops what the model's forward does not name unless its
    `remove_unused_columns` is False. With `reduction`, the `loss` among the model's outputs scales
    the gradients, unless the Trainer makes it a sum over all accumulated micro-batches; models that
    say `accepts_loss_kwargs = False` keep a mean of their own.

    Args:
        config: A `Config`, or the run directory.
        options: What `Config` takes besides, and `Recorder`.

    Raises:
        InvalidInputError: If an argument does not fit.

    Attributes:
        recorder: The recorder, from the beginning of the training on.

    Example::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[SondeCallback("runs/seed0")])
        trainer.train()
    """

    def __init__(self, config: Config | str | os.PathLike[str], **options: Any) -> None:
        self._config = as_config(config, options)
        if isinstance(self._config.id_key, int):
            raise InvalidInputError(
                f"`id_key` (={self._config.id_key}) must be a name; batches are mappings here"
            )
        self._trainings = Trainings(self._config)
        self.recorder: Recorder | None = None
        self._ends: list[Callable[[], None]] = []
        self._num_begun = 0
        self._losses: _Losses | None = None

    def close(self) -> None:
        """Close the run, and leave the model as it was; safe to call twice."""
        for end in self._ends:
            end()
        self._ends = []
        if self.recorder is not None:
            self.recorder.close()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Make the recorder; what is wrong with the arguments is raised before the first training.

        A trainer that begins again is recorded again, and nothing is raised.
        """
        self.close()
        model = kwargs["model"]
        optimizer = stepping_optimizer(kwargs["optimizer"])
        self.recorder = self._trainings.begin(model, optimizer, _saved(state))
        if self._config.id_key is not None:
            self._ends.append(tell_batches(self.recorder, model, self._config.id_key))
        if self.recorder is None:
            return
        if self._config.reduction is not None:
            self._ends.append(_tell_losses(self.recorder, model, self._config.reduction))
        if args.logging_nan_inf_filter:
            self._losses = _Losses()
            self._ends.append(add_hook(model, self._losses.take))
        self._keep(state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Count an epoch with its last step, as a checkpoint after that step holds it already."""
        self._count_epochs(state)
        self._keep(state, sync=control.should_save)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Count an epoch that ended early, or whose length nobody knew."""
        is_cut_off = control.should_training_stop
        self._count_epochs(state, at_least=0 if is_cut_off else self._num_begun)
        self._keep(state, sync=control.should_save)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Note which epoch begins."""
        if self.recorder is not None:
            self._num_begun = self.recorder.num_epochs + 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note what the Trainer logs, and a loss that is not finite as what it is."""
        if self.recorder is None:
            return
        numbers = {
            name: value
            for name, value in (logs or {}).items()
            if isinstance(value, int | float) and not name.endswith(_NOT_LOGGED)
        }
        if self._losses is not None and "loss" in numbers:
            with guarded(self.recorder, "the loss cannot be read"):
                numbers["loss"] = self._losses.unfiltered(numbers, self.recorder)
        self.recorder.log(**numbers)
        self._keep(state)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Force to the disk what was recorded before the checkpoint, on every rank."""
        self._keep(state, sync=True)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Close the run."""
        self._trainings.end()
        self.close()

    def _count_epochs(self, state: TrainerState, at_least: int = 0) -> None:
        if self.recorder is not None:
            num_epochs = max(int(state.epoch or 0), at_least)
            if self.recorder.num_epochs < num_epochs:
                self.recorder.epoch()

    def _keep(self, state: TrainerState, *, sync: bool = False) -> None:
        """Put the recorder's state into the Trainer's, which comes back on every rank."""
        if self.recorder is not None:
            with guarded(self.recorder, "the checkpoint lacks the recorder's state"):
                _states(state)[_STATE] = self.recorder.state_dict(sync=sync)


class _Losses:
    """The losses of a model since the Trainer has last logged one.

    By `logging_nan_inf_filter`, its default, the Trainer leaves a loss that is NaN or infinite out
    of the mean that it logs; where no other is left, it logs 0.
    """

    _MOST = 256  # Losses that are held one by one.

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def take(self, _: nn.Module, __: Any, ___: Any, output: Any) -> None:
        """Take the loss among the outputs of a training pass, without waiting for a device."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if isinstance(output, tuple) and output:
            loss = output[0]  # As the Trainer has it.
        if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
            self._held.append(loss.detach().reshape(()))
            if len(self._held) >= self._MOST:
                self._held = [torch.stack(self._held).sum()]

    def unfiltered(self, logs: Mapping[str, float], recorder: Recorder) -> float:
        """Return the loss that was logged, or NaN or infinity where one was left out of it."""
        held, self._held = self._held, []
        if not held:
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                recorder.warn(
                    "the gradients are not finite, and the Trainer logs a loss that is not finite "
                    "as 0 (logging_nan_inf_filter); the model's outputs have no `loss` to see it by"
                )
            return logs["loss"]
        total = float(torch.stack(held).sum())
        return logs["loss"] if math.isfinite(total) else total


def _saved(state: TrainerState) -> Mapping[str, Any] | None:
    """Return the recorder's state in the checkpoint that a training goes on from, if it does."""
    if not state.global_step:
        return None
    saved = _states(state).get(_STATE)
    if saved is None:  # It was written without the callback.
        return {"version": 1, "num_steps": state.global_step, "num_epochs": int(state.epoch or 0)}
    return cast("dict[str, Any]", saved)


def _states(state: TrainerState) -> dict[str, Any]:
    """Return what the Trainer's state, and with it every checkpoint, holds of callbacks by name."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def _tell_losses(
    recorder: Recorder, model: nn.Module, reduction: Literal["mean", "sum"]
) -> Callable[[], None]:
    """Tell a recorder of the loss among the model's outputs; return a function that ends it."""

    def after(_: nn.Module, __: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if recorder.is_observing and torch.is_grad_enabled():
            with guarded(recorder, "the loss cannot be read"):
                tell(kwargs, output)

    def tell(kwargs: Mapping[str, Any], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if kwargs.get("num_items_in_batch") is not None:
            recorder.warn(
                "gradients keep their scale: the Trainer makes the loss a sum over all accumulated "
                "micro-batches (num_items_in_batch), not a mean or sum over one; a model with "
                "accepts_loss_kwargs = False keeps a loss of its own"
            )
        elif isinstance(loss, Tensor) and loss.requires_grad:
            recorder.batch(loss=loss, reduction=reduction)
        else:
            recorder.warn("gradients keep their scale: the model's outputs have no `loss`")

    return add_hook(model, after)
