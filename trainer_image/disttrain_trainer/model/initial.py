"""The initial parameters of a model, made again: for servers that start over when the worker's own parameters are trained already.

The user's factory builds them from the job's seed. No copy is kept: it would cost a worker the size of the model for as long as it runs. A
sum over the bits tells whether the factory made the same parameters again.
"""

from collections.abc import Callable

import torch
from torch import nn

from disttrain.api.environment import ExitCode
from disttrain.api.runtime import JobConfig
from disttrain.api.trainer import ScriptLoop
from disttrain_trainer.errors import TrainerError
from disttrain_trainer.model.factories import resolve
from disttrain_trainer.model.flat import Vectors, copy_into
from disttrain_trainer.model.task import factory_seeds
from disttrain_trainer.model.user_code import guarded

BLOCK = 1 << 20
"""Elements that are summed at a time."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FactoryNotRepeatable(TrainerError):
    """The factory does not make the same model again, as when it returns one that it keeps: this process must end, and a new one start."""

    exit_code = ExitCode.PEER_LOST


class InitialParameters:
    """The parameters and buffers of a new model."""

    def __init__(
        self, config: JobConfig, parameters: Vectors, *, prepare: Callable[[nn.Module], None] = lambda model: None
    ) -> None:
        """parameters: those of a new model, whose sums are remembered. prepare: what was done to the factory's model before."""
        self._trainer = config.trainer
        self._prepare = prepare
        self._sums = sums_of_bits(parameters)

    def restore(self, parameters: Vectors) -> nn.Module:
        """Sets the parameters to their first values; returns a new model, which has the buffers. Raises FactoryNotRepeatable."""
        trainer, factory = self._trainer, self._trainer.loop.model
        if isinstance(trainer.work, ScriptLoop):
            raise FactoryNotRepeatable(
                "the servers begin again, and this script's first model is gone: a new process has to make it"
            )
        with guarded("trainer.model"), factory_seeds(trainer.seed):
            model = resolve("trainer.model", factory)(dict(trainer.config or {}))
        self._prepare(model)
        copy_into(parameters, model)
        if sums_of_bits(parameters) != self._sums:
            raise FactoryNotRepeatable(
                f"trainer.model: {factory!r} did not make the same model a second time, and the training must start again: "
                "a new process has to"
            )
        return model  # type: ignore[no-any-return]


def sums_of_bits(vectors: Vectors) -> list[int]:
    """Equal for equal bits, whatever the numbers mean; as fast as memory is read."""
    sums = []
    for vector in vectors:
        integers = vector.view(_INTEGERS[vector.dtype.itemsize])
        blocks = (integers[start : start + BLOCK] for start in range(0, integers.numel(), BLOCK))
        sums.append(sum(int(block.sum(dtype=torch.int64)) for block in blocks))
    return sums
