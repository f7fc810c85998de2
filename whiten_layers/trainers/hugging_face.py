"""Callback for Hugging Face's `Trainer`."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints import plain_state_dict
from ..report import report

logger = logging.getLogger("whiten_layers")


class WhiteningCallback(TrainerCallback):
    """Callback that logs what whitening does, and saves plain weights beside what the trainer saves.

    Whenever the trainer logs, so does this: the summary of `report` to the logger "whiten_layers", at level INFO, and
    the numbers of `Report.numbers` to a writer. Each checkpoint gets a folder ``plain`` that `from_pretrained` reads:
    the checkpoint's own weights have the state of whitening too, and training goes on from them.

    Args:
        writer: a `SummaryWriter` of TensorBoard or a run of Weights & Biases; None for the logger alone.
        plain_weights: name of the folder within a checkpoint; None for none.
    """

    def __init__(self, writer: Any = None, plain_weights: str | None = "plain") -> None:
        self.writer, self.plain_weights = writer, plain_weights

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if state.is_world_process_zero:
            result = report(given["model"])
            logger.info("%s", result)
            if self.writer is not None:
                result.log(self.writer, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if self.plain_weights is not None and state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / self.plain_weights
            model = given["model"]
            model.save_pretrained(folder, state_dict=plain_state_dict(model))
