"""spec.strategy: how the training is distributed. Not here: how many pods it takes (spec.py)."""

from enum import StrEnum
from typing import Annotated, TypeAlias

from pydantic import Field, StrictBool, StrictInt

from disttrain.api.base import Model, Rule
from disttrain.api.types import Fraction, Number, NumberBelow1


class StrategyType(StrEnum):
    DATA_PARALLEL = "DataParallel"
    """Every worker has the whole model; gradients are averaged by all-reduce."""
    PARAMETER_SERVER = "ParameterServer"
    """Servers hold the parameters, workers send gradients."""
    MODEL_PARALLEL = "ModelParallel"
    """The model is cut into tensor and pipeline parts."""
    HYBRID = "Hybrid"
    """Model parallel groups, data parallel between them."""


class Sharding(StrEnum):
    REPLICATED = "Replicated"
    """DDP: a full copy on every worker."""
    FULLY_SHARD = "FullyShard"
    """FSDP2: parameters, gradients and optimiser state are cut over all workers."""
    HYBRID_SHARD = "HybridShard"
    """FSDP2 within a node, copies between nodes."""


class Consistency(StrEnum):
    SYNC = "Sync"
    """Each step is applied once, from the gradients of the whole batch (BSP)."""
    ASYNC = "Async"
    """Each gradient is applied at once."""
    BOUNDED_STALENESS = "BoundedStaleness"
    """As Async, but no worker is more than maxStaleness steps ahead of the slowest (SSP, Ho et al., NIPS 2013)."""


class StaleLearningRate(StrEnum):
    CONSTANT = "Constant"
    """Every gradient is applied with the whole learning rate."""
    INVERSE = "Inverse"
    """With the learning rate / staleness, from a staleness of 2 on (Zhang et al., IJCAI 2016, arXiv 1511.05950)."""


class Schedule(StrEnum):
    GPIPE = "GPipe"
    ONE_FORWARD_ONE_BACKWARD = "OneForwardOneBackward"
    INTERLEAVED = "Interleaved"
    ZERO_BUBBLE = "ZeroBubble"


class DataParallel(Model):
    """How data parallel workers keep their parameters."""

    RULES = (
        Rule(
            cel="self.shardSize == 0 || self.sharding == 'HybridShard'",
            check=lambda d: d.shard_size == 0 or d.sharding is Sharding.HYBRID_SHARD,
            message="only with sharding HybridShard: FullyShard cuts over all processes",
            field="shardSize",
            shows="shardSize",
        ),
    )
    sharding: Sharding = Sharding.REPLICATED
    """Replicated (DDP), FullyShard (FSDP2) or HybridShard. Default: Replicated."""
    shard_size: Annotated[StrictInt, Field(ge=0, le=65_536)] = 0
    """HybridShard: processes that share one copy of the model. Default: 0, those of one pod."""


class CompressionType(StrEnum):
    NONE = "None"
    """A gradient travels as it is."""
    BFLOAT16 = "BFloat16"
    """Rounded to bfloat16: half of the bytes of a float32."""
    TOP_K = "TopK"
    """The largest elements alone; what is left out is added to the next gradient (error feedback)."""


class Compression(Model):
    """What travels of a pushed gradient. Parameters are pulled as they are."""

    type: CompressionType = CompressionType.NONE
    """None, BFloat16 or TopK. Default: None."""
    top_k_fraction: Fraction = 0.01
    """TopK: the share of the elements that is sent, above 0, at most 1. Default: 0.01."""


class OuterOptimizer(Model):
    """SGD on the servers, with the changes that workers push as its gradient. The defaults are those of DiLoCo (arXiv 2311.08105)."""

    RULES = (
        Rule(
            cel="!self.nesterov || self.momentum > 0.0",
            check=lambda o: not o.nesterov or o.momentum > 0,
            message="nesterov needs momentum above 0",
            field="nesterov",
            shows="momentum",
        ),
    )
    learning_rate: Number = 0.7
    """Step size; 1 without momentum takes over the mean of what the workers have. Default: 0.7."""
    momentum: NumberBelow1 = 0.9
    """Momentum, below 1. Default: 0.9."""
    nesterov: StrictBool = True
    """Nesterov's momentum. Default: true."""


