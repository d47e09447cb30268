"""The rules between strategy.parameterServer's mixed updates and the rest of the spec (docs/design/0013): which exclude each other."""

from disttrain.api.base import Rule
from disttrain.api.optimizer import OptimizerName
from disttrain.api.strategy import CompressionType


def rules(*, processes: str) -> tuple[Rule, ...]:
    """The rules of a DistTrainJobSpec. processes: CEL of the most training processes that the job has at a time."""
    return (
        Rule(
            cel="!has(self.strategy.parameterServer) || self.strategy.parameterServer.backupWorkers == 0 || "
            "self.strategy.parameterServer.backupWorkers < self.worker.replicas",
            check=lambda s: (
                s.strategy.parameter_server is None or s.strategy.parameter_server.backup_workers < s.worker.replicas
            ),
            message="must be below worker.replicas",
            field="strategy.parameterServer.backupWorkers",
            shows="strategy.parameterServer.backupWorkers",
        ),
        Rule(
            cel="!self.trainer.deterministic || !has(self.strategy.parameterServer) || self.strategy.parameterServer.localSteps == 1",
            check=lambda s: (
                not s.trainer.deterministic
                or s.strategy.parameter_server is None
                or s.strategy.parameter_server.local_steps == 1
            ),
            message="deterministic excludes localSteps above 1: the state of a worker's own optimiser is lost with the worker",
            field="trainer.deterministic",
            shows="strategy.parameterServer.localSteps",
        ),
        Rule(
            cel="!self.trainer.deterministic || !has(self.strategy.parameterServer) || "
            "self.strategy.parameterServer.compression.type == 'None'",
            check=lambda s: (
                not s.trainer.deterministic
                or s.strategy.parameter_server is None
                or s.strategy.parameter_server.compression.type is CompressionType.NONE
            ),
            message="deterministic excludes compression: what a worker has left out is lost with the worker",
            field="trainer.deterministic",
            shows="strategy.parameterServer.compression.type",
        ),
        Rule(
            cel="!has(self.strategy.parameterServer) || self.strategy.parameterServer.compression.type != 'TopK' || "
            "self.strategy.parameterServer.localSteps > 1 || !has(self.trainer.optimizer) || "
            "!has(self.trainer.optimizer.name) || self.trainer.optimizer.name == 'SGD'",
            check=lambda s: (
                s.strategy.parameter_server is None
                or s.strategy.parameter_server.compression.type is not CompressionType.TOP_K
                or s.strategy.parameter_server.local_steps > 1
                or s.trainer.optimizer is None
                or s.trainer.optimizer.name in (None, OptimizerName.SGD)
            ),
            message="TopK needs the optimizer SGD on the servers (or localSteps): to Adam what was left out is a gradient of 0, "
            "and it divides by the mean of squares",
            field="strategy.parameterServer.compression.type",
            shows="trainer.optimizer.name",
        ),
        Rule(
            cel="!has(self.strategy.parameterServer) || self.strategy.parameterServer.localSteps == 1 || "
            "!has(self.trainer.optimizer) || self.trainer.batchSize < 1 || self.trainer.batchSize >= "
            "self.strategy.parameterServer.localSteps * "
            f"(has(self.trainer.partsPerStep) ? self.trainer.partsPerStep : {processes})",
            check=lambda s: (
                s.strategy.parameter_server is None
                or s.strategy.parameter_server.local_steps == 1
                or not s.trainer.is_ours
                or s.trainer.batch_size
                >= s.strategy.parameter_server.local_steps * (s.trainer.parts_per_step or s.default_parts_per_step)
            ),
            message="must be at least localSteps x partsPerStep (default: worker processes, of elastic.maxReplicas): a part of the batch "
            "is divided into localSteps batches",
            field="trainer.batchSize",
            shows="trainer.batchSize",
        ),
    )
