"""Before the first step of a job one process tries the user's `evaluate`: its mistakes are not to be seen after hours of training alone."""

from functools import partial

from disttrain_trainer.checkpoint import store
from disttrain_trainer.checkpoint.course import require_metrics
from disttrain_trainer.model.task import Task
from disttrain_trainer.runtime import machine
from disttrain_trainer.runtime.process import Process

_SHARE = 16
"""Of the memory that a copy of a model may take which is cut over the workers: no process needs all of a larger one (model/mapped.py)."""


def attempt(task: Task, process: Process) -> None:
    """Rank 0 of a job that has no checkpoint yet. Raises WrongInput, and what the user's code raises."""
    config, root = process.config, process.checkpoint_dir
    if task.evaluate is None or process.rank or (root is not None and store.folders(root)):
        return
    if config.strategy.is_sharded:
        size = sum(tensor.nbytes for tensor in (*task.model.parameters(), *task.model.buffers()))
        if task.device.type != "cpu" or size > machine.memory() // _SHARE:
            return  # another whole model may be more than the process has room for
    task.evaluate.attempt(task.model, partial(require_metrics, config=config))