class ParameterServerStrategy(Model):
    """How parameter servers keep workers in step."""

    RULES = (
        Rule(
            cel="has(self.maxStaleness) == (self.consistency == 'BoundedStaleness')",
            check=lambda s: (s.max_staleness is not None) == (s.consistency is Consistency.BOUNDED_STALENESS),
            message="set it with consistency BoundedStaleness, and only then",
            field="maxStaleness",
            shows="consistency",
        ),
        Rule(
            cel="self.backupWorkers == 0 || self.consistency == 'Sync'",
            check=lambda s: s.backup_workers == 0 or s.consistency is Consistency.SYNC,
            message="backup workers need consistency Sync",
            field="backupWorkers",
            shows="backupWorkers",
        ),
        Rule(
            cel="self.staleLearningRate == 'Constant' || self.consistency != 'Sync'",
            check=lambda s: (
                s.stale_learning_rate is StaleLearningRate.CONSTANT or s.consistency is not Consistency.SYNC
            ),
            message="Inverse needs consistency Async or BoundedStaleness: under Sync no gradient is stale",
            field="staleLearningRate",
            shows="consistency",
        ),
        Rule(
            cel="has(self.outerOptimizer) == (self.localSteps > 1)",
            check=lambda s: (s.outer_optimizer is not None) == (s.local_steps > 1),
            message="set it with localSteps above 1, such as {learningRate: 0.7, momentum: 0.9, nesterov: true}, and only then",
            field="outerOptimizer",
            shows="localSteps",
        ),
        Rule(
            cel="self.localSteps == 1 || self.consistency == 'Sync'",
            check=lambda s: s.local_steps == 1 or s.consistency is Consistency.SYNC,
            message="local steps need consistency Sync: the outer step is made for the mean of all workers' changes",
            field="localSteps",
            shows="consistency",
        ),
        Rule(
            cel="self.localSteps == 1 || self.backupWorkers == 0",
            check=lambda s: s.local_steps == 1 or s.backup_workers == 0,
            message="local steps and backupWorkers exclude each other: two workers' copies of a part differ by their own optimisers' state",
            field="localSteps",
            shows="backupWorkers",
        ),
        Rule(
            cel="self.compression.type != 'TopK' || self.backupWorkers == 0",
            check=lambda s: s.compression.type is not CompressionType.TOP_K or s.backup_workers == 0,
            message="TopK and backupWorkers exclude each other: two workers' copies of a part differ by what each has left out before",
            field="compression.type",
            shows="backupWorkers",
        ),
    )
    consistency: Consistency
    """Sync, Async or BoundedStaleness."""
    max_staleness: Annotated[StrictInt, Field(ge=0, le=10_000)] | None = None
    """Steps that a worker may be ahead of the slowest one. Exactly with BoundedStaleness."""
    backup_workers: Annotated[StrictInt, Field(ge=0, le=1000)] = 0
    """Sync only: of N workers, so many are spare; a free one computes the oldest outstanding part of the step once more, and the first
    copy counts. No sample is dropped, and the result is bitwise that without. Default: 0."""
    replication: Annotated[StrictInt, Field(ge=1, le=3)] = 1
    """Copies of each shard; with 2 a lost server costs nothing. Default: 1."""
    local_steps: Annotated[StrictInt, Field(ge=1, le=100_000)] = 1
    """Sync: a worker divides its part of a step into so many batches, takes a step of its own with trainer.optimizer on each, and pushes
    the change of its parameters. The state of that optimiser stays on the worker and is lost with it. Default: 1, a gradient is pushed."""
    outer_optimizer: OuterOptimizer | None = None
    """Exactly with localSteps above 1: the servers' step with the mean of the changes."""
    compression: Compression = Compression()
    """What travels of a pushed gradient; the servers add up and train with 32 bits. Default: all of it."""
    stale_learning_rate: StaleLearningRate = StaleLearningRate.CONSTANT
    """Async and BoundedStaleness: Inverse applies a gradient with the learning rate / its staleness, the updates since its parameters
    were read. Default: Constant."""


