"""Record what `lightning.Trainer` trains, by a callback."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sonde.exceptions import MissingExtraError
from sonde.hooks import Recorder
from sonde.hooks.config.config import Config, as_config
from sonde.log.format.endings import why_ended

from ._batches import tell_ids
from ._starting import Trainings, guarded

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingExtraError("lightning", "lightning") from error


class SondeCallback(Callback):
    """Records the training of a Lightning `Trainer`.

    The model is the LightningModule, which a probe calls by its `forward`; steps are those of its
    first optimizer. Epochs are counted by themselves, and `Scalars` notes the loss of the latest
    micro-batch and, after a validation or an epoch, what the module has logged. Checkpoints hold
    where the recording was: `trainer.fit(…, ckpt_path=…)` goes on with the run. Neither the sanity
    check nor a validation is recorded.

    Ids are read from the batch where `id_key` says so: the name of an entry, or a position in
    batches that are tuples. With `reduction`, gradients in band are those of single examples: the
    division by the accumulated micro-batches and a GradScaler are taken out.

    Args:
        config: A `Config`, or the run directory.
        options: What `Config` takes besides, and `Recorder`.

    Raises:
        InvalidInputError: If an argument does not fit.

    Attributes:
        recorder: The recorder, from the beginning of the training on.

    Example::

        trainer = lightning.Trainer(max_epochs=3, callbacks=[SondeCallback("runs/seed0")])
        trainer.fit(module, loader)
    """

    def __init__(self, config: Config | str | os.PathLike[str], **options: Any) -> None:
        self._config = as_config(config, options)
        self._loaded: Mapping[str, Any] | None = None
        self._trainings = Trainings(self._config)
        self.recorder: Recorder | None = None

    def close(self, reason: str = "closed") -> None:
        """Close the run; safe to call twice."""
        if self.recorder is not None:
            self.recorder.close(reason)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the recorder; what is wrong with the arguments is raised before the first training.

        A trainer that begins again is recorded again, and nothing is raised.
        """
        self.close()
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        state = self._state(trainer)
        self.recorder = self._trainings.begin(pl_module, optimizer, state)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the ids of the batch that comes."""
        if self.recorder is not None and self._config.id_key is not None:
            tell_ids(self.recorder, batch, self._config.id_key)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Note the loss, as it was before it was scaled for the backward pass."""
        recorder = self.recorder
        if recorder is None:
            return
        with guarded(recorder, "the loss cannot be read"):
            divided_by = trainer.accumulate_grad_batches
            # In half precision it comes multiplied already.
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            value = loss.detach()
            if scaler is not None:
                value = value / scaler.scale(torch.ones_like(value))
            recorder.log(loss=value if divided_by == 1 else value * divided_by)
            if self._config.reduction is not None and recorder.is_observing:
                scale = 1.0 if scaler is None else scaler.get_scale()
                recorder.batch(
                    loss=loss, reduction=self._config.reduction, divided_by=divided_by / scale
                )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count an epoch with its last step, as a checkpoint after that step holds it already."""
        self._count_epochs(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count an epoch that ended early, and note what the module has logged."""
        self._log_metrics(trainer)
        self._count_epochs(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the module has logged."""
        self._log_metrics(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the training came to its end."""
        self._trainings.end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the run, and say in the log why."""
        self.close(why_ended(exception))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the run."""
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the recorder's state, for a checkpoint."""
        if self.recorder is not None:
            with guarded(self.recorder, "the checkpoint lacks the recorder's state"):
                return self.recorder.state_dict()
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the recorder's state in a checkpoint until the training begins."""
        self._loaded = state_dict

    def _state(self, trainer: Trainer) -> Mapping[str, Any] | None:
        """Return where the recording goes on, if the training does not begin anew."""
        loaded, self._loaded = self._loaded, None
        if trainer.global_step == 0:
            return None
        if loaded is not None:
            return loaded
        if self.recorder is not None:  # The same trainer trains on.
            return self.recorder.state_dict(sync=False)
        # A checkpoint that was written without the callback.
        return {
            "version": 1,
            "num_steps": trainer.global_step,
            "num_epochs": trainer.current_epoch,
        }

    def _count_epochs(self, trainer: Trainer) -> None:
        if self.recorder is not None and trainer.is_last_batch:
            if self.recorder.num_epochs <= trainer.current_epoch:
                self.recorder.epoch()

    def _log_metrics(self, trainer: Trainer) -> None:
        if self.recorder is not None and not trainer.sanity_checking:
            with guarded(self.recorder, "the metrics cannot be read"):
                self.recorder.log(**trainer.callback_metrics)
