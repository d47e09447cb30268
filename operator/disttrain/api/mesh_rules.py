"""The rules between the processes of a job and the ways in which model and batch are cut over them."""

from disttrain.api.base import Rule
from disttrain.api.mesh import shard_size
from disttrain.api.strategy import Sharding

MOST_WORKERS = "(has(self.worker.elastic) ? self.worker.elastic.maxReplicas : self.worker.replicas)"
"""CEL: the most worker pods that the job has at a time."""
PROCESSES = (
    "(has(self.worker.processesPerWorker) ? self.worker.processesPerWorker : "
    "self.worker.gpusPerWorker > 0 ? self.worker.gpusPerWorker : 1)"
)
"""CEL: the training processes of each worker, with the default resolved."""
MODEL_PARALLEL = (
    "(has(self.strategy.modelParallel) ? self.strategy.modelParallel.tensor * self.strategy.modelParallel.pipeline : 1)"
)
"""CEL: the processes that compute one batch part together."""
_SHARD = (
    "(self.strategy.dataParallel.shardSize > 0 ? self.strategy.dataParallel.shardSize : "
    f"!has(self.strategy.modelParallel) ? {PROCESSES} : "
    f"{PROCESSES} < self.strategy.modelParallel.tensor ? 1 : {PROCESSES} / self.strategy.modelParallel.tensor)"
)
"""CEL: the processes that share one copy of the model under HybridShard."""

RULES = (
    Rule(
        cel="!(has(self.trainer.model) || has(self.trainer.optimizer)) || has(self.trainer.partsPerStep) || "
        "self.trainer.batchSize < 1 || "
        f"self.trainer.batchSize * {MODEL_PARALLEL} >= {MOST_WORKERS} * {PROCESSES}",
        check=lambda s: (
            not s.trainer.is_ours
            or s.trainer.parts_per_step is not None
            or s.trainer.batch_size >= s.default_parts_per_step
        ),
        message="trainer.batchSize is global and must give every worker process at least one sample (of elastic.maxReplicas)",
        field="trainer.batchSize",
        shows="trainer.batchSize",
    ),
    Rule(
        cel="!has(self.trainer.model) || !has(self.strategy.modelParallel) || "
        f"self.worker.replicas * {PROCESSES} % "
        "(self.strategy.modelParallel.tensor * self.strategy.modelParallel.pipeline) == 0",
        check=lambda s: (
            s.trainer.model is None
            or s.strategy.model_parallel is None
            or s.world_size % (s.strategy.model_parallel.tensor * s.strategy.model_parallel.pipeline) == 0
        ),
        message="workers x processes each must be a multiple of tensor x pipeline",
        field="strategy.modelParallel",
    ),
    Rule(
        cel="!has(self.trainer.model) || !has(self.strategy.modelParallel) || self.strategy.modelParallel.pipeline == 1 || "
        f"self.worker.replicas * {PROCESSES} % {MODEL_PARALLEL} != 0 || self.trainer.batchSize % "
        f"((has(self.trainer.partsPerStep) ? self.trainer.partsPerStep : self.worker.replicas * {PROCESSES} / {MODEL_PARALLEL}) "
        "* self.strategy.modelParallel.microbatches * self.trainer.gradientAccumulationSteps) == 0",
        check=lambda s: (
            s.trainer.model is None
            or s.strategy.model_parallel is None
            or s.strategy.model_parallel.pipeline == 1
            or s.world_size % s.strategy.model_parallel_size != 0
            or s.trainer.batch_size
            % (
                (s.trainer.parts_per_step or s.data_parallel_size)
                * s.strategy.model_parallel.microbatches
                * s.trainer.gradient_accumulation_steps
            )
            == 0
        ),
        message="must be a multiple of partsPerStep (default: workers x processes each / (tensor x pipeline)) x "
        "modelParallel.microbatches x gradientAccumulationSteps",
        field="trainer.batchSize",
        shows="trainer.batchSize",
    ),
    Rule(
        cel="!has(self.trainer.parallelize) || has(self.strategy.modelParallel) || "
        "(has(self.strategy.dataParallel) && self.strategy.dataParallel.sharding != 'Replicated')",
        check=lambda s: s.trainer.parallelize is None or s.strategy.is_sharded,
        message="only where the model is cut: type ModelParallel or Hybrid, or sharding FullyShard or HybridShard",
        field="trainer.parallelize",
        shows="trainer.parallelize",
    ),
    Rule(
        cel="!has(self.trainer.pipelineSplit) || "
        "(has(self.strategy.modelParallel) && self.strategy.modelParallel.pipeline > 1)",
        check=lambda s: (
            s.trainer.pipeline_split is None
            or (s.strategy.model_parallel is not None and s.strategy.model_parallel.pipeline > 1)
        ),
        message="only with strategy.modelParallel.pipeline above 1",
        field="trainer.pipelineSplit",
        shows="trainer.pipelineSplit",
    ),
    Rule(
        cel="has(self.trainer.model) || !has(self.strategy.dataParallel) || "
        "self.strategy.dataParallel.sharding == 'Replicated'",
        check=lambda s: s.trainer.model is not None or s.strategy.sharding is Sharding.REPLICATED,
        message="only for our loop (trainer.model and dataset): a script or command shards its model itself",
        field="strategy.dataParallel.sharding",
        shows="strategy.dataParallel.sharding",
    ),
    Rule(
        cel="!has(self.trainer.model) || !has(self.strategy.dataParallel) || "
        "self.strategy.dataParallel.sharding != 'HybridShard' || "
        f"self.worker.replicas * {PROCESSES} % ({MODEL_PARALLEL} * {_SHARD}) == 0",
        check=lambda s: (
            s.trainer.model is None
            or s.strategy.sharding is not Sharding.HYBRID_SHARD
            or s.data_parallel_size % shard_size(s.strategy, s.worker.processes) == 0
        ),
        message="workers x processes each / (tensor x pipeline) must be a multiple of shardSize (0: the processes of one pod)",
        field="strategy.dataParallel.shardSize",
        shows="strategy.dataParallel.shardSize",
    ),
)
"""Of a DistTrainJobSpec."""
