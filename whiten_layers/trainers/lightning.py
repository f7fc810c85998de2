"""Callback for Lightning's `Trainer`."""

from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from ..checkpoints import plain_state_dict
from ..options import check, is_count
from ..report import report


class WhiteningCallback(Callback):
    """Callback that logs what whitening does, and saves plain weights beside what Lightning saves.

    The numbers of `Report.numbers` go to the trainer's loggers at the end of every so many epochs. When training ends,
    the plain network's state dict is written to ``plain.pt`` in the folder of the trainer, by its first process:
    Lightning's own checkpoints have the state of whitening too, and training goes on from them.

    Args:
        every_n_epochs: epochs between two reports, at least 1.
        plain_weights: name of the file in the trainer's ``default_root_dir``; None for no file.

    Raises:
        ValueError: an option has a value that is not allowed.
    """

    def __init__(self, every_n_epochs: int = 1, plain_weights: str | None = "plain.pt") -> None:
        check("every_n_epochs", every_n_epochs, is_count(every_n_epochs), "an integer of at least 1")
        self.every_n_epochs, self.plain_weights = every_n_epochs, plain_weights

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0 and trainer.is_global_zero:
            numbers = report(pl_module).numbers()
            for logger in trainer.loggers:
                logger.log_metrics(numbers, trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.plain_weights is not None and trainer.is_global_zero:
            torch.save(plain_state_dict(pl_module), Path(trainer.default_root_dir) / self.plain_weights)
