"""status of a DistTrainJob: what the operator writes, what `kubectl get dtj` and scripts read."""

from datetime import UTC
from functools import cached_property
from typing import Annotated, Literal

from pydantic import AwareDatetime, BeforeValidator, Field, PlainSerializer, StringConstraints
from pydantic_core import PydanticCustomError

from disttrain.api.base import Model
from disttrain.api.reasons import JobState
from disttrain.api.types import FiniteNumber, list_map
from disttrain.api.values import MOST_VALUES, ValueName


def _no_number(value: object) -> object:
    if isinstance(value, int | float):
        raise PydanticCustomError("time", "must be a moment such as 2026-01-01T12:00:00Z")
    return value


Time = Annotated[
    AwareDatetime,
    BeforeValidator(_no_number),
    PlainSerializer(lambda t: t.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), return_type=str, when_used="json"),
]
"""A moment in UTC, to the second, as metav1.Time."""
Count = Annotated[int, Field(ge=0)]
Text = Annotated[str, StringConstraints(max_length=32768)]
Short = Annotated[str, StringConstraints(max_length=253)]


class Condition(Model):
    """metav1.Condition."""

    type: Annotated[str, StringConstraints(max_length=316)]
    """Type of the condition."""
    status: Literal["True", "False", "Unknown"]
    """True, False or Unknown."""
    reason: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    """One CamelCase word why."""
    message: Text = ""
    """A sentence: what, where, what to do."""
    last_transition_time: Time
    """When the status last changed."""
    observed_generation: Count | None = None
    """The generation of the spec that this is about."""


class ReplicaStatus(Model):
    """Counts of one role."""

    role: Short
    """Master, ParameterServer or Worker."""
    desired: Count = 0
    """Pods that the job is to have."""
    ready: Count = 0
    """Pods that run and are ready."""
    succeeded: Count = 0
    """Pods that ended well."""
    failed: Count = 0
    """Pods that failed and are not yet replaced."""
    restarts: Count = 0
    """Replacements of pods of this role, and restarts in its pods, since the job began."""
    existing: Count = 0
    """Pods of this attempt that exist, ended ones included, and are not being deleted."""


WHOLE_JOB = "Job"
"""The role in `restarts.last` where no pod is to blame."""


class LastRestart(Model):
    """The last failure that was answered with a restart."""

    role: Short
    """Role of the pod that failed first, or that a stalled training waited for; Job where no pod is to blame."""
    index: Count
    """Index of that pod; 0 where there is none."""
    reason: Short
    """Why: the container's reason such as OOMKilled or Error, or the pod's such as Evicted."""
    exit_code: int | None = None
    """Exit code of the trainer container, where it had one."""
    message: Text = ""
    """The termination message of the container."""
    time: Time
    """When it failed."""


class CountedInPlace(Model):
    """What is counted of the processes of one pod that were restarted in place."""

    pod: Short
    """uid of the pod."""
    restarts: Count
    """All of them, in restarts.total."""
    failures: Count = 0
    """Those that count towards the limit."""


class Restarts(Model):
    """Failures so far."""

    total: Count = 0
    """Pods that failed and were replaced, and processes that were restarted in their pods."""
    counted_towards_limit: Count = 0
    """Those that count towards runPolicy.backoffLimit; set back by a checkpoint with OnCheckpoint."""
    last: LastRestart | None = None
    """The last one."""
    checkpoint_step: Count = 0
    """Step of the last checkpoint when counted_towards_limit was last raised; a later one sets the count back."""
    accounted: Annotated[tuple[Short, ...], Field(max_length=20_000)] = ()
    """Uids of failed pods that are counted above and not gone yet. Each failure is written down before its pod
    is deleted, so that none is counted twice or lost when the operator dies in between (as Job's uncountedTerminatedPods)."""
    in_place: Annotated[tuple[CountedInPlace, ...], *list_map("pod", max_items=20_000)] = ()
    """The same of restarts in place: how many of each pod that is not gone yet are counted above."""


class Disruptions(Model):
    """Pods that were taken away without a fault of the job: disrupted, or deleted by others. They do not count towards a limit; one that
    comes soon after another makes the job wait longer before it makes the pod again."""

    in_a_row: Count
    """Since the job last made steps with all its pods."""
    last: Time
    """When a pod was last taken away, or made again."""


class CheckpointStatus(Model):
    """A checkpoint that is complete on the volume."""

    step: Count
    """Step whose state it holds."""
    time: Time
    """When it was complete."""


