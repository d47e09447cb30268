"""A callback for Lightning's Trainer:

from disttrain_trainer.integrations.lightning import DistTrainCallback, newest_checkpoint

checkpoints = ModelCheckpoint(dirpath=session.checkpoint_dir(), every_n_train_steps=100)
trainer = Trainer(callbacks=[DistTrainCallback(), checkpoints])
trainer.fit(model, data, ckpt_path=newest_checkpoint())
"""

import zipfile
from pathlib import Path
from typing import Any

from disttrain_trainer import session
from disttrain_trainer.integrations.pace import Pace, batch_size

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback


class DistTrainCallback(Callback):  # type: ignore[misc]  # Lightning is not there when types are checked
    """Reports step, loss, samples and the number of steps of a training."""

    def __init__(self) -> None:
        super().__init__()
        self._pace = Pace()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Reports a batch."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            loss = loss * trainer.accumulate_grad_batches  # Lightning has divided it
        step, total = trainer.global_step, _total(trainer)
        last = total is not None and step >= total
        self._pace.report(step=step, loss=loss, samples=batch_size(batch), total_steps=total, last=last)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Reports the last step, wherever the training stopped."""
        self._pace.report(step=trainer.global_step, loss=None, samples=0, total_steps=_total(trainer), last=True)


def newest_checkpoint() -> str | None:
    """The newest whole checkpoint in `session.checkpoint_dir()`, for `Trainer.fit(ckpt_path=…)`; None where there is none.

    A file that was being written when the job was killed is passed over.
    """
    folder = session.checkpoint_dir()
    files = sorted(folder.rglob("*.ckpt"), key=_written, reverse=True) if folder is not None else []
    return next((str(file) for file in files if zipfile.is_zipfile(file)), None)


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # another process has removed it
        return 0.0


def _total(trainer: Any) -> int | None:
    """Steps of the whole training; None where it has no end."""
    total = trainer.estimated_stepping_batches
    return int(total) if 0 < total < float("inf") else None
