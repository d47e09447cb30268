"""spec of a DistTrainJob: the whole contract, also where a later version brings the behaviour (plan/validity.py says which).

Here: the roles, and what must hold between the parts. The parts are in strategy.py, trainer.py, storage.py, policies.py, template.py.
"""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field, StrictBool, StrictInt, StringConstraints

from disttrain.api import mixed_updates
from disttrain.api.base import IMMUTABLE, Model, Rule
from disttrain.api.mesh import shard_size
from disttrain.api.names import MANAGED_BY, TRAINER_CONTAINER, Role
from disttrain.api.policies import FailurePolicy, Network, Observability, RunPolicy, Scheduling, SuccessPolicy, Tls
from disttrain.api.storage import PACKED, Checkpoint, Data
from disttrain.api.strategy import Consistency, Sharding, Strategy, StrategyType
from disttrain.api.template import PodTemplate
from disttrain.api.trainer import Backend, Command, Trainer
from disttrain.api.types import Image


class Master(Model):
    """The one pod that hosts rendezvous, work queue and progress; needs no GPU, never trains."""

    template: PodTemplate | None = None
    """Pod template of the master."""


class ParameterServer(Model):
    """The parameter servers."""

    replicas: Annotated[StrictInt, Field(ge=1, le=1000)] = 1
    """Number of servers; each holds one shard. Default: 1."""
    template: PodTemplate | None = None
    """Pod template of the servers."""


class Elastic(Model):
    """The range in which the number of workers may change while the job runs."""

    RULES = (
        Rule(
            cel="self.minReplicas <= self.maxReplicas",
            check=lambda e: e.min_replicas <= e.max_replicas,
            message="must be at most maxReplicas",
            field="minReplicas",
            shows="minReplicas",
        ),
    )
    min_replicas: Annotated[StrictInt, Field(ge=1, le=10_000)]
    """Fewest workers with which the job goes on."""
    max_replicas: Annotated[StrictInt, Field(ge=1, le=10_000)]
    """Most workers that the job uses."""


class Worker(Model):
    """The workers."""

    RULES = (
        Rule(
            cel="!has(self.elastic) || self.elastic.minReplicas > self.elastic.maxReplicas || "
            "(self.replicas >= self.elastic.minReplicas && self.replicas <= self.elastic.maxReplicas)",
            check=lambda w: w.elastic is None or w.elastic.min_replicas <= w.replicas <= w.elastic.max_replicas,
            message="must lie within elastic.minReplicas and elastic.maxReplicas",
            field="replicas",
            shows="replicas",
        ),
        Rule(
            cel="has(self.elastic) == has(oldSelf.elastic)",
            check=None,
            message="whether a job is elastic is immutable, only its range may change; create a new job",
            field="elastic",
        ),
        Rule(
            cel="!has(self.processesPerWorker) || self.gpusPerWorker == 0 || self.processesPerWorker <= self.gpusPerWorker",
            check=lambda w: w.processes_per_worker is None or w.processes_per_worker <= (w.gpus_per_worker or 64),
            message="must be at most gpusPerWorker: each process needs a GPU of its own",
            field="processesPerWorker",
            shows="processesPerWorker",
        ),
    )
    replicas: Annotated[StrictInt, Field(ge=1, le=10_000)] = 1
    """Number of worker pods. Default: 1."""
    gpus_per_worker: Annotated[StrictInt, Field(ge=0, le=64)] = 0
    """nvidia.com/gpu of each worker; one process runs on each GPU. Default: 0, the processes run on the CPU."""
    processes_per_worker: Annotated[StrictInt, Field(ge=1, le=64)] | None = None
    """Training processes of each worker; of a command only the value of PET_NPROC_PER_NODE. Default: one for each GPU, or one."""
    elastic: Elastic | None = None
    """Lets the number of workers change while the job runs, between two steps. A step has as many parts as maxReplicas gives, unless
    trainer.partsPerStep says otherwise. Default: fixed."""
    template: PodTemplate | None = None
    """Pod template of the workers."""

    @property
    def processes(self) -> int:
        """Training processes of each worker, with the default resolved."""
        return self.processes_per_worker or max(1, self.gpus_per_worker)

    @property
    def most(self) -> int:
        """The most worker pods that the job has at a time."""
        return self.replicas if self.elastic is None else self.elastic.max_replicas


def _mounts_elsewhere(role: str) -> str:
    """CEL: the trainer container of a role's template has no mount of its own where the data is."""
    template = f"self.{role}.template"
    return (
        f"(!has(self.{role}) || !has({template}) || !has({template}.spec) || !has({template}.spec.containers) || "
        f"{template}.spec.containers.all(c, c.name != '{TRAINER_CONTAINER}' || !has(c.volumeMounts) || "
        "c.volumeMounts.all(m, m.mountPath != self.data.volume.path)))"
    )


