"""What `decide` sees and what it answers: Snapshot and Plan. Frozen data, no behaviour beyond look-ups.

The controller fills a Snapshot from its cache of the API server, `disttrain run` from its processes; both carry a Plan's actions out.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum, StrEnum, auto
from typing import TypeAlias

from disttrain.api.job import DistTrainJob
from disttrain.api.names import ChildKind, Role
from disttrain.api.runtime import Progress
from disttrain.api.status import DistTrainJobStatus
from disttrain.api.termination import Termination

DISRUPTED = "DisruptionTarget"
"""Pod condition: the pod is or was evicted, preempted, or its node is drained or gone."""


class Phase(StrEnum):
    """Phase of a pod, as in the Pod API; a local process goes from Running to Succeeded or Failed."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    UNKNOWN = "Unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """A container beside the trainer that fails, or never becomes ready. It says nothing about the training, but a user has to know."""

    container: str
    words: str
    """What is wrong with it; the same as long as it is the same trouble."""
    since: datetime | None = None
    """It is trouble from this moment on. None: already."""
    until: datetime | None = None
    """And until this one. None: as long as it is seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView:
    """One pod of the job, owned by it, reduced to what decisions need."""

    name: str
    uid: str
    role: Role
    index: int
    attempt: int
    phase: Phase
    created: datetime
    ready: bool = False
    """Whether the trainer container is ready, and its node reports. Other containers, and readiness gates, do not matter here."""
    ready_since: datetime | None = None
    """When it became ready, as its node says; None: not known."""
    scheduled: bool = False
    deleting: bool = False
    deletion_deadline: datetime | None = None
    """When the grace period of a deleting pod ends (its deletionTimestamp)."""
    finished: datetime | None = None
    """When the trainer container ended; for a pod that failed without (evicted), when the pod did."""
    exit_code: int | None = None
    """Exit code of the trainer container; None when it never ran to an end."""
    reason: str = ""
    """Why it failed or waits: OOMKilled, Error, Evicted, ErrImagePull, CreateContainerConfigError, Unschedulable …"""
    message: str = ""
    """The message beside the reason, as Kubernetes gives it."""
    termination: Termination = field(default_factory=Termination)
    """The termination message of the trainer container; empty when it left none."""
    conditions: frozenset[str] = frozenset()
    """Types of the pod's conditions that are true, such as DisruptionTarget."""
    disruption: str = ""
    """Reason of its DisruptionTarget: DeletionByTaintManager, EvictionByEvictionAPI, PreemptionByScheduler …"""
    node: str = ""
    silent_since: datetime | None = None
    """Since when its node has not reported: Kubernetes took the pod's readiness away while its containers were ready. None: it reports."""
    trainer_image: str = ""
    """The trainer image of the operator that made the pod, for jobs that name none; empty: not known."""
    trouble: Trouble | None = None
    """The first container beside the trainer that is in trouble."""

    @property
    def done(self) -> bool:
        """Whether the pod has ended, well or badly."""
        return self.phase in (Phase.SUCCEEDED, Phase.FAILED)

    @property
    def ended(self) -> datetime:
        """When it ended, as its node says. One that does not say was refused by its node, right after it was made."""
        return self.finished or self.created


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What the API server refused, such as the creation of a child, and what it said to the last attempt."""

    name: str
    message: str
    retryable: bool
    """False when the job must change (an invalid pod; also what an admission policy forbids, until the policy changes);
    True for quota, a missing account, and the like. Both are tried again, the first seldom."""
    time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeSecret:
    """What became of the creation of the Secret that status.certificate names."""

    uid: str
    """"": another object has the name."""
    public_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A job and its children at one moment. `now` is the only clock that a decision has."""

    job: DistTrainJob
    now: datetime
    pods: tuple[PodView, ...] = ()
    """Every pod whose controller is this very job (by uid), deleting ones included."""
    children: frozenset[ChildKind] = frozenset()
    """The kinds of which the job has its object."""
    pod_group_phase: str = ""
    """The phase of its PodGroup, as the scheduler says it; "" while it has said none, and of a scheduler whose phases do not matter."""
    unavailable: frozenset[ChildKind] = frozenset()
    """Kinds that the cluster does not have, or that the operator has no right to."""
    secret: MadeSecret | None = None
    """What became of the Secret that status.certificate names; None: this process has not created it."""
    random_suffix: str = "0" * 16
    """16 random hex digits, drawn for this snapshot: they cannot be predicted."""
    progress: Progress | None = None
    """The master's newest report of this attempt, None when none was read."""
    progress_before: Progress | None = None
    """The report that was read before `progress`; None: not known."""
    progress_read: datetime | None = None
    """When `progress` was read, by the clock of `now`; None: this process has read none yet."""
    step_seen: datetime | None = None
    """When this process first read a report with its step, by the clock of `now`; None: not known."""
    listening_since: datetime | None = None
    """Since when this process has known the job, by the clock of `now`: it could read no report before. None: not known."""
    not_understood: tuple[str, ...] = ()
    """What another version has stored about the job and this one does not understand; then it must not be touched."""
    refusals: tuple[Refusal, ...] = ()
    suspend_refused: Refusal | None = None
    """What the API server said when the operator set spec.suspend for a rule of spec.health."""
    name_conflicts: tuple[str, ...] = ()
    """Names that the job needs and that objects of another owner hold."""
    former: tuple[str, ...] = ()
    """Names that the job needs and that objects of a former, deleted job of the same name hold until they have ended."""
    log_hint: str = "kubectl logs -n {namespace} {pod}"
    """How a user reads a pod's log; messages about failures end with it."""
    allows_host_access: bool = False
    """Pods of the job may reach into their nodes, where its templates say so."""
    keeps_certificates: bool = False
    """Certificates are kept without a Secret, as in a local run."""
    local: bool = False
    """It is a local run: the trained model is kept also where the job has no checkpoint volume."""

    @property
    def status(self) -> DistTrainJobStatus:
        """The status that was last written."""
        return self.job.status


