"""Makes the hosts of a server's shards: of what they begin with, and as what."""

from collections.abc import Callable
from pathlib import Path

from disttrain.api.runtime import JobConfig
from disttrain.api.strategy import ParameterServerStrategy
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.model.parameter_groups import Groups
from disttrain_trainer.parameter_server import recut
from disttrain_trainer.parameter_server.optimizer import Optimizer
from disttrain_trainer.parameter_server.replicated_host import ReplicatedHost
from disttrain_trainer.parameter_server.shard_file import ShardFile


class HostFactory:
    """For the shards of one job. Its methods raise WrongInput where a file does not fit the job."""

    def __init__(
        self,
        config: JobConfig,
        strategy: ParameterServerStrategy,
        *,
        optimizer: Callable[[], Optimizer],
        on_staleness: Callable[[int], None] | None,
        on_sum: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._strategy = strategy
        self._optimizer = optimizer
        self._on_staleness = on_staleness
        self._on_sum = on_sum
        self._clip = config.trainer.max_gradient_norm if strategy.local_steps == 1 else None
        """With local steps the workers clip their own steps, and what comes here are changes."""

    def load(self, checkpoint: Path, shard: int) -> ShardFile:
        """A shard of a checkpoint: its file, or a folder of another cut."""
        if not checkpoint.is_dir():
            return ShardFile.load(checkpoint, Manifest.digest_beside(checkpoint))
        return recut.load(
            checkpoint,
            server=shard,
            servers=self._config.parameter_servers,
            sync=self._config.strategy.synchronous,
            optimizer=self._optimizer().name,
        )

    def primary(self, round_number: int, shard: int, file: ShardFile | None) -> ReplicatedHost:
        """A shard that begins a round, from this file or without parameters."""
        return self._new(round_number, shard, file, term=1, is_primary=True)

    def copy(self, round_number: int, shard: int, file: ShardFile, term: int, groups: Groups = ()) -> ReplicatedHost:
        """The copy of a shard, from the snapshot of its primary of that term. groups: of its elements, as the primary knows them."""
        return self._new(round_number, shard, file, term=term, is_primary=False, groups=groups)

    def _new(
        self, round_number: int, shard: int, file: ShardFile | None, *, term: int, is_primary: bool, groups: Groups = ()
    ) -> ReplicatedHost:
        return ReplicatedHost(
            number=round_number,
            shard=shard,
            shards=self._config.parameter_servers,
            parts_per_step=self._config.parts_per_step,
            strategy=self._strategy,
            optimizer=self._optimizer(),
            checkpoint=file,
            term=term,
            groups=groups,
            is_primary=is_primary,
            schedule=None if self._strategy.outer_optimizer else self._config.trainer.learning_rate_schedule,
            observe_staleness=self._on_staleness,
            clip=self._clip,
            on_sum=self._on_sum,
        )
