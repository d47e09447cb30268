"""spec of a DistTrainJob: the whole contract, also where a later version brings the behaviour (plan/validity.py says which)."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, StrictBool, StrictInt, StringConstraints

from disttrain.api.base import Model, Rule
from disttrain.api.names import CHECKPOINT_PATH, CONTROL_PORT, MANAGED_BY, METRICS_PORT, RENDEZVOUS_PORT, SERVER_PORT
from disttrain.api.template import PodTemplate
from disttrain.api.types import (
    INT32_MAX,
    AbsolutePath,
    Argument,
    Decimal,
    DnsLabel,
    DnsSubdomain,
    Factory,
    FreeForm,
    list_map,
)

Seconds = Annotated[StrictInt, Field(ge=1, le=INT32_MAX)]


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


class Schedule(StrEnum):
    GPIPE = "GPipe"
    ONE_FORWARD_ONE_BACKWARD = "OneForwardOneBackward"
    INTERLEAVED = "Interleaved"
    ZERO_BUBBLE = "ZeroBubble"


class OptimizerName(StrEnum):
    SGD = "SGD"
    ADAM = "Adam"
    ADAMW = "AdamW"


class Backend(StrEnum):
    AUTO = "Auto"
    """nccl where every worker has a GPU, gloo elsewhere."""
    GLOO = "gloo"
    NCCL = "nccl"


class DataParallel(Model):
    """How data parallel workers keep their parameters."""

    sharding: Sharding = Sharding.REPLICATED
    """Replicated (DDP), FullyShard (FSDP2) or HybridShard. Default: Replicated."""


class ParameterServerStrategy(Model):
    """How parameter servers keep workers in step."""

    RULES = (
        Rule(
            cel="has(self.maxStaleness) == (self.consistency == 'BoundedStaleness')",
            check=lambda s: (s.max_staleness is not None) == (s.consistency is Consistency.BOUNDED_STALENESS),
            message="set it with consistency BoundedStaleness, and only then",
            field="maxStaleness",
        ),
        Rule(
            cel="self.backupWorkers == 0 || self.consistency == 'Sync'",
            check=lambda s: s.backup_workers == 0 or s.consistency is Consistency.SYNC,
            message="backup workers need consistency Sync",
            field="backupWorkers",
        ),
    )
    consistency: Consistency
    """Sync, Async or BoundedStaleness."""
    max_staleness: Annotated[StrictInt, Field(ge=0, le=10_000)] | None = None
    """Steps that a worker may be ahead of the slowest one. Exactly with BoundedStaleness."""
    backup_workers: Annotated[StrictInt, Field(ge=0, le=1000)] = 0
    """Sync only: of N workers, the gradients of the first N - backupWorkers count. Default: 0."""
    replication: Annotated[StrictInt, Field(ge=1, le=3)] = 1
    """Copies of each shard; with 2 a lost server costs nothing. Default: 1."""


class ModelParallel(Model):
    """How the model is cut. Data parallel is what remains: workers x GPUs each / (tensor x pipeline)."""

    tensor: Annotated[StrictInt, Field(ge=1, le=1024)] = 1
    """Processes that share each layer. Default: 1."""
    pipeline: Annotated[StrictInt, Field(ge=1, le=1024)] = 1
    """Stages that share the layers. Default: 1."""
    schedule: Schedule = Schedule.ONE_FORWARD_ONE_BACKWARD
    """Order of the pipeline's work. Default: OneForwardOneBackward."""
    microbatches: Annotated[StrictInt, Field(ge=1, le=4096)] = 4
    """Parts of a batch in the pipeline. Default: 4."""