@dataclass(frozen=True, slots=True, kw_only=True)
class Create:
    """Create the job's object of a kind."""

    kind: ChildKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """Delete the job's object of a kind."""

    kind: ChildKind


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateSecret:
    """Create the Secret that the stored status.certificate names, with a new certificate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteSecret:
    """Delete the Secret that the stored status.certificate names, if it is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatePod:
    """Make the pod of a role and index."""

    role: Role
    index: int
    attempt: int
    trainer_image: str = ""
    """The one that the other pods of the attempt have; empty: the operator's own. Processes of two releases do not train together, so an
    attempt keeps its image when the operator is upgraded or rolled back."""
    pod_group: ChildKind | None = None
    """The kind of the PodGroup that the pod is of; None: it is placed by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletePod:
    """Delete a pod, by uid, so that its successor of the same name is never hit."""

    name: str
    uid: str
    grace_seconds: int | None = None
    """None: the pod's own grace period; 0: at once (only where the node is known to be gone)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteJob:
    """Delete the job itself: its TTL is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspendJob:
    """Set spec.suspend of the job."""


Action: TypeAlias = Create | Delete | CreateSecret | DeleteSecret | CreatePod | DeletePod | DeleteJob | SuspendJob


class Write(Enum):
    """When a status that has changed is written. The one who carries the plan out knows how long requests take, and chooses the seconds."""

    NOW = auto()
    """The next step depends on it, a user has to act on it, the job ends, or the next pass could not see it any more."""
    BEGINNING = auto()
    """A job began without trouble. Now, but of many jobs at once all get their pods first; the first status then says how these fare."""
    SOON = auto()
    """A stage of the start: several changes become one write."""
    PROGRESS = auto()
    """Newer figures of a training, and nothing else. Jobs take turns: the whole operator writes only so many of these in a second."""
    WITH_NEXT = auto()
    """Counts and other words for the same: with the next larger change, or after a while by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An Event to post about the job."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now, in this order; then the status to write; then when to look again if nothing happens before."""

    actions: tuple[Action, ...] = ()
    status: DistTrainJobStatus
    events: tuple[Event, ...] = ()
    look_again: timedelta | None = None
    """By the stored status; when the new one is stored, plan.look_again says it. None: only when something happens."""
    final: bool = False
    """Whether the status says something that nothing takes back: the job fails or restarts, or a running pod is declared failed."""
    asks: bool = False
    """The master's report is to be read now, and decided again: the job ends, and no report is read after that."""
    write: Write = Write.NOW
    """When the status is written, if it has changed."""

    @property
    def irreversible(self) -> bool:
        """Whether it must be decided on the state of now, read from the API server, and not on the cache alone."""
        return self.final or any(
            isinstance(action, DeleteJob) or (isinstance(action, DeletePod) and action.grace_seconds == 0)
            for action in self.actions
        )
