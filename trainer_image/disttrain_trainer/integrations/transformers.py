"""A callback for Hugging Face's Trainer:

    from disttrain_trainer.integrations.transformers import DistTrainCallback, newest_checkpoint

    arguments = TrainingArguments(output_dir=session.checkpoint_dir() or "out", save_steps=100, …)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[DistTrainCallback()])
    trainer.train(resume_from_checkpoint=newest_checkpoint())

Without it the Trainer still reports each five seconds, by a callback of its own (docs/guide/scripts.md).
"""

import re
from typing import Any

from transformers import TrainerCallback

from disttrain_trainer import session
from disttrain_trainer.integrations.pace import Pace

_FOLDER = re.compile(r"checkpoint-(\d+)")
_WRITTEN_LAST = "trainer_state.json"
"""The Trainer writes it when the rest of a checkpoint is there."""


class DistTrainCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not there when types are checked
    """Reports step, loss, samples and the number of steps of a training."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._loss: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports a step. Each process reports its own samples."""
        samples = args.train_batch_size * args.gradient_accumulation_steps
        total = state.max_steps if state.max_steps > 0 else None
        last = total is not None and state.global_step >= total
        self._pace.report(step=state.global_step, loss=self._loss, samples=samples, total_steps=total, last=last)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The loss is known where the Trainer logs it, on all processes alike (logging_steps)."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports the last step, wherever the training stopped."""
        self._pace.report(step=state.global_step, loss=self._loss, samples=0, total_steps=None, last=True)


def newest_checkpoint() -> str | None:
    """The newest whole checkpoint in `session.checkpoint_dir()`, for `Trainer.train(resume_from_checkpoint=…)`; None where there is none.

    A folder that was being written when the job was killed is passed over.
    """
    folder = session.checkpoint_dir()
    if folder is None or not folder.is_dir():
        return None
    found = [(int(name[1]), path) for path in folder.iterdir() if (name := _FOLDER.fullmatch(path.name))]
    whole = [path for _, path in sorted(found, reverse=True) if (path / _WRITTEN_LAST).is_file()]
    return str(whole[0]) if whole else None