class Strategy(Model):
    """How the training is distributed. Immutable."""

    RULES = (
        Rule(
            cel="has(self.parameterServer) == (self.type == 'ParameterServer')",
            check=lambda s: (s.parameter_server is not None) == (s.type is StrategyType.PARAMETER_SERVER),
            message="set it with type ParameterServer, and only then",
            field="parameterServer",
        ),
        Rule(
            cel="has(self.modelParallel) == (self.type in ['ModelParallel', 'Hybrid'])",
            check=lambda s: (
                (s.model_parallel is not None) == (s.type in (StrategyType.MODEL_PARALLEL, StrategyType.HYBRID))
            ),
            message="set it with type ModelParallel or Hybrid, and only then",
            field="modelParallel",
        ),
        Rule(
            cel="!has(self.dataParallel) || self.type in ['DataParallel', 'Hybrid']",
            check=lambda s: s.data_parallel is None or s.type in (StrategyType.DATA_PARALLEL, StrategyType.HYBRID),
            message="only with type DataParallel or Hybrid",
            field="dataParallel",
        ),
    )
    type: StrategyType
    """DataParallel, ParameterServer, ModelParallel or Hybrid."""
    data_parallel: DataParallel | None = None
    """With DataParallel and Hybrid: how parameters are kept. Default: Replicated."""
    parameter_server: ParameterServerStrategy | None = None
    """Exactly with ParameterServer: how workers are kept in step."""
    model_parallel: ModelParallel | None = None
    """Exactly with ModelParallel and Hybrid: how the model is cut."""


class Optimizer(Model):
    """The optimiser of our loop; on parameter servers it runs there."""

    RULES = (
        Rule(
            cel="self.name == 'SGD' || (!has(self.momentum) && !self.nesterov)",
            check=lambda o: o.name is OptimizerName.SGD or (o.momentum is None and not o.nesterov),
            message="momentum and nesterov belong to SGD; Adam and AdamW have beta1 and beta2",
        ),
        Rule(
            cel="!self.nesterov || has(self.momentum)",
            check=lambda o: not o.nesterov or o.momentum is not None,
            message="nesterov needs momentum",
            field="nesterov",
        ),
        Rule(
            cel="self.name != 'SGD' || (!has(self.beta1) && !has(self.beta2) && !has(self.epsilon))",
            check=lambda o: (
                o.name is not OptimizerName.SGD or (o.beta1 is None and o.beta2 is None and o.epsilon is None)
            ),
            message="beta1, beta2 and epsilon belong to Adam and AdamW; SGD has momentum",
        ),
    )
    name: OptimizerName
    """SGD, Adam or AdamW."""
    learning_rate: Decimal
    """Step size, a decimal string such as "0.1"."""
    momentum: Decimal | None = None
    """SGD: momentum, a decimal string. Default: none."""
    nesterov: StrictBool = False
    """SGD: Nesterov's momentum. Default: false."""
    weight_decay: Decimal = "0"
    """L2 penalty (SGD, Adam) or decoupled decay (AdamW), a decimal string. Default: "0"."""
    beta1: Decimal | None = None
    """Adam, AdamW: decay of the first moment. Default: "0.9"."""
    beta2: Decimal | None = None
    """Adam, AdamW: decay of the second moment. Default: "0.999"."""
    epsilon: Decimal | None = None
    """Adam, AdamW: added to the denominator. Default: "1e-8"."""


class Script(Model):
    """The user's own file, run under torchrun's env:// contract."""

    config_map: DnsSubdomain | None = None
    """ConfigMap that holds the file; mounted read-only. Default: the file is in the image, or in the current folder."""
    file: Annotated[str, StringConstraints(pattern=r"^[-._/a-zA-Z0-9]+\.py$", max_length=253)]
    """The Python file: a key of the ConfigMap, or a path in the image."""
    args: Annotated[tuple[Argument, ...], Field(max_length=256)] = ()
    """Arguments of the script. Default: none."""


