"""What a round of parameter servers began from, for the workers that are invited into it. Pure."""

from collections.abc import Callable

from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import resuming
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.manifest import NAME as MANIFEST
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.checkpoint.store import BUFFERS, STATE, another_training, name_of
from disttrain_trainer.data.schedule import DataSet


class StartState:
    """The newest checkpoint; without one the training begins from its initial parameters."""

    def __init__(self, newest: Callable[[], Manifest | None], config: JobConfig) -> None:
        self._newest = newest
        self._config = config

    @property
    def from_scratch(self) -> bool:
        """There is no checkpoint."""
        return self._newest() is None

    @property
    def course(self) -> Course:
        """That of the checkpoint."""
        newest = self._newest()
        return newest.course if newest is not None else Course()

    @property
    def buffers(self) -> str | None:
        """The file of the workers' buffers, from the checkpoint folder on."""
        newest = self._newest()
        if newest is None:
            return None
        # Of a model that was cut over its ranks each file has some of them: the manifest says where.
        file = newest.file_of(BUFFERS) or newest.file_of(STATE) or (MANIFEST if newest.tensors else None)
        return f"{name_of(newest.step)}/{file}" if file else None

    def misfit(self, data: DataSet) -> str | None:
        """Why workers with this data set cannot go on from it; None when they can."""
        newest = self._newest()
        problem = resuming.misfit(newest.data, resuming.data_of(self._config, data)) if newest else None
        return None if newest is None or problem is None else another_training(newest, problem)
