"""What a training process gets (JobConfig), and what the master reports (Progress).

They travel as JSON: in DISTTRAIN_JOB, and from the master's /progress.
"""

from typing import Annotated, Any

from pydantic import AwareDatetime, Field
from pydantic_core import from_json, to_json

from disttrain.api.base import Model
from disttrain.api.policies import Tls
from disttrain.api.precision import Precision
from disttrain.api.reading import NotReadable, read, read_json, sentences
from disttrain.api.storage import Checkpoint, Data
from disttrain.api.strategy import CompressionType, ParameterServerStrategy, StaleLearningRate, Strategy
from disttrain.api.trainer import Trainer
from disttrain.api.types import INT32_MAX, DnsLabel
from disttrain.api.values import MOST_VALUES

Address = str
"""host:port"""


class Addresses(Model):
    """Where the processes of the job listen. On a cluster these are DNS names of the job's Service, locally ports of loopback."""

    control: Address
    """The master's control connection."""
    rendezvous: Address
    """The torch.distributed store (MASTER_ADDR:MASTER_PORT)."""
    parameter_servers: tuple[Address, ...] = ()
    """The data connection of each server, by index."""
    copies: tuple[Address, ...] = ()
    """Where each worker serves its copies of the data, by index; only with data.replication."""


class JobConfig(Model):
    """The configuration of a training process; the same for every process of an attempt."""

    namespace: str
    name: DnsLabel
    uid: str
    """The job's uid: a process of another job of the same name is refused."""
    attempt: Annotated[int, Field(ge=1)]
    strategy: Strategy
    trainer: Trainer
    """Without `code`, which a worker finds at DISTTRAIN_CODE_DIR; the file of a script is named in full then."""
    code_origin: str | None = None
    """Where the code comes from, for messages; None without code."""
    data: Data | None = None
    checkpoint: Checkpoint | None = None
    workers: Annotated[int, Field(ge=1)]
    """Worker pods; of an elastic job the most that it has at a time."""
    min_workers: Annotated[int, Field(ge=1)] | None = None
    """Fewest worker pods with which an elastic job trains; None: the job always has all."""
    processes_per_worker: Annotated[int, Field(ge=1)] = 1
    """Training processes in each."""
    workers_per_machine: Annotated[int, Field(ge=1)] = 1
    """Workers that share a machine: 1 on a cluster, where each pod is a machine; all of them in a local run."""
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    tls: Tls = Tls.DISABLED
    parameter_servers: Annotated[int, Field(ge=0)] = 0
    addresses: Addresses
    startup_timeout_seconds: Annotated[float, Field(gt=0)] = 600
    """How long a process waits for its peers before it gives up with exit code 75."""
    peer_timeout_seconds: Annotated[float, Field(gt=0)] = 30
    """How long a silent peer is waited for in the middle of the training."""
    exit_codes_of_rules: tuple[Annotated[int, Field(ge=1, le=255)], ...] = ()
    """Exit codes that spec.failurePolicy decides about: a process that ends with one of them is not restarted in place."""
    roll_back_seconds: Annotated[int, Field(ge=0)] | None = None
    """A rule of spec.health may go back to a checkpoint that is so old: one at least as old is kept. None: no rule goes back."""

    def encode(self) -> str:
        """The configuration as JSON, without what is a default: a trainer of an older release, which a job may name as its image,
        meets a newer field only where the job uses it.

        It would ignore some of these, and talk in plain or train something else. With them `addresses` is a text, which each release before
        refuses and shows; the addresses are in another field.
        """
        if not (needed := self._needs_a_newer_trainer):
            return self.model_dump_json(by_alias=True, exclude_none=True, exclude_defaults=True)
        config = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
        config[_TLS_ADDRESSES], config[_ADDRESSES] = config[_ADDRESSES], f"{needed}, {_NEWER}"
        return to_json(config).decode()

    @property
    def _needs_a_newer_trainer(self) -> str:
        """The first field that a release before would ignore although it decides what is sent or trained; "" for none."""
        served, trainer = self.strategy.parameter_server, self.trainer
        if self.tls is not Tls.DISABLED:
            return f"network.tls is {self.tls.value}"
        if self.elastic:
            return "worker.elastic is set"
        if self.trainer.precision is not Precision.FLOAT32:
            return f"precision is {self.trainer.precision.value}"
        if self.trainer.max_gradient_norm is not None:
            return "trainer.maxGradientNorm is set"
        if trainer.early_stopping is not None:
            return "trainer.earlyStopping is set"
        if trainer.nan_policy is not None and trainer.nan_policy.roll_backs:
            return "trainer.nanPolicy is set"
        if trainer.hooks is not None:
            return "trainer.hooks is set"
        if self.roll_back_seconds is not None:
            return "health has a RollBack"
        if self.checkpoint is not None and self.checkpoint.keep_best is not None:
            return "checkpoint.keepBest is set"
        if self.trainer.gradient_accumulation_steps > 1:
            return "gradientAccumulationSteps is set"
        if self.trainer.learning_rate_schedule is not None:
            return "learningRateSchedule is set"
        if (optimizer := self.trainer.optimizer) is not None and (optimizer.groups or optimizer.factory is not None):
            return "optimizer.groups is set" if optimizer.groups else "optimizer.factory is set"
        if served is None:
            return ""
        if self.strategy.model_parallel is not None:
            return "Hybrid has parameterServer"
        if served.replication > 1:
            return "replication is above 1"
        if served.local_steps > 1:
            return "localSteps is above 1"
        if served.compression.type is not CompressionType.NONE:
            return f"compression is {served.compression.type.value}"
        if served.stale_learning_rate is not StaleLearningRate.CONSTANT:
            return f"staleLearningRate is {served.stale_learning_rate.value}"
        return ""

    @classmethod
    def decode(cls, text: str) -> "tuple[JobConfig, tuple[str, ...]]":
        """The configuration, and the fields of it that this version does not know. Raises ValueError for a value that it does not
        understand: to leave that out would train something else."""
        found = read(cls, _of_today(from_json(text)))
        if found.unreadable:
            raise NotReadable(sentences(found.unreadable))
        return found.value, found.unknown

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while the job trains."""
        return self.min_workers is not None

    @property
    def world_size(self) -> int:
        """Training processes of the whole job; of an elastic job the most that it has at a time."""
        return self.workers * self.processes_per_worker

    @property
    def min_processes(self) -> int:
        """Fewest training processes with which an elastic job trains; 1 of another job that trains with those that are there."""
        return 1 if self.min_workers is None else self.min_workers * self.processes_per_worker

    @property
    def parts_per_step(self) -> int:
        """Parts of a global batch: the same in every attempt, however many processes compute them."""
        return self.trainer.parts_per_step or self.data_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Groups of processes that compute a batch part each."""
        return max(1, self.world_size // self.strategy.model_parallel_size)

    @property
    def replication(self) -> int:
        """Parameter servers that hold each shard."""
        return self.strategy.exchange.replication if isinstance(self.strategy.exchange, ParameterServerStrategy) else 1

    @property
    def local_world_size(self) -> int:
        """LOCAL_WORLD_SIZE: training processes of one machine."""
        return self.workers_per_machine * self.processes_per_worker

    def local_rank(self, rank: int) -> int:
        """LOCAL_RANK: the number of a rank among those of its machine, which also picks its GPU."""
        return rank % self.local_world_size

    def group_rank(self, index: int) -> int:
        """GROUP_RANK: the number of a worker's machine."""
        return index // self.workers_per_machine

    @property
    def groups(self) -> int:
        """GROUP_WORLD_SIZE: machines of the workers."""
        return self.workers // self.workers_per_machine


_ADDRESSES, _TLS_ADDRESSES = "addresses", "tlsAddresses"
_NEWER = "which the trainer of this image does not know: take a newer image"
"""With the field before it short enough for a reader of 0.1.0, which shows values of up to 100 characters."""


def _of_today(config: Any) -> Any:
    """The configuration with the addresses where they are, and of an operator that had script.configMap, which it mounted at /script."""
    if isinstance(config, dict) and _TLS_ADDRESSES in config:
        config = dict(config)
        config[_ADDRESSES] = config.pop(_TLS_ADDRESSES)
    trainer = config.get("trainer") if isinstance(config, dict) else None
    script = trainer.get("script") if isinstance(trainer, dict) else None
    if isinstance(trainer, dict) and isinstance(script, dict) and script.get("configMap") is not None:
        script = {**script, "configMap": None, "file": f"/script/{script.get('file')}"}
        return {**config, "trainer": {**trainer, "script": script}}
    return config


NonNegative = Annotated[int, Field(ge=0, le=2**53 - 1)]
"""A count that every reader of JSON takes for what it is, and that fits into the int64 of a status."""


STEP = "step"


class ProgressCheckpoint(Model):
    """A complete checkpoint."""

    step: NonNegative
    time: AwareDatetime


class ProgressRollBacks(Model):
    """What trainer.nanPolicy did."""

    count: NonNegative
    left_out_parts: Annotated[str, Field(max_length=32768)] = ""
    """Numbers of the parts that are left out, such as "12-13,40"."""
    reason: str = ""
    """Of the last one: which process, which step."""


class ProgressBest(Model):
    """The checkpoint that checkpoint.keepBest keeps."""

    step: NonNegative
    value: float


class RestartsInPlace(Model):
    """The processes of one pod that ended and were started again in the pod, since the pod began. The numbers only grow, so that a
    reader that knows what it has counted counts each restart once, whichever process reports it and however often."""

    pod: Annotated[str, Field(min_length=1, max_length=64)]
    """uid of the pod."""
    restarts: NonNegative
    """All of them."""
    failures: NonNegative = 0
    """Those that count towards runPolicy.backoffLimit: all but those of processes that had lost a peer."""
    exit_code: Annotated[int, Field(ge=0, le=255)]
    """Of the last failure; of the last process, where none failed."""
    message: Annotated[str, Field(max_length=256)] = ""
    """How it ended."""
    time: AwareDatetime
    """When, by the clock of its node."""


MOST_PODS_REPORTED = 256
"""Pods with restarts in place that a report names: those that restarted last."""


class ProgressModel(Model):
    """The file of the trained model."""

    path: Annotated[str, Field(max_length=4096)]
    """As the processes of the job see it."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


Seconds = Annotated[float, Field(ge=0, le=INT32_MAX, allow_inf_nan=False)]


class TimeSpent(Model):
    """Where the time of a master went, from its start to the moment of the report. Each second is in one of these."""

    began: AwareDatetime
    """Its start, by its own clock. It tells one master from the next."""
    starting_seconds: Seconds = 0
    """Before its first step."""
    productive_seconds: Seconds = 0
    """Steps that were done for the first time."""
    redone_seconds: Seconds = 0
    """Steps that were lost and done again."""
    stalled_seconds: Seconds = 0
    """No step: a process is missing, or nothing moved for long."""
    undecided_seconds: Seconds = 0
    """Since the last step: only its end, or its loss, shows what this time was."""


class Progress(Model):
    """What the master knows, served as JSON at /progress of its metrics port."""

    attempt: int
    """The attempt that this is about."""
    step: NonNegative = 0
    total_steps: NonNegative | None = None
    epoch: NonNegative | None = None
    loss: float | None = None
    """Mean loss of the last steps (of a finished job of our own loop: the last ten); None before the first, NaN never: see nan_loss."""
    values: Annotated[dict[str, float], Field(max_length=MOST_VALUES)] | None = None
    """Named values that the loss returns, means as `loss` is; what is not finite is left out."""
    nan_loss: str | None = None
    """Set when the loss was not finite: which rank, which step."""
    samples_per_second: float | None = None
    world_size: NonNegative = 0
    """Training processes at work."""
    max_staleness_seen: NonNegative | None = None
    staleness: NonNegative | None = None
    """Iterations by which the fastest worker is ahead of the slowest now; None where workers wait for one another."""
    gradient_norm: float | None = None
    """Of the newest step whose norm is known, before clipping."""
    evaluation: dict[str, float] | None = None
    evaluation_step: NonNegative | None = None
    """The step of the parameters that were evaluated."""
    last_update_time: AwareDatetime | None = None
    """When the step last advanced, by the master's clock."""
    last_checkpoint: ProgressCheckpoint | None = None
    best: ProgressBest | None = None
    roll_backs: ProgressRollBacks | None = None
    stopped: str | None = None
    """Why the training ends before its last step."""
    model: ProgressModel | None = None
    """The trained model, once it is written: at the end of a training of our own loop that has a place for it."""
    waiting_for: str | None = None
    """What the job waits for, such as "worker-1, parameter-server-0 (31 s)"; None while it trains."""
    generation: NonNegative = 0
    """Number of the present round of this attempt, from 1; 0 before the first."""
    redone_steps: NonNegative = 0
    """Steps that were lost to a fault and done again."""
    dropped_samples: NonNegative | None = None
    """Samples that trainer.lastBatch Drop has left out; None where there are none."""
    goodput: TimeSpent | None = None
    """Where the time went; None where no steps are reported."""
    resumed: str | None = None
    """Where this attempt began when that was no plain start: the step, what has changed since that checkpoint, which ones did not hold."""
    warning: str | None = None
    """What the user has to know although nothing failed: a script's processes did not train together, a number of the evaluation is not
    finite."""
    finished: bool = False
    """Every step is done and the last checkpoint is complete."""
    restarts_in_place: Annotated[tuple[RestartsInPlace, ...], Field(max_length=MOST_PODS_REPORTED)] = ()
    """Of each pod that had any, the newest first."""

    @classmethod
    def decode(cls, text: str | bytes) -> "Progress":
        """A master's report; it may be of another version, so that what is not understood of it is left out. Raises ValueError, also
        where it does not say for sure which step of which attempt it is about."""
        found = read_json(cls, text)
        if STEP in found.unreadable:
            raise ValueError(f"{STEP}: {found.unreadable[STEP]}")
        return found.value


class SignedProgress(Model):
    """A report as the master of a job with network.tls Mutual gives it to who asks with a nonce: /progress/<nonce>."""

    report: str
    """A Progress as JSON."""
    signature: str
    """Of `signed_text`, by the key of the attempt's certificate: ECDSA with SHA-256, DER, base64."""


def signed_text(nonce: str, report: str) -> bytes:
    """What a master signs. The nonce is that of the question: an older report does not answer it."""
    return f"DistTrain progress\n{nonce}\n{report}".encode()