class ModelParallel(Model):
    """How the model is cut. Data parallel is what remains: workers x GPUs each / (tensor x pipeline)."""

    RULES = (
        Rule(
            cel="self.pipeline == 1 || self.schedule != 'OneForwardOneBackward' || self.microbatches >= self.pipeline",
            check=lambda m: (
                m.schedule is not Schedule.ONE_FORWARD_ONE_BACKWARD or m.takes(m.microbatches) or m.pipeline == 1
            ),
            message="must be pipeline or more: OneForwardOneBackward has a micro-batch in every stage",
            field="microbatches",
            shows="microbatches",
        ),
        Rule(
            cel="self.pipeline == 1 || !(self.schedule in ['Interleaved', 'ZeroBubble']) || self.microbatches < self.pipeline || "
            "self.microbatches % (self.microbatches / self.pipeline) == 0",
            check=lambda m: (
                m.schedule not in (Schedule.INTERLEAVED, Schedule.ZERO_BUBBLE)
                or m.takes(m.microbatches)
                or m.pipeline == 1
            ),
            message="Interleaved and ZeroBubble work in microbatches / pipeline rounds (rounded down), of which it must be a multiple",
            field="microbatches",
            shows="microbatches",
        ),
    )
    tensor: Annotated[StrictInt, Field(ge=1, le=1024)] = 1
    """Processes that share each layer. Default: 1."""
    pipeline: Annotated[StrictInt, Field(ge=1, le=1024)] = 1
    """Stages that share the layers. Default: 1."""
    schedule: Schedule = Schedule.ONE_FORWARD_ONE_BACKWARD
    """Order of the pipeline's work. Default: OneForwardOneBackward."""
    microbatches: Annotated[StrictInt, Field(ge=1, le=4096)] = 4
    """Parts of a batch in the pipeline. Default: 4."""

    def takes(self, microbatches: int) -> bool:
        """Whether the schedule runs with so many micro-batches."""
        match self.schedule:
            case Schedule.GPIPE:
                return True
            case Schedule.ONE_FORWARD_ONE_BACKWARD:
                return microbatches >= self.pipeline
        return microbatches % max(1, microbatches // self.pipeline) == 0


Exchange: TypeAlias = DataParallel | ParameterServerStrategy | ModelParallel
"""How processes of our loop exchange gradients and parameters."""


class Strategy(Model):
    """How the training is distributed. Changes only while the job is suspended and has a checkpoint (job.py)."""

    RULES = (
        Rule(
            cel="has(self.parameterServer) ? self.type in ['ParameterServer', 'Hybrid'] : self.type != 'ParameterServer'",
            check=lambda s: (
                s.type in (StrategyType.PARAMETER_SERVER, StrategyType.HYBRID)
                if s.parameter_server is not None
                else s.type is not StrategyType.PARAMETER_SERVER
            ),
            message="set it with type ParameterServer, or Hybrid without dataParallel, and only then",
            field="parameterServer",
            shows="type",
        ),
        Rule(
            cel="self.type != 'Hybrid' || !has(self.parameterServer) || !has(self.dataParallel)",
            check=lambda s: s.type is not StrategyType.HYBRID or s.parameter_server is None or s.data_parallel is None,
            message="leave it out: with parameterServer gradients go through the servers",
            field="dataParallel",
            shows="type",
        ),
        Rule(
            cel="self.type != 'Hybrid' || !has(self.parameterServer) || !has(self.modelParallel) || "
            "self.modelParallel.tensor * self.modelParallel.pipeline > 1",
            check=lambda s: (
                s.type is not StrategyType.HYBRID
                or s.parameter_server is None
                or s.model_parallel_size > 1
                or s.model_parallel is None
            ),
            message="tensor x pipeline must be above 1, or take type ParameterServer",
            field="modelParallel",
            shows="type",
        ),
        Rule(
            cel="has(self.modelParallel) == (self.type in ['ModelParallel', 'Hybrid'])",
            check=lambda s: (
                (s.model_parallel is not None) == (s.type in (StrategyType.MODEL_PARALLEL, StrategyType.HYBRID))
            ),
            message="set it with type ModelParallel or Hybrid, and only then",
            field="modelParallel",
            shows="type",
        ),
        Rule(
            cel="!has(self.dataParallel) || self.type in ['DataParallel', 'Hybrid']",
            check=lambda s: s.data_parallel is None or s.type in (StrategyType.DATA_PARALLEL, StrategyType.HYBRID),
            message="only with type DataParallel or Hybrid",
            field="dataParallel",
            shows="type",
        ),
    )
    type: StrategyType
    """DataParallel, ParameterServer, ModelParallel or Hybrid."""
    data_parallel: DataParallel | None = None
    """With DataParallel and Hybrid: how parameters are kept. Default: Replicated."""
    parameter_server: ParameterServerStrategy | None = None
    """With ParameterServer, or Hybrid without dataParallel: how workers are kept in step."""
    model_parallel: ModelParallel | None = None
    """Exactly with ModelParallel and Hybrid: how the model is cut."""

    @property
    def exchange(self) -> Exchange:
        """How processes of our loop exchange gradients and parameters, by `type`. Hybrid: through servers, or by how the model is cut."""
        return self.parameter_server or self.model_parallel or self.data_parallel or DataParallel()

    @property
    def sharding(self) -> Sharding:
        """How processes that compute the same part of the model keep its parameters."""
        return self.data_parallel.sharding if self.data_parallel is not None else Sharding.REPLICATED

    @property
    def is_sharded(self) -> bool:
        """Whether a process of our loop holds a part of the model, and its state."""
        return self.sharding is not Sharding.REPLICATED or self.model_parallel is not None

    @property
    def model_parallel_size(self) -> int:
        """Processes that compute one batch part together."""
        return self.model_parallel.tensor * self.model_parallel.pipeline if self.model_parallel is not None else 1

    @property
    def synchronous(self) -> bool:
        """Whether each step is applied once, from the gradients of the whole batch."""
        exchange = self.exchange
        return not isinstance(exchange, ParameterServerStrategy) or exchange.consistency is Consistency.SYNC