def _mounts(spec: "DistTrainJobSpec") -> set[str]:
    """Where the templates' trainer containers have mounts of their own."""
    return {
        mount.mount_path
        for role in Role
        for container in spec.template_of(role).containers
        if container.name == TRAINER_CONTAINER
        for mount in container.volume_mounts or ()
    }


def _only_packed(field: str, cel: str, used: Callable[[Data], bool], *, shows: str = "") -> Rule:
    """A field of data that has a meaning for a packed data set alone. cel, used: whether it asks for anything. shows: a part of it."""
    return Rule(
        cel=f"!has(self.data) || !({cel}) || (has(self.trainer.dataset) && self.trainer.dataset == '{PACKED}')",
        check=lambda s: s.data is None or not used(s.data) or s.trainer.dataset == PACKED,
        message=f"is of a packed data set: pack it with `disttrain data pack`, and set trainer.dataset to {PACKED}",
        field=f"data.{field}",
        shows=f"data.{field}{shows}",
    )


_MOST_WORKERS = "(has(self.worker.elastic) ? self.worker.elastic.maxReplicas : self.worker.replicas)"
"""CEL: the most worker pods that the job has at a time."""
_PROCESSES = (
    "(has(self.worker.processesPerWorker) ? self.worker.processesPerWorker : "
    "self.worker.gpusPerWorker > 0 ? self.worker.gpusPerWorker : 1)"
)
"""CEL: the training processes of each worker, with the default resolved."""
_MODEL_PARALLEL = (
    "(has(self.strategy.modelParallel) ? self.strategy.modelParallel.tensor * self.strategy.modelParallel.pipeline : 1)"
)
"""CEL: the processes that compute one batch part together."""
_SHARD = (
    "(self.strategy.dataParallel.shardSize > 0 ? self.strategy.dataParallel.shardSize : "
    f"!has(self.strategy.modelParallel) ? {_PROCESSES} : "
    f"{_PROCESSES} < self.strategy.modelParallel.tensor ? 1 : {_PROCESSES} / self.strategy.modelParallel.tensor)"
)
"""CEL: the processes that share one copy of the model under HybridShard."""


