"""For a user's own script or program: where its checkpoints and data lie, and what it reports. All of it is optional.

    from disttrain_trainer import session

    session.report(step=step, loss=loss.item(), samples=len(batch), total_steps=steps)

Outside of DistTrain nothing happens. A report never blocks and never fails. The end of the process waits until the master has the last one.

With strategy.type ParameterServer the servers train the model of a script, which has its own loop (docs/guide/scripts.md):

    ps = session.parameter_server(model)
    for inputs, targets in session.batches(dataset):
        loss = loss_function(model(inputs), targets)
        loss.backward()
        ps.step(loss)

The functions for that are the main thread's. A mistake raises TrainerError, which ends the script with one line.
"""

import atexit
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from disttrain.api import environment
from disttrain.api.runtime import JobConfig
from disttrain_trainer.net.reporter import Reporter

if TYPE_CHECKING:
    from torch import nn

    from disttrain_trainer.loop.profiler import Profiler
    from disttrain_trainer.strategies.own_loop import OwnLoop

N = TypeVar("N", int, float)

__all__ = [
    "ParameterServer",
    "batches",
    "checkpoint",
    "checkpoint_dir",
    "close",
    "data_dir",
    "parameter_server",
    "profile",
    "report",
    "restore",
]


def report(
    *, step: int | None = None, loss: float | None = None, samples: int = 0, total_steps: int | None = None
) -> None:
    """Reports the progress of this process, as often as you like.

    step: steps done. loss: mean loss of the samples since the last report. samples: how many these were, in this process.
    total_steps: steps of the whole job.
    With parameter servers the master counts steps and samples, and this does nothing: give the loss to `ParameterServer.step`.
    """
    if _own_loop() is not None:
        return
    reporter = _reporter()
    if reporter is not None:
        # In the thread that reports: a tensor may have a graph that must not be kept, and a device to wait for.
        reporter.add(
            step=_number("step", step, int),
            loss=_number("loss", loss, float),
            samples=_number("samples", samples, int),
            total_steps=_number("total_steps", total_steps, int),
        )