class RollBacks(Model):
    """What trainer.nanPolicy did: the exception to every sample once an epoch."""

    count: Count
    """How often the training went back to a checkpoint."""
    left_out_parts: Annotated[str, StringConstraints(max_length=32768)] = ""
    """Parts that are left out, such as "12-13,40". Part k belongs to step k / partsPerStep."""
    reason: Text = ""
    """Of the last one: which process found the loss not finite, and at which step."""


class BestCheckpoint(Model):
    """The checkpoint that checkpoint.keepBest keeps: checkpoint.from takes it by its step."""

    step: Count
    """Step whose state it holds."""
    value: FiniteNumber
    """Its value of keepBest.metric."""


class ModelStatus(Model):
    """The trained model: safetensors, with the names of the module's state_dict()."""

    path: Annotated[str, StringConstraints(max_length=4096)]
    """Where the job's pods see it: in the job's folder of the checkpoint claim. Of a local run: a path of this machine."""
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$", max_length=64)]
    """Its digest in hex."""


class HealthStatus(Model):
    """What is remembered of one rule."""

    name: Short
    """Name of the rule."""
    since: Time | None = None
    """Since when it is in breach."""
    step: Count | None = None
    """The last step before the breach."""
    done: bool = False
    """Its action was taken for this breach. Default: false."""
    roll_backs: Count = 0
    """Roll-backs without a newer checkpoint between. Default: 0."""


class RollBack(Model):
    """The last roll-back of a rule of spec.health. Checkpoints of later steps, of attempts before it, are not taken any more."""

    attempt: Count
    """The attempt that it began."""
    step: Count
    """The last step that is believed."""


class CertificateStatus(Model):
    """The Secret with the certificate of an attempt, where network.tls is Mutual. Its name:
    <job>-<8 characters of the uid>-tls-<attempt>-<suffix>."""

    attempt: Count
    """Attempt whose processes have the certificate."""
    suffix: Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$", max_length=16)]
    """Random end of the Secret's name. It is stored before the Secret is created."""
    uid: Short | None = None
    """uid of the Secret, once it is created. Pods are created after that."""
    public_key: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9+/=]+$", max_length=1024)] | None = None
    """Public key of the certificate (SubjectPublicKeyInfo, DER, base64): the master signs its reports with the private one."""


class TrainingStatus(Model):
    """Progress, as the master reported it."""

    step: Count = 0
    """Global steps done."""
    total_steps: Count | None = None
    """Global steps of the whole job, where it is known."""
    epoch: Count | None = None
    """Epoch in work, from 1."""
    progress_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    """step / totalSteps in percent."""
    eta_seconds: Count | None = None
    """Seconds to the end at the present speed."""
    loss: FiniteNumber | None = None
    """Mean loss of the last steps; of a finished job of our own loop that of the last ten steps."""
    values: Annotated[dict[ValueName, FiniteNumber], Field(max_length=MOST_VALUES)] | None = None
    """Named values that trainer.loss returns, means as loss is."""
    samples_per_second: FiniteNumber | None = None
    """Samples per second of all workers together."""
    world_size: Count | None = None
    """Training processes at work."""
    max_staleness_seen: Count | None = None
    """BoundedStaleness: most steps that a worker was ahead of the slowest at the start of a step."""
    evaluation: Annotated[dict[Short, FiniteNumber], Field(max_length=32)] | None = None
    """What trainer.evaluate found on the test data, by name, such as accuracy."""
    evaluation_step: Count | None = None
    """Step of the parameters that were evaluated."""
    last_update_time: Time | None = None
    """When the step last advanced."""
    update_seconds: Count | None = None
    """Seconds between the last two advances that were seen. A program may report a step of many at a time."""
    last_checkpoint: CheckpointStatus | None = None
    """The newest complete checkpoint."""
    best_checkpoint: BestCheckpoint | None = None
    """The checkpoint with the best evaluation, which checkpoint.keepBest keeps."""
    roll_backs: RollBacks | None = None
    """What trainer.nanPolicy did; left out when it did nothing."""
    model: ModelStatus | None = None
    """The trained model, once it is written at the end of the training."""
    dropped_samples: Count | None = None
    """lastBatch Drop: samples that the epochs up to now have left out."""
    resumed: Text | None = None
    """Where the last attempt began: the step, what has changed in the job since that checkpoint, which checkpoints did not hold."""