class Trainer(Model):
    """What is trained: exactly one of model with dataset (our loop), script, or command."""

    RULES = (
        Rule(
            cel="[has(self.model), has(self.script), has(self.command)].filter(x, x).size() == 1",
            check=lambda t: sum(x is not None for x in (t.model, t.script, t.command)) == 1,
            message="set exactly one of model (with dataset), script and command",
        ),
        Rule(
            cel="has(self.model) == has(self.dataset)",
            check=lambda t: (t.model is None) == (t.dataset is None),
            message="model and dataset belong together: package.module:factory each",
            field="dataset",
        ),
        Rule(
            cel="!has(self.model) || has(self.epochs) != has(self.maxSteps)",
            check=lambda t: t.model is None or (t.epochs is None) != (t.max_steps is None),
            message="with a model set exactly one of epochs and maxSteps",
            field="epochs",
        ),
        Rule(
            cel="!has(self.model) || has(self.optimizer)",
            check=lambda t: t.model is None or t.optimizer is not None,
            message='with a model set the optimizer, such as {name: SGD, learningRate: "0.1"}',
            field="optimizer",
        ),
        Rule(
            cel="has(self.model) || (!has(self.loss) && !has(self.evaluate) && !has(self.optimizer) "
            "&& !has(self.epochs) && !has(self.maxSteps))",
            check=lambda t: t.model is not None or not (t.loss or t.evaluate or t.optimizer or t.epochs or t.max_steps),
            message="loss, evaluate, optimizer, epochs and maxSteps are for our loop (model and dataset); "
            "a script or command brings its own",
        ),
    )
    model: Factory | None = None
    """package.module:factory(config) -> torch.nn.Module."""
    dataset: Factory | None = None
    """package.module:factory(config, split) -> a map-style dataset; split is "train" or "test"."""
    loss: Factory | None = None
    """package.module:function(model, batch) -> the mean loss of the batch. Default: cross entropy of (input, target)."""
    evaluate: Factory | None = None
    """package.module:function(model, dataset) -> a few named numbers, on split "test" at the end. Default: none."""
    optimizer: Optimizer | None = None
    """The optimiser of our loop."""
    config: FreeForm | None = None
    """Handed to the factories as it is. Default: {}."""
    epochs: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    """Passes over the training data. Exactly one of epochs and maxSteps."""
    max_steps: Annotated[StrictInt, Field(ge=1, le=INT32_MAX)] | None = None
    """Steps of the global batch. Exactly one of epochs and maxSteps."""
    batch_size: Annotated[StrictInt, Field(ge=1, le=16_777_216)] = 64
    """Samples of one step over all workers together. Default: 64."""
    seed: Annotated[StrictInt, Field(ge=0, le=INT32_MAX)] = 0
    """Seed of the model's first parameters and of the data's order. Default: 0."""
    deterministic: StrictBool = False
    """Bit for bit the same result on every run. Default: false."""
    backend: Backend = Backend.AUTO
    """Auto, gloo or nccl. Default: Auto."""
    script: Script | None = None
    """The user's own file under torchrun's environment."""
    command: Annotated[tuple[Argument, ...], Field(min_length=1, max_length=256)] | None = None
    """Any program, with the same environment."""


class Encryption(Model):
    """Encryption of the data at rest."""

    secret_name: DnsSubdomain
    """Secret with the AES-256 key."""


class Volume(Model):
    """A PersistentVolumeClaim of the job's namespace."""

    persistent_volume_claim: DnsSubdomain
    """Name of the claim; every pod of the job mounts it."""


class DataVolume(Volume):
    """A PersistentVolumeClaim with data."""

    path: AbsolutePath = "/data"
    """Where it is mounted, read-only. Default: /data."""


class Data(Model):
    """Where the data lies and how it is handed out."""

    partitions: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = None
    """Ranges handed out to the workers; every sample exactly once an epoch, through faults and resizes."""
    replication: Annotated[StrictInt, Field(ge=1, le=16)] = 1
    """Workers that hold a copy of each partition. Default: 1."""
    encryption: Encryption | None = None
    """AES-256-GCM at rest, with a key from a Secret."""
    volume: DataVolume | None = None
    """Claim with the data, mounted into every pod."""


class Master(Model):
    """The one pod that hosts rendezvous, data ledger and progress; needs no GPU, never trains."""

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
            cel="!has(self.elastic) || (self.replicas >= self.elastic.minReplicas && self.replicas <= self.elastic.maxReplicas)",
            check=lambda w: w.elastic is None or w.elastic.min_replicas <= w.replicas <= w.elastic.max_replicas,
            message="must lie within elastic.minReplicas and elastic.maxReplicas",
            field="replicas",
        ),
        Rule(
            cel="self.replicas == oldSelf.replicas || (has(self.elastic) && has(oldSelf.elastic))",
            check=None,
            message="the number of workers changes only within elastic; set worker.elastic when the job is created",
            field="replicas",
        ),
    )
    replicas: Annotated[StrictInt, Field(ge=1, le=10_000)] = 1
    """Number of worker pods. Default: 1."""
    gpus_per_worker: Annotated[StrictInt, Field(ge=0, le=64)] = 0
    """nvidia.com/gpu of each worker; one process runs on each GPU. Default: 0, one process on the CPU."""
    elastic: Elastic | None = None
    """Lets the number of workers change while the job runs. Default: fixed."""
    template: PodTemplate | None = None
    """Pod template of the workers."""


