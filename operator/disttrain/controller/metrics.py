"""Every metric of the operator, and how a change of a job's status becomes one. No counter carries a job's name.

Jobs by state is a gauge that is counted at each scrape (`JobsCollector`), so that it cannot drift from the cache.
"""

import contextlib
import re
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from disttrain.api.names import Role
from disttrain.api.reasons import ConditionType, JobState, Reason
from disttrain.api.status import WHOLE_JOB, Condition, DistTrainJobStatus, LastRestart
from disttrain.kube.api import OPTIONAL, Resource

REGISTRY = CollectorRegistry()
_ROLES = {role.status_name: role.value for role in Role}
"""The label of a role as the trainers' metrics have it, so that the two can be joined; the status has another word."""
_JOB = "job"
"""The label where no pod is to blame."""
_LOST_POD = re.compile(rf"\b[Pp]od \S+-({'|'.join(role.short for role in Role)})-[0-9]+\b")
"""The pod that a message of Restarting is about (plan/words.py)."""
_SECONDS = (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800)

JOBS_FINISHED = Counter(
    "disttrain_operator_jobs_finished_total", "Jobs that ended.", ["result", "reason"], registry=REGISTRY
)
RESTARTS = Counter(
    "disttrain_operator_restarts_total",
    "Failed pods that were replaced, and processes that were restarted in their pods.",
    ["role", "reason"],
    registry=REGISTRY,
)
RECONCILE_SECONDS = Histogram(
    "disttrain_operator_reconcile_duration_seconds",
    "One pass over one job.",
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 15),
    registry=REGISTRY,
)
RECONCILE_ERRORS = Counter(
    "disttrain_operator_reconcile_errors_total", "Passes that failed and were queued again.", registry=REGISTRY
)
QUEUE_DEPTH = Gauge("disttrain_operator_queue_depth", "Jobs that wait for a pass.", registry=REGISTRY)
STARTUP_SECONDS = Histogram(
    "disttrain_operator_startup_seconds",
    "From the start of a job to all nodes found (schedule), from there to all pods ready (ready), to the first step (train).",
    ["phase"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
RECOVERY_SECONDS = Histogram(
    "disttrain_operator_recovery_seconds",
    "From the failure of a pod until the job is whole again.",
    ["role"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
API_REQUESTS = Counter(
    "disttrain_operator_api_requests_total",
    "Requests to the API server; code none: no answer.",
    ["verb", "resource", "code"],
    registry=REGISTRY,
)
WATCH_AGE = Gauge(
    "disttrain_operator_watch_age_seconds",
    "Since a watch last reported something, or a resync found that it had nothing to report.",
    ["resource"],
    registry=REGISTRY,
)
DRIFT = Counter(
    "disttrain_operator_resync_drift_total",
    "Objects that a watch had missed, by kind.",
    ["resource"],
    registry=REGISTRY,
)


def watched(resource: Resource) -> str:
    """The label of a kind that is watched. The kinds that a cluster need not have share their plural."""
    return resource.full_name if resource in OPTIONAL else resource.plural


LEADER = Gauge("disttrain_operator_leader", "1 while this replica acts.", registry=REGISTRY)


def count_request(verb: str, resource: str, code: str) -> None:
    """Counts a request to the API server."""
    API_REQUESTS.labels(verb, resource, code).inc()


class JobsCollector(Collector):
    """disttrain_operator_jobs{state}, counted at scrape time."""

    def __init__(self, states: Callable[[], Iterable[str]]) -> None:
        self._states = states

    def collect(self) -> Iterator[Metric]:
        tally = Tally(self._states())
        family = GaugeMetricFamily("disttrain_operator_jobs", "Jobs by state.", labels=["state"])
        for state in JobState:
            family.add_metric([state], tally[state])
        yield family


@contextlib.contextmanager
def live(states: Callable[[], Iterable[str]]) -> Iterator[None]:
    """For a block, what is read at each scrape: the jobs' states; memory, CPU and open files of this process; its Python."""
    collectors: list[Collector] = [
        JobsCollector(states),
        ProcessCollector(registry=None),
        PlatformCollector(registry=None),
    ]
    for one in collectors:
        REGISTRY.register(one)
    try:
        yield
    finally:
        for one in collectors:
            REGISTRY.unregister(one)


def observe(old: DistTrainJobStatus, new: DistTrainJobStatus, now: datetime) -> None:
    """Counts what happened between two states of a job, of which the newer was just written."""
    for result in (ConditionType.COMPLETE, ConditionType.FAILED):
        if new.is_true(result) and not old.is_true(result) and (condition := new.condition(result)):
            JOBS_FINISHED.labels(result, condition.reason).inc()
    _count_restarts(old, new)
    _measure_recovery(old, new, now)
    _measure_start(old, new, now)


def _count_restarts(old: DistTrainJobStatus, new: DistTrainJobStatus) -> None:
    last = new.restarts.last if new.restarts else None
    if new.restarts is None or last is None:
        return
    before = {replicas.role: replicas.restarts for replicas in old.replica_statuses}
    without_a_pod = new.restarts.total - (old.restarts.total if old.restarts else 0)
    for replicas in new.replica_statuses:
        more = replicas.restarts - before.get(replicas.role, 0)
        if more > 0:
            RESTARTS.labels(_ROLES.get(replicas.role, _JOB), last.reason).inc(more)
            without_a_pod -= more
    if without_a_pod > 0 and last.role == WHOLE_JOB:
        RESTARTS.labels(_JOB, last.reason).inc(without_a_pod)


def _measure_recovery(old: DistTrainJobStatus, new: DistTrainJobStatus, now: datetime) -> None:
    """Of a job that is whole again. One that ended or was suspended is not restarting either, and a deleted pod is no failure."""
    before, after = old.condition(ConditionType.RESTARTING), new.condition(ConditionType.RESTARTING)
    if not (before and after) or (before.status, after.reason) != ("True", Reason.RECOVERED):
        return
    last = new.restarts.last if new.restarts else None
    if before.reason == Reason.REPLACED or (last is None and not _LOST_POD.search(before.message)):
        return
    # A pod that was lost without a failure may come long after the last failure.
    since = max(last.time, before.last_transition_time) if last else before.last_transition_time
    RECOVERY_SECONDS.labels(_role_lost(before, last)).observe(max(0.0, (now - since).total_seconds()))


def _role_lost(restarting: Condition, last: LastRestart | None) -> str:
    """The role of the pod that the condition names. It need not be that of the last failure: a pod that is lost with its node is none.
    Of a stall the condition names no pod, and the last failure says who was waited for."""
    if named := _LOST_POD.search(restarting.message):
        return next(role.value for role in Role if role.short == named[1])
    return _ROLES.get(last.role, _JOB) if last else _JOB


def _measure_start(old: DistTrainJobStatus, new: DistTrainJobStatus, now: datetime) -> None:
    """Measures a first start only: a later one is a recovery."""
    start = new.start_time
    if start is None or (new.restarts and new.restarts.total) or (new.attempt or 1) > 1:
        return
    # What has changed since the start was true once: a pod that is deleted makes it false, and true again, hours later.
    changed = {condition.type for condition in old.conditions if condition.last_transition_time > start}
    if ConditionType.RESTARTING in changed or new.is_true(ConditionType.RESTARTING):
        return
    # Not so for Progressing: it is Unknown, before any step, when the operator cannot reach the master at first.
    changed.discard(ConditionType.PROGRESSING)
    if old.training and old.training.last_update_time:
        changed.add(ConditionType.PROGRESSING)
    for phase, begin, end in (
        ("schedule", None, ConditionType.SCHEDULED),
        ("ready", ConditionType.SCHEDULED, ConditionType.READY),
        ("train", ConditionType.READY, ConditionType.PROGRESSING),
    ):
        since = start if begin is None else _since(new, begin)
        if since and new.is_true(end) and not old.is_true(end) and end not in changed:
            STARTUP_SECONDS.labels(phase).observe(max(0.0, (now - since).total_seconds()))


def _since(status: DistTrainJobStatus, type_: str) -> datetime | None:
    condition = status.condition(type_)
    return condition.last_transition_time if condition and condition.status == "True" else None