class MasterTime(Model):
    """What a master has counted up to its last report, in seconds. The next report is compared with it."""

    began: Time
    """The start of that master, by its own clock."""
    starting_seconds: Count = 0
    """Before its first step."""
    productive_seconds: Count = 0
    """Steps done for the first time."""
    redone_seconds: Count = 0
    """Steps that were lost and done again."""
    stalled_seconds: Count = 0
    """No step."""


class Goodput(Model):
    """Where the time of the job went, in seconds. What the master reports (disttrain_goodput_seconds_total), and the time without one."""

    productive_seconds: Count = 0
    """Steps that were done for the first time, also those that were lost later; of a command the time that it trains."""
    queued_seconds: Count = 0
    """Waiting for nodes."""
    starting_seconds: Count = 0
    """From the first node to the first step, of each attempt."""
    redone_seconds: Count = 0
    """Steps that were lost and done again."""
    stalled_seconds: Count = 0
    """No step: a process was missing, or nothing moved for long."""
    accounted_until: Time | None = None
    """The moment up to which the seconds above count. A step that is in work is counted when it ends."""
    master: MasterTime | None = None
    """The part of the newest master."""


_INDEXES = r"^([0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*)?$"


class Room(Model):
    """For how many workers of an elastic job there are nodes, while that is fewer than it asks for."""

    workers: Count
    """Workers that the job uses."""
    since: Time
    """When this number was decided."""
    probing: bool = False
    """Whether the last of them is a probe: a pod that shows whether there is a node for one more. Default: false."""
    failed_probes: Count = 0
    """Probes in a row that found no node; each doubles the time to the next one. Default: 0."""


class WorkerStatus(Model):
    """The simple path that the scale subresource needs: it may not index a list."""

    ready_replicas: Count = 0
    """Workers that are ready."""
    target_replicas: Count | None = None
    """How many workers an elastic job uses now, between elastic.minReplicas and maxReplicas; left out of other jobs."""
    room: Room | None = None
    """Only while an elastic job has nodes for fewer workers than it asks for."""
    selector: Short = ""
    """Label selector of the workers."""
    completed_indexes: Annotated[str, StringConstraints(pattern=_INDEXES, max_length=32768)] | None = None
    """Workers that succeeded in this attempt, such as "0-2,5"; it holds when their pods are gone (as Job's completedIndexes)."""


class DistTrainJobStatus(Model):
    """What the job is doing."""

    observed_generation: Count | None = None
    """Generation of the spec that this status is about."""
    state: JobState | None = None
    """One word: Pending, Scheduling, Starting, Training, Stalled, Restarting, Resizing, Suspended, Complete or Failed."""
    conditions: Annotated[tuple[Condition, ...], *list_map("type", max_items=16)] = ()
    """Valid, Suspended, Scheduled, Ready, Progressing, Restarting, Complete, Failed."""
    start_time: Time | None = None
    """When the job first started; set again on resume."""
    completion_time: Time | None = None
    """When it became Complete or Failed."""
    replica_statuses: Annotated[tuple[ReplicaStatus, ...], *list_map("role", max_items=8)] = ()
    """Counts by role."""
    worker: WorkerStatus | None = None
    """Workers, for the scale subresource."""
    restarts: Restarts | None = None
    """Failures so far."""
    disruptions: Disruptions | None = None
    """Pods that were taken away lately; left out when there are none."""
    attempt: Count | None = None
    """Executions of the job: 1, and one more for each restart of the whole job and each resume."""
    parts_per_step: Count | None = None
    """Parts of a global batch of our own loop: trainer.partsPerStep, or the worker processes that the job had when it first started,
    of an elastic job those of elastic.maxReplicas. Written once."""
    certificate: CertificateStatus | None = None
    """The Secret of the attempt's certificate; only with network.tls Mutual, and while there is one."""
    health: Annotated[tuple[HealthStatus, ...], *list_map("name", max_items=20)] = ()
    """Rules of spec.health that are in breach, or rolled the job back."""
    roll_back: RollBack | None = None
    """The last roll-back of a rule of spec.health."""
    training: TrainingStatus | None = None
    """Progress."""
    goodput: Goodput | None = None
    """Where the time went."""

    def condition(self, type_: str) -> Condition | None:
        """The condition of a type, None when it was never set."""
        return self.by_type.get(type_)

    @cached_property
    def by_type(self) -> dict[str, Condition]:
        """The conditions by their types."""
        return {condition.type: condition for condition in self.conditions}

    def is_true(self, type_: str) -> bool:
        """Whether the condition is set and True."""
        condition = self.condition(type_)
        return condition is not None and condition.status == "True"