class DistTrainJobSpec(Model):
    """What to train, and how."""

    # The API server tries them also where a bound is broken, such as 0 workers. A rule holds then, so that one mistake gets one message.
    RULES = (
        Rule(
            cel="self.managedBy == oldSelf.managedBy",
            check=None,
            message=IMMUTABLE,
            field="managedBy",
            shows="managedBy",
        ),
        Rule(
            cel="has(self.trainer.partsPerStep) == has(oldSelf.trainer.partsPerStep) && "
            "(!has(self.trainer.partsPerStep) || self.trainer.partsPerStep == oldSelf.trainer.partsPerStep)",
            check=None,
            message="is fixed for the life of the job: it numbers what is computed; create a new job",
            field="trainer.partsPerStep",
            shows="trainer.partsPerStep",
        ),
        Rule(
            cel="has(self.parameterServer) == (self.strategy.type == 'ParameterServer')",
            check=lambda s: (s.parameter_server is not None) == (s.strategy.type is StrategyType.PARAMETER_SERVER),
            message="set it with strategy.type ParameterServer, such as {replicas: 2}, and only then",
            field="parameterServer",
            shows="strategy.type",
        ),
        Rule(
            cel="self.strategy.type == 'DataParallel' || has(self.trainer.model) || "
            "(self.strategy.type == 'ParameterServer' && has(self.trainer.script))",
            check=lambda s: (
                s.strategy.type is StrategyType.DATA_PARALLEL
                or s.trainer.model is not None
                or (s.strategy.type is StrategyType.PARAMETER_SERVER and s.trainer.script is not None)
            ),
            message="a command needs strategy.type DataParallel, a script that or ParameterServer; the other strategies need model and "
            "dataset",
            field="strategy.type",
            shows="strategy.type",
        ),
        Rule(
            cel="!has(self.trainer.script) || has(self.trainer.optimizer) == (self.strategy.type == 'ParameterServer')",
            check=lambda s: (
                s.trainer.script is None
                or (s.trainer.optimizer is not None) == (s.strategy.type is StrategyType.PARAMETER_SERVER)
            ),
            message="with a script set it with strategy.type ParameterServer, whose servers apply it, and only then",
            field="trainer.optimizer",
            shows="strategy.type",
        ),
        Rule(
            cel="!has(self.strategy.parameterServer) || !has(self.parameterServer) || "
            "self.strategy.parameterServer.replication <= self.parameterServer.replicas",
            check=lambda s: (
                s.strategy.parameter_server is None
                or s.parameter_server is None
                or s.strategy.parameter_server.replication <= s.parameter_server.replicas
            ),
            message="must be at most parameterServer.replicas",
            field="strategy.parameterServer.replication",
            shows="strategy.parameterServer.replication",
        ),
        Rule(
            cel="!self.trainer.deterministic || !has(self.strategy.parameterServer) || "
            "self.strategy.parameterServer.consistency == 'Sync'",
            check=lambda s: (
                not s.trainer.deterministic
                or s.strategy.parameter_server is None
                or s.strategy.parameter_server.consistency is Consistency.SYNC
            ),
            message="deterministic needs consistency Sync: the order of asynchronous updates is not repeatable",
            field="trainer.deterministic",
            shows="trainer.deterministic",
        ),
        Rule(
            cel="!has(self.worker.elastic) || !has(self.trainer.command)",
            check=lambda s: s.worker.elastic is None or s.trainer.command is None,
            message="a command starts and connects its processes itself, so that their number is fixed: leave elastic out, or run the file "
            "as trainer.script",
            field="worker.elastic",
        ),
        *mixed_updates.rules(processes=f"{_MOST_WORKERS} * {_PROCESSES}"),
        Rule(
            cel="self.trainer.backend != 'nccl' || self.worker.gpusPerWorker > 0",
            check=lambda s: s.trainer.backend is not Backend.NCCL or s.worker.gpus_per_worker > 0,
            message="backend nccl needs worker.gpusPerWorker >= 1; use gloo on CPUs",
            field="trainer.backend",
            shows="trainer.backend",
        ),
        Rule(
            cel="self.network.tls != 'Mutual' || has(self.trainer.model)",
            check=lambda s: s.network.tls is not Tls.MUTUAL or s.trainer.model is not None,
            message="a script or command makes its own connections, which no certificate of ours encrypts: leave tls out, "
            "and encrypt in the program or in the network",
            field="network.tls",
            shows="network.tls",
        ),
        Rule(
            cel="self.network.tls != 'Mutual' || self.trainer.backend != 'nccl'",
            check=lambda s: s.network.tls is not Tls.MUTUAL or s.trainer.backend is not Backend.NCCL,
            message="NCCL cannot encrypt what it sends: take backend gloo with network.tls Mutual",
            field="trainer.backend",
            shows="trainer.backend",
        ),
        Rule(
            cel="!(has(self.trainer.model) || has(self.trainer.optimizer)) || has(self.trainer.partsPerStep) || "
            "self.trainer.batchSize < 1 || "
            f"self.trainer.batchSize * {_MODEL_PARALLEL} >= {_MOST_WORKERS} * {_PROCESSES}",
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
            f"self.worker.replicas * {_PROCESSES} % "
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
            f"self.worker.replicas * {_PROCESSES} % {_MODEL_PARALLEL} != 0 || self.trainer.batchSize % "
            f"((has(self.trainer.partsPerStep) ? self.trainer.partsPerStep : self.worker.replicas * {_PROCESSES} / {_MODEL_PARALLEL}) "
            "* self.strategy.modelParallel.microbatches) == 0",
            check=lambda s: (
                s.trainer.model is None
                or s.strategy.model_parallel is None
                or s.strategy.model_parallel.pipeline == 1
                or s.world_size % s.strategy.model_parallel_size != 0
                or s.trainer.batch_size
                % ((s.trainer.parts_per_step or s.data_parallel_size) * s.strategy.model_parallel.microbatches)
                == 0
            ),
            message="must be a multiple of partsPerStep (default: workers x processes each / (tensor x pipeline)) x "
            "modelParallel.microbatches",
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
            f"self.worker.replicas * {_PROCESSES} % ({_MODEL_PARALLEL} * {_SHARD}) == 0",
            check=lambda s: (
                s.trainer.model is None
                or s.strategy.sharding is not Sharding.HYBRID_SHARD
                or s.data_parallel_size % shard_size(s.strategy, s.worker.processes) == 0
            ),
            message="workers x processes each / (tensor x pipeline) must be a multiple of shardSize (0: the processes of one pod)",
            field="strategy.dataParallel.shardSize",
            shows="strategy.dataParallel.shardSize",
        ),
        Rule(
            cel="!has(self.trainer.model) || self.worker.gpusPerWorker == 0 || "
            "!has(self.worker.processesPerWorker) || self.worker.processesPerWorker >= self.worker.gpusPerWorker",
            check=lambda s: s.trainer.model is None or s.worker.processes >= s.worker.gpus_per_worker,
            message="must be gpusPerWorker, or left out: each process of our loop uses one GPU, and the other GPUs would be idle",
            field="worker.processesPerWorker",
            shows="worker.processesPerWorker",
        ),
        Rule(
            cel="!has(self.data) || !has(self.data.volume) || "
            + " && ".join(map(_mounts_elsewhere, ("master", "parameterServer", "worker"))),
            check=lambda s: s.data is None or s.data.volume is None or s.data.volume.path not in _mounts(s),
            message="the trainer container of a template has a mount of its own there; choose another path",
            field="data.volume.path",
            shows="data.volume.path",
        ),
        Rule(
            cel=f"!has(self.trainer.dataset) || self.trainer.dataset != '{PACKED}' || "
            "(has(self.data) && (has(self.data.volume) || has(self.data.url)))",
            check=lambda s: s.trainer.dataset != PACKED or (s.data is not None and bool(s.data.volume or s.data.url)),
            message="reads what `disttrain data pack` wrote: set data.volume to the claim, or data.url to the place, that has it",
            field="trainer.dataset",
            shows="trainer.dataset",
        ),
        _only_packed("partitions", "has(self.data.partitions)", lambda data: data.partitions is not None),
        _only_packed("url", "has(self.data.url)", lambda data: data.url is not None),
        _only_packed("replication", "self.data.replication > 1", lambda data: data.replication > 1),
        _only_packed(
            "encryption", "has(self.data.encryption)", lambda data: data.encryption is not None, shows=".secretName"
        ),
        Rule(
            cel="!has(self.data) || self.data.replication <= 1 || self.data.replication <= self.worker.replicas",
            check=lambda s: s.data is None or s.data.replication <= max(1, s.worker.replicas),
            message="must be at most worker.replicas: each keeps one copy",
            field="data.replication",
            shows="data.replication",
        ),
    )
    suspend: StrictBool = False
    """true: checkpoint, then free every pod; back to false: go on where it was. Default: false."""
    managed_by: Annotated[str, StringConstraints(pattern=r"^[a-z0-9.-]+/[a-zA-Z0-9._-]+$", max_length=63)] = MANAGED_BY
    """Controller that runs the job; any other value than disttrain.dev/operator: hands off. Immutable. Default: disttrain.dev/operator."""
    image: Image | None = None
    """Image of the training containers. Default: the operator's trainer image. Needs our trainer and an `env` with --block-signal (GNU
    coreutils 8.31), except for a trainer.command."""
    strategy: Strategy
    """How the training is distributed. Changes only while the job is suspended and has a checkpoint."""
    trainer: Trainer
    """What is trained."""
    data: Data | None = None
    """Where the data lies, and how a packed data set is kept."""
    master: Master = Master()
    """The one pod that hosts rendezvous, work queue and progress."""
    parameter_server: ParameterServer | None = None
    """The parameter servers; exactly with strategy.type ParameterServer."""
    worker: Worker = Worker()
    """The workers."""
    checkpoint: Checkpoint | None = None
    """Where and how often the state is kept. Default: nowhere; a restart of the job begins at step 0."""
    run_policy: RunPolicy = RunPolicy()
    """Retries, deadlines and what remains at the end."""
    failure_policy: FailurePolicy = FailurePolicy()
    """What is done when a pod fails."""
    success_policy: SuccessPolicy = SuccessPolicy.ALL_WORKERS
    """AllWorkers: complete when every worker succeeded; AnyWorker: when one did. Default: AllWorkers."""
    scheduling: Scheduling = Scheduling()
    """How the pods find nodes."""
    network: Network = Network()
    """Who may talk to the job's pods, and how."""
    observability: Observability = Observability()
    """Metrics and progress."""

    @property
    def processes_per_worker(self) -> int:
        """Training processes that we start in a worker pod. A command is started once, whatever it starts itself: a pod is one rank."""
        return 1 if isinstance(self.trainer.work, Command) else self.worker.processes

    @property
    def world_size(self) -> int:
        """Training processes of the whole job."""
        return self.worker.replicas * self.processes_per_worker

    @property
    def data_parallel_size(self) -> int:
        """Groups of processes that compute a batch part each."""
        return self.world_size // self.strategy.model_parallel_size

    @property
    def default_parts_per_step(self) -> int:
        """Parts of a step where trainer.partsPerStep names no number: one for each data-parallel member, of an elastic job for each that
        it may have."""
        return self.worker.most * self.processes_per_worker // self.strategy.model_parallel_size

    @property
    def servers(self) -> int:
        """Parameter servers; 0 of a job that has none."""
        return self.parameter_server.replicas if self.parameter_server is not None else 0

    def template_of(self, role: Role) -> PodTemplate:
        """The pod template of a role, an empty one when the job has none."""
        owners = {Role.MASTER: self.master, Role.PARAMETER_SERVER: self.parameter_server, Role.WORKER: self.worker}
        owner = owners[role]
        return (owner.template if owner is not None else None) or PodTemplate()
