"""The mesh of a job's training processes: along which axes a model and its batches are divided, and where each rank stands in it.

Four axes, the outermost first: pipeline, replicate, shard, tensor. Ranks are numbered along them as the elements of an array in C order, so
that ranks of one tensor group are neighbours, mostly of one machine. Pure: shared by the operator, the master and the workers.

- pipeline: stages of the model, one after the other.
- replicate: copies of the same parameters; shard: each copy's parameters are cut over these ranks. Both together are data parallel: their
  ranks compute different parts of a batch.
- tensor: ranks that share each layer, and compute the same part.
"""

from dataclasses import dataclass
from itertools import product

from disttrain.api.strategy import Sharding, Strategy

AXES = ("pipeline", "replicate", "shard", "tensor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinate:
    """Where a rank stands, on each axis from 0."""

    pipeline: int
    replicate: int
    shard: int
    tensor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The sizes of the axes."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, strategy: Strategy, *, workers: int, processes: int) -> "Mesh":
        """The mesh of a job with so many workers of so many training processes each. Raises ValueError, with the arithmetic, when they
        make none."""
        cut, world = strategy.model_parallel, workers * processes
        pipeline, tensor = (cut.pipeline, cut.tensor) if cut is not None else (1, 1)
        data, rest = divmod(world, pipeline * tensor)
        if rest or not data:
            raise ValueError(
                f"strategy.modelParallel: tensor {tensor} x pipeline {pipeline} = {tensor * pipeline} processes for each part, and "
                f"the job has {workers} workers x {processes} = {world}: make that a multiple"
            )
        shard = 1
        if strategy.sharding is Sharding.FULLY_SHARD:
            shard = data
        elif strategy.sharding is Sharding.HYBRID_SHARD:
            shard = shard_size(strategy, processes)
        if data % shard:
            raise ValueError(
                f"strategy.dataParallel.shardSize: {shard} processes share a copy of the model, and {data} are data parallel "
                f"({world} / {tensor * pipeline}): that is no multiple; change shardSize or worker.replicas"
            )
        return cls(pipeline=pipeline, replicate=data // shard, shard=shard, tensor=tensor)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The sizes in the order of AXES."""
        return self.pipeline, self.replicate, self.shard, self.tensor

    @property
    def size(self) -> int:
        """Ranks."""
        return self.pipeline * self.replicate * self.shard * self.tensor

    @property
    def data(self) -> int:
        """Data-parallel members: groups of ranks that compute different parts of a batch."""
        return self.replicate * self.shard

    def coordinate(self, rank: int) -> Coordinate:
        """Where a rank stands."""
        rest, tensor = divmod(rank, self.tensor)
        rest, shard = divmod(rest, self.shard)
        pipeline, replicate = divmod(rest, self.replicate)
        return Coordinate(pipeline=pipeline, replicate=replicate, shard=shard, tensor=tensor)

    def rank(self, at: Coordinate) -> int:
        """The rank that stands there."""
        return ((at.pipeline * self.replicate + at.replicate) * self.shard + at.shard) * self.tensor + at.tensor

    def data_rank(self, rank: int) -> int:
        """The rank's number among the data-parallel members; ranks that share it compute the same parts."""
        at = self.coordinate(rank)
        return at.replicate * self.shard + at.shard

    def replicas_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same piece of the model's state as this one, itself included."""
        return next(ranks for ranks in self.replicas() if rank in ranks)

    def data_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks that compute other parts with the same part of the model, by their data rank."""
        at = self.coordinate(rank)
        return tuple(
            self.rank(Coordinate(pipeline=at.pipeline, replicate=replicate, shard=shard, tensor=at.tensor))
            for replicate, shard in product(range(self.replicate), range(self.shard))
        )

    def counts(self, rank: int) -> bool:
        """Whether this rank speaks for its data-parallel member: of its ranks one counts samples, losses and weights, which the last
        stage knows."""
        at = self.coordinate(rank)
        return at.tensor == 0 and at.pipeline == self.pipeline - 1

    def replicas(self) -> tuple[tuple[int, ...], ...]:
        """For each piece of the model's state the ranks that hold it: those that differ in nothing but their copy."""
        return tuple(
            tuple(
                self.rank(Coordinate(pipeline=pipeline, replicate=replicate, shard=shard, tensor=tensor))
                for replicate in range(self.replicate)
            )
            for pipeline, shard, tensor in product(range(self.pipeline), range(self.shard), range(self.tensor))
        )


def shard_size(strategy: Strategy, processes: int) -> int:
    """HybridShard: processes that share one copy of the model. processes: training processes of a worker.

    Those of one pod are of one stage of a pipeline, and `tensor` of them share each layer.
    """
    own = strategy.data_parallel.shard_size if strategy.data_parallel is not None else 0
    tensor = strategy.model_parallel.tensor if strategy.model_parallel is not None else 1
    return own or max(1, processes // tensor)
