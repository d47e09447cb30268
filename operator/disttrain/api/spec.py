"""spec of a DistTrainJob: the whole contract, also where a later version brings the behaviour (plan/validity.py says which).

Here: the roles, and what must hold between the parts. The parts are in strategy.py, trainer.py, storage.py, policies.py, template.py.
"""

from typing import Annotated

from pydantic import Field, StrictBool, StrictInt, StringConstraints

from disttrain.api import accumulation, data_rules, mesh_rules, mixed_updates
from disttrain.api.base import IMMUTABLE, Model, Rule
from disttrain.api.course import SPEC_RULES
from disttrain.api.health import HEALTH_RULES, Health
from disttrain.api.mesh_rules import MODEL_PARALLEL, MOST_WORKERS, PROCESSES
from disttrain.api.names import MANAGED_BY, Role
from disttrain.api.policies import FailurePolicy, Network, Observability, RunPolicy, Scheduling, SuccessPolicy, Tls
from disttrain.api.storage import Checkpoint, Data
from disttrain.api.strategy import Consistency, Strategy, StrategyType
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

    def within(self, workers: int) -> int:
        """The nearest number of the range."""
        return min(max(workers, self.min_replicas), self.max_replicas)


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
            cel="has(self.parameterServer) == (self.strategy.type == 'ParameterServer' || "
            "(self.strategy.type == 'Hybrid' && has(self.strategy.parameterServer)))",
            check=lambda s: (
                (s.parameter_server is not None)
                == (
                    s.strategy.type is StrategyType.PARAMETER_SERVER
                    or (s.strategy.type is StrategyType.HYBRID and s.strategy.parameter_server is not None)
                )
            ),
            message="set it with strategy.type ParameterServer, or Hybrid with strategy.parameterServer, such as {replicas: 2}, and only "
            "then",
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
        *SPEC_RULES,
        Rule(
            cel="!has(self.strategy.parameterServer) || !has(self.trainer.optimizer) || !has(self.trainer.optimizer.factory)",
            check=lambda s: (
                s.strategy.parameter_server is None
                or s.trainer.optimizer is None
                or s.trainer.optimizer.factory is None
            ),
            message="parameter servers have SGD, Adam and AdamW alone, which they compute on parts of vectors: set optimizer.name, or take "
            "strategy.type DataParallel",
            field="trainer.optimizer.factory",
            shows="trainer.optimizer.factory",
        ),
        *mixed_updates.rules(processes=f"{MOST_WORKERS} * {PROCESSES}"),
        *accumulation.rules(
            parts="(has(self.trainer.partsPerStep) ? self.trainer.partsPerStep : "
            f"{MOST_WORKERS} * {PROCESSES} / {MODEL_PARALLEL})"
        ),
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
        *mesh_rules.RULES,
        Rule(
            cel="!has(self.trainer.model) || self.worker.gpusPerWorker == 0 || "
            "!has(self.worker.processesPerWorker) || self.worker.processesPerWorker >= self.worker.gpusPerWorker",
            check=lambda s: s.trainer.model is None or s.worker.processes >= s.worker.gpus_per_worker,
            message="must be gpusPerWorker, or left out: each process of our loop uses one GPU, and the other GPUs would be idle",
            field="worker.processesPerWorker",
            shows="worker.processesPerWorker",
        ),
        *data_rules.RULES,
        *HEALTH_RULES,
    )
    suspend: StrictBool = False
    """true: checkpoint, then free every pod; back to false: go on where it was. Default: false."""
    managed_by: Annotated[str, StringConstraints(pattern=r"^[a-z0-9.-]+/[a-zA-Z0-9._-]+$", max_length=63)] = MANAGED_BY
    """Controller that runs the job; any other value than disttrain.dev/operator: hands off. Immutable. Default: disttrain.dev/operator."""
    image: Image | None = None
    """Image of the training containers. Default: the operator's trainer image. Needs our trainer and an `env` with --block-signal (GNU
    coreutils 8.31), except for a trainer.command without progress."""
    strategy: Strategy
    """How the training is distributed. Changes only while the job is suspended and has a checkpoint."""
    trainer: Trainer
    """What is trained."""
    data: Data | None = None
    """Where the data lies, and how a packed data set is kept."""
    master: Master = Master()
    """The one pod that hosts rendezvous, work queue and progress."""
    parameter_server: ParameterServer | None = None
    """The parameter servers; exactly where strategy.parameterServer is set."""
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
    health: Health | None = None
    """Rules on the training, such as on its loss. Default: none."""
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
        return (owner.template if owner is not None else None) or _EMPTY


_EMPTY = PodTemplate()