class Checkpoint(Model):
    """Where and how often the state of the training is kept."""

    volume: Volume
    """Claim that every pod of the job can mount."""
    every_steps: Annotated[StrictInt, Field(ge=1, le=INT32_MAX)] = 100
    """Steps between two checkpoints, and the most that a lost server costs. Default: 100."""
    keep: Annotated[StrictInt, Field(ge=1, le=1000)] = 3
    """Checkpoints that are kept; older ones are removed. Default: 3."""


class BackoffLimitReset(StrEnum):
    ON_CHECKPOINT = "OnCheckpoint"
    """A new checkpoint sets the count of retries back to 0: a job that moves on never runs out of them."""
    NEVER = "Never"


class CleanPodPolicy(StrEnum):
    RUNNING = "Running"
    """At the end, delete the pods that still run."""
    ALL = "All"
    NONE = "None"


class RunPolicy(Model):
    """Retries, deadlines and what remains at the end."""

    backoff_limit: Annotated[StrictInt, Field(ge=0, le=1000)] = 6
    """Failures that are retried before the job fails. Default: 6."""
    backoff_limit_reset: BackoffLimitReset = BackoffLimitReset.ON_CHECKPOINT
    """OnCheckpoint: count only the failures since the last checkpoint; or Never. Default: OnCheckpoint."""
    startup_deadline_seconds: Seconds = 1800
    """Seconds until every pod must be ready, else the job fails. Default: 1800."""
    progress_deadline_seconds: Seconds = 900
    """Seconds without a step after which the job is Stalled and restarted. Default: 900."""
    active_deadline_seconds: Seconds | None = None
    """Seconds that the job may be active, else it fails; the clock begins anew on resume. Default: no limit."""
    ttl_seconds_after_finished: Annotated[StrictInt, Field(ge=0, le=INT32_MAX)] | None = None
    """Seconds after which the finished job is deleted. Default: never."""
    clean_pod_policy: CleanPodPolicy = CleanPodPolicy.RUNNING
    """Running: delete what still runs at the end; All; None. Default: Running."""


class Action(StrEnum):
    RESTART_REPLICA = "RestartReplica"
    """Replace the failed pod."""
    RESTART_JOB = "RestartJob"
    """Replace every pod; a new attempt, from the last checkpoint."""
    FAIL_JOB = "FailJob"


class FailureRule(Model):
    """One rule: it matches when each condition that is set holds."""

    RULES = (
        Rule(
            cel="has(self.onExitCodes) || has(self.onPodConditions)",
            check=lambda r: r.on_exit_codes is not None or r.on_pod_conditions is not None,
            message="set onExitCodes, onPodConditions or both",
        ),
    )
    name: DnsLabel
    """Name of the rule, for messages."""
    on_exit_codes: (
        Annotated[tuple[Annotated[StrictInt, Field(ge=1, le=255)], ...], Field(min_length=1, max_length=255)] | None
    ) = None
    """Exit codes of the trainer container that match."""
    on_pod_conditions: (
        Annotated[
            tuple[Annotated[str, StringConstraints(min_length=1, max_length=63)], ...],
            Field(min_length=1, max_length=16),
        ]
        | None
    ) = None
    """Types of pod conditions that match when true, such as DisruptionTarget."""
    action: Action
    """RestartReplica, RestartJob or FailJob."""
    count_towards_limit: StrictBool = True
    """Whether the failure counts towards backoffLimit. Default: true."""


DEFAULT_RULES = (
    FailureRule(name="bad-code", on_exit_codes=(1, 2, 126, 127), action=Action.FAIL_JOB),
    FailureRule(
        name="preempted",
        on_pod_conditions=("DisruptionTarget",),
        action=Action.RESTART_REPLICA,
        count_towards_limit=False,
    ),
)