def profile(step: int) -> None:
    """Call it as each step begins, with its number: those that DISTTRAIN_PROFILE names are traced, such as 10:15 the steps 10 to 14.

    The trace of each process is written when the last of them is done: profile-worker-0-10-15.json, for chrome://tracing or Perfetto, in
    the folder for checkpoints, else in the current one. Without the variable nothing happens. Another value ends the program by one line.
    """
    if not os.environ.get(environment.PROFILE):
        return
    if not _profilers:
        from disttrain_trainer.errors import WrongInput
        from disttrain_trainer.loop.profiler import Profiler

        try:
            found = Profiler.of(os.environ, name=f"worker-{os.environ.get(environment.RANK) or 0}")
        except WrongInput as error:
            print(error, file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        assert found is not None
        _profilers.append(found)
        atexit.register(found.end)
    _profilers[0].before_step(step)


def close() -> None:
    """Returns when the master has what was reported, as the end of the process does; without an answer after the job's peer timeout, or a
    second after a master was lost. A later report starts again."""
    with _lock:
        reporters, _made[:] = _made[:], []
    for reporter in reporters:
        if reporter is not None:
            reporter.close()


class ParameterServer:
    """The servers that train the model of this script, in place of an optimizer."""

    def __init__(self, own: "OwnLoop") -> None:
        self._own = own

    def step(self, loss: Any = None, *, weight: float | None = None) -> None:
        """Sends the gradients of the batch to the servers. Returns when they have them and the next batch's parameters are in the model.

        Call it once for each batch of `batches`, after `loss.backward()`; gradients need no zero_grad().
        loss: the mean loss of the batch, a number or a tensor, for the status; NaN ends the job.
        weight: what it is the mean of, where that is not the samples; with `no_sync` of all micro-batches, at the last step.
        """
        self._own.step(loss, weight)

    def no_sync(self) -> AbstractContextManager[None]:
        """In it `step` sends nothing: for the micro-batches of one batch, whose gradients and losses add up. The step for the last one is
        outside."""
        return self._own.no_sync()

    def state_dict(self) -> dict[str, Any]:
        """A copy of the model's state_dict() on the CPU, as this worker pulled it last; after the loop the trained model's."""
        return self._own.state_dict()


def parameter_server(model: "nn.Module") -> ParameterServer:
    """The servers train this model, which is moved to the device of the process. Call it once, before `batches`.

    Every worker makes the same model: torch, numpy and random are seeded by trainer.seed before the script begins.
    """
    own = _need_own_loop("parameter_server")
    own.adopt(model)
    return ParameterServer(own)


def batches(
    dataset: Any, batch_size: int | None = None, *, collate: Callable[[list[Any]], Any] | None = None
) -> Iterator[Any]:
    """This worker's parts of the batches of all epochs, on the device of the process, as the master assigns them. Ends with the training.

    Each sample is trained with exactly once an epoch, by one of the workers, also when some are lost.

    dataset: map-style, the same in every worker. batch_size: of all workers together, trainer.batchSize; to be checked against it.
    collate: makes a batch of a list of samples. Default: torch's default_collate.
    """
    return _need_own_loop("batches").batches(dataset, batch_size, collate)


def checkpoint(state: dict[str, Any]) -> None:
    """Keeps a copy of this state, which goes into the next checkpoints beside the model: tensors, numbers, texts, lists and dicts of them.

    One worker's state is saved. Nothing where the job has no checkpoint volume.
    """
    _need_own_loop("checkpoint").checkpoint(state)


def restore() -> dict[str, Any] | None:
    """The state that the newest checkpoint has, tensors on the CPU; None where there is none. The servers restore model and optimizer."""
    return _need_own_loop("restore").restore()


def checkpoint_dir() -> Path | None:
    """The folder for checkpoints, which outlives this process; None when the job has no checkpoint volume, or outside of DistTrain."""
    return _folder(environment.CHECKPOINT_DIR)


def data_dir() -> Path | None:
    """The folder of the data volume; None when the job has none, or outside of DistTrain."""
    return _folder(environment.DATA_DIR)


def _own_loop() -> "OwnLoop | None":
    """What serves the script that this process runs; None where there are no parameter servers. Imports no torch."""
    module: Any = sys.modules.get("disttrain_trainer.strategies.own_loop")
    return None if module is None else module.present()


def _need_own_loop(name: str) -> "OwnLoop":
    """Ends the program, by one line, where there are no parameter servers."""
    own = _own_loop()
    if own is None:
        print(
            f"session.{name} needs strategy.type ParameterServer with trainer.script and trainer.optimizer, and the script's own "
            "process: this one has no parameter servers",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(2)
    return own


def _folder(name: str) -> Path | None:
    return Path(os.environ[name]) if os.environ.get(name) else None


def _number(name: str, value: Any, kind: type[N]) -> N | None:
    """The value as a plain number, whatever library it is of. What is none is said, and left out."""
    if value is None:
        return None
    try:
        return kind(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        warnings.warn(f"session.report ignores {name}, which is not a number: {error}", stacklevel=3)
        return None


def _world_size() -> int | None:
    """The size of the process group that this process trains in, None where that is unknown, as with another library than torch."""
    distributed: Any = sys.modules.get("torch.distributed")
    try:
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return int(distributed.get_world_size())
        # A process that torchrun started knows the size of its group before it joins it.
        return int(os.environ[environment.WORLD_SIZE]) if environment.ELASTIC_RUN_ID in os.environ else None
    except (AttributeError, KeyError, ValueError, RuntimeError):
        return None


_lock = threading.Lock()
_made: list[Reporter | None] = []
_profilers: list["Profiler"] = []
"""That of this process, made at the first step of one that is traced."""
atexit.register(close)


def _reporter() -> Reporter | None:
    """The reporter of this process, made at the first report; None outside of DistTrain."""
    with _lock:
        if not _made:
            try:
                config, _ = JobConfig.decode(os.environ.get(environment.JOB, ""))
                rank = int(os.environ.get(environment.RANK) or 0)
                round_number = 1 + int(os.environ.get(environment.RESTART_COUNT) or 0)
                _made.append(Reporter(config, rank, round_number=round_number, world_size=_world_size))
            except ValueError:
                _made.append(None)
        return _made[0]
