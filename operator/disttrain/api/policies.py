"""How a job is run: retries and deadlines, failures, success, scheduling, network, observability."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, StrictBool, StrictInt, StringConstraints

from disttrain.api.base import IMMUTABLE, Model, Rule
from disttrain.api.names import CONTROL_PORT, METRICS_PORT, RENDEZVOUS_PORT, SERVER_PORT
from disttrain.api.types import INT32_MAX, DnsLabel, list_map

Seconds = Annotated[StrictInt, Field(ge=1, le=INT32_MAX)]


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
    """Seconds that a job that has not made a step yet may wait for its pods and peers, else it fails. It never ends a job that has trained.
    Default: 1800."""
    recovery_deadline_seconds: Seconds | None = None
    """Seconds that a job that has trained may wait for a lost pod, else it fails. Default: without end."""
    progress_deadline_seconds: Seconds = 900
    """Seconds without a step after which the job is Stalled and restarted. The clock stands still while a pod is missing, has no node, is
    not ready, or its node is silent. Default: 900."""
    active_deadline_seconds: Seconds | None = None
    """Seconds that the job may be active, else it fails; the clock starts again on resume. Default: no limit."""
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
    """Exit codes of the trainer container that match. A disruption explains any exit code: unless onPodConditions is set too, a rule
    with action FailJob does not match a pod that has the condition DisruptionTarget."""
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
    # The disruption first: a program that gets SIGTERM with its node ends with any exit code.
    FailureRule(
        name="preempted",
        on_pod_conditions=("DisruptionTarget",),
        action=Action.RESTART_REPLICA,
        count_towards_limit=False,
    ),
    FailureRule(name="bad-code", on_exit_codes=(1, 2, 126, 127), action=Action.FAIL_JOB),
)


class FailurePolicy(Model):
    """What is done when a pod fails. The first rule that matches wins."""

    rules: Annotated[tuple[FailureRule, ...], *list_map("name", max_items=20)] = DEFAULT_RULES
    """Rules in order. Default: a disruption is not counted, exit codes 1, 2, 126 and 127 fail the job."""
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
    NATIVE = "Native"


class Scheduling(Model):
    """How the pods find nodes."""

    gang: Gang = Gang.AUTO
    """Who places all pods of the job together: Coscheduling or Volcano. Auto: the one that the templates name as schedulerName, if the
    cluster has it; None: each pod is placed by itself. Kueue and Native are not supported by this version. Default: Auto."""
    timeout_seconds: Seconds = 600
    """Seconds after which an elastic job goes on without the workers that find no node, and a gang of which a part finds none gives its
    nodes back. Default: 600."""
    priority_class_name: Annotated[
        str, StringConstraints(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", max_length=253)
    ] = ""
    """PriorityClass of the pods. Default: none."""
    topology_key: Annotated[str, StringConstraints(pattern=r"^([-._/a-zA-Z0-9]+)?$", max_length=316)] = ""
    """Node label whose value all workers must share, such as topology.kubernetes.io/zone. Default: none."""


class NetworkPolicyMode(StrEnum):
    JOB_ONLY = "JobOnly"
    """A NetworkPolicy lets in the job's own pods, and every client to the metrics port."""
    NONE = "None"


class Tls(StrEnum):
    DISABLED = "Disabled"
    MUTUAL = "Mutual"


class Network(Model):
    """Who may talk to the job's pods, and how."""

    RULES = (Rule(cel="self.tls == oldSelf.tls", check=None, message=IMMUTABLE, field="tls", shows="tls"),)
    policy: NetworkPolicyMode = NetworkPolicyMode.JOB_ONLY
    """JobOnly: only the job's pods, and every client to the metrics port; None. Default: JobOnly."""
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
            shows="metricsPort",
        ),
        Rule(
            cel="self.metricsPort == oldSelf.metricsPort",
            check=None,
            message=IMMUTABLE,
            field="metricsPort",
            shows="metricsPort",
        ),
    )
    metrics_port: Annotated[StrictInt, Field(ge=1024, le=65535)] = METRICS_PORT
    """Port of /metrics in every pod. Default: 9400."""
    status_interval_seconds: Annotated[StrictInt, Field(ge=1, le=3600)] = 5
    """Seconds between two updates of status.training. Default: 5."""