class FailurePolicy(Model):
    """What is done when a pod fails. The first rule that matches wins."""

    rules: Annotated[tuple[FailureRule, ...], *list_map("name", max_items=20)] = DEFAULT_RULES
    """Rules in order. Default: exit codes 1, 2, 126 and 127 fail the job, a disruption is not counted."""
    default_action: Action = Action.RESTART_REPLICA
    """When no rule matches. Default: RestartReplica."""


class SuccessPolicy(StrEnum):
    ALL_WORKERS = "AllWorkers"
    ANY_WORKER = "AnyWorker"


class Gang(StrEnum):
    AUTO = "Auto"
    NONE = "None"
    COSCHEDULING = "Coscheduling"
    VOLCANO = "Volcano"
    KUEUE = "Kueue"


class Scheduling(Model):
    """How the pods find nodes."""

    gang: Gang = Gang.AUTO
    """Auto: what the cluster has; None; Coscheduling, Volcano or Kueue. Default: Auto."""
    timeout_seconds: Seconds = 600
    """Seconds that a part of a gang may hold nodes while it waits for the rest. Default: 600."""
    priority_class_name: Annotated[
        str, StringConstraints(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", max_length=253)
    ] = ""
    """PriorityClass of the pods. Default: none."""
    topology_key: Annotated[str, StringConstraints(pattern=r"^([-._/a-zA-Z0-9]+)?$", max_length=316)] = ""
    """Node label whose value all workers shall share, such as topology.kubernetes.io/zone. Default: none."""


class NetworkPolicyMode(StrEnum):
    JOB_ONLY = "JobOnly"
    """A NetworkPolicy lets in the job's own pods, and everybody to the metrics port."""
    NONE = "None"


class Tls(StrEnum):
    DISABLED = "Disabled"
    MUTUAL = "Mutual"


class Network(Model):
    """Who may talk to the job's pods, and how."""

    policy: NetworkPolicyMode = NetworkPolicyMode.JOB_ONLY
    """JobOnly: only the job's pods, and everybody to the metrics port; None. Default: JobOnly."""
    tls: Tls = Tls.DISABLED
    """Disabled, or Mutual: certificates of the job for all training traffic. Default: Disabled."""


class Observability(Model):
    """Metrics and progress."""

    RULES = (
        Rule(
            cel=f"!(self.metricsPort in [{RENDEZVOUS_PORT}, {CONTROL_PORT}, {SERVER_PORT}])",
            check=lambda o: o.metrics_port not in (RENDEZVOUS_PORT, CONTROL_PORT, SERVER_PORT),
            message=f"ports {CONTROL_PORT}, {RENDEZVOUS_PORT} and {SERVER_PORT} are used by the training itself",
            field="metricsPort",
        ),
    )
    metrics_port: Annotated[StrictInt, Field(ge=1024, le=65535)] = METRICS_PORT
    """Port of /metrics in every pod. Default: 9400."""
    status_interval_seconds: Annotated[StrictInt, Field(ge=1, le=3600)] = 5
    """Seconds between two updates of status.training. Default: 5."""


class DistTrainJobSpec(Model):
    """What shall be trained, and how."""

    RULES = (
        Rule(
            cel="self.strategy == oldSelf.strategy",
            check=None,
            message="is immutable; create a new job",
            field="strategy",
        ),
        Rule(
            cel="self.managedBy == oldSelf.managedBy",
            check=None,
            message="is immutable; create a new job",
            field="managedBy",
        ),
        Rule(
            cel="oldSelf.suspend || (has(self.image) == has(oldSelf.image) && (!has(self.image) || self.image == oldSelf.image))",
            check=None,
            message="is immutable while the job runs; suspend it first",
            field="image",
        ),
        Rule(
            cel="oldSelf.suspend || self.trainer == oldSelf.trainer",
            check=None,
            message="is immutable while the job runs; suspend it first",
            field="trainer",
        ),
        Rule(
            cel="has(self.parameterServer) == has(oldSelf.parameterServer) && "
            "(!has(self.parameterServer) || self.parameterServer.replicas == oldSelf.parameterServer.replicas)",
            check=None,
            message="the number of servers is immutable; create a new job",
            field="parameterServer",
        ),
        Rule(
            cel="has(self.parameterServer) == (self.strategy.type == 'ParameterServer')",
            check=lambda s: (s.parameter_server is not None) == (s.strategy.type is StrategyType.PARAMETER_SERVER),
            message="set it with strategy.type ParameterServer, such as {replicas: 2}, and only then",
            field="parameterServer",
        ),
        Rule(
            cel="self.strategy.type == 'DataParallel' || has(self.trainer.model)",
            check=lambda s: s.strategy.type is StrategyType.DATA_PARALLEL or s.trainer.model is not None,
            message="a script or command needs strategy.type DataParallel; the other strategies need model and dataset",
            field="trainer",
        ),
        Rule(
            cel="!has(self.strategy.parameterServer) || !has(self.parameterServer) || "
            "self.strategy.parameterServer.replication <= self.parameterServer.replicas",
            check=lambda s: (
                s.strategy.parameter_server is None
                or s.parameter_server is None
                or s.strategy.parameter_server.replication <= s.parameter_server.replicas
            ),
            message="strategy.parameterServer.replication must be at most parameterServer.replicas",
            field="strategy",
        ),
        Rule(
            cel="!has(self.strategy.parameterServer) || self.strategy.parameterServer.backupWorkers < self.worker.replicas",
            check=lambda s: (
                s.strategy.parameter_server is None or s.strategy.parameter_server.backup_workers < s.worker.replicas
            ),
            message="strategy.parameterServer.backupWorkers must be below worker.replicas",
            field="strategy",
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
            field="trainer",
        ),
        Rule(
            cel="self.trainer.backend != 'nccl' || self.worker.gpusPerWorker > 0",
            check=lambda s: s.trainer.backend is not Backend.NCCL or s.worker.gpus_per_worker > 0,
            message="backend nccl needs worker.gpusPerWorker >= 1; use gloo on CPUs",
            field="trainer",
        ),
        Rule(
            cel="!has(self.trainer.model) || self.trainer.batchSize >= self.worker.replicas * "
            "(self.worker.gpusPerWorker > 0 ? self.worker.gpusPerWorker : 1)",
            check=lambda s: (
                s.trainer.model is None or s.trainer.batch_size >= s.worker.replicas * max(1, s.worker.gpus_per_worker)
            ),
            message="trainer.batchSize is global and must give every worker process at least one sample",
            field="trainer",
        ),
        Rule(
            cel="!has(self.strategy.modelParallel) || self.worker.replicas * (self.worker.gpusPerWorker > 0 ? "
            "self.worker.gpusPerWorker : 1) % (self.strategy.modelParallel.tensor * self.strategy.modelParallel.pipeline) == 0",
            check=lambda s: (
                s.strategy.model_parallel is None
                or s.worker.replicas
                * max(1, s.worker.gpus_per_worker)
                % (s.strategy.model_parallel.tensor * s.strategy.model_parallel.pipeline)
                == 0
            ),
            message="workers x GPUs each must be a multiple of tensor x pipeline",
            field="strategy",
        ),
    )
    suspend: StrictBool = False
    """true: checkpoint, then free every pod; back to false: go on where it was. Default: false."""
    managed_by: Annotated[str, StringConstraints(pattern=r"^[a-z0-9.-]+/[a-zA-Z0-9._-]+$", max_length=63)] = MANAGED_BY
    """Controller that runs the job; any other value than disttrain.dev/operator: hands off. Immutable. Default: disttrain.dev/operator."""
    image: Annotated[str, StringConstraints(pattern=r"^[^\s]+$", max_length=1024)] | None = None
    """Image of the training containers. Default: the operator's trainer image. Needs our trainer and an `env` with --block-signal (GNU
    coreutils 8.31), except for a trainer.command."""
    strategy: Strategy
    """How the training is distributed. Immutable."""
    trainer: Trainer
    """What is trained."""
    data: Data | None = None
    """Where the data lies and how it is handed out."""
    master: Master = Master()
    """The one pod that hosts rendezvous, data ledger and progress."""
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
        """Training processes in a worker pod: one for each GPU, or one on the CPU."""
        return max(1, self.worker.gpus_per_worker)

    @property
    def world_size(self) -> int:
        """Training processes of the whole job."""
        return self.worker.replicas * self.processes_per_worker

    @property
    def checkpoint_path(self) -> str | None:
        """Where the checkpoint volume is mounted, None when there is none."""
        return CHECKPOINT_PATH if self.checkpoint else None
