"""status.goodput: where the time of a job went, every second between its start and its end in exactly one bucket.

A master's time is booked as the master counted it (api/goodput.py), so that the status and Prometheus say the same. The time without a
master goes to the state that the status had then; a change of the state is always written, so that no time goes to a wrong one. A command
has no master that counts: there the state alone decides.
"""

import math
from datetime import timedelta

from disttrain.api import goodput as rule
from disttrain.api.reasons import ConditionType, JobState, Reason
from disttrain.api.status import DistTrainJobStatus, Goodput, TrainingStatus
from disttrain.plan import progress
from disttrain.plan.view import JobView

_BUCKETS = {
    JobState.PENDING: "queued_seconds",
    JobState.SCHEDULING: "queued_seconds",
    JobState.STARTING: "starting_seconds",
    JobState.RESTARTING: "starting_seconds",
    JobState.RESIZING: "starting_seconds",
    JobState.TRAINING: "productive_seconds",
    JobState.STALLED: "stalled_seconds",
}
"""A suspended job has no bucket: it holds nothing."""
_NO_NODE = frozenset({Reason.UNSCHEDULABLE, Reason.POD_REFUSED, Reason.WAITING_FOR_GANG, Reason.GANG_TIMED_OUT})
"""Reasons of Scheduled with which a job that has lost a pod waits for a node or a quota, as it did at its start."""
_RUNS = frozenset({JobState.TRAINING, JobState.STALLED})


def time_spent(view: JobView, training: TrainingStatus | None, *, state: JobState | None) -> Goodput | None:
    """status.goodput up to now; None before the job started. `state`: that of the status which is written."""
    if not view.started:
        return None
    before = view.status.goodput or Goodput(accounted_until=view.status.start_time)
    entries = before.model_dump(exclude={"accounted_until", "master"})
    since = before.accounted_until or view.second
    bucket = _bucket(view.status)
    if bucket is None:
        return Goodput(**entries, accounted_until=max(since, view.second), master=before.master)
    open_seconds = max(0, int((view.second - since).total_seconds()))
    report = progress.newest(view)
    spent = report.goodput if report is not None else None
    known = before.master
    if spent is not None and known is not None and known.began != spent.began:
        known = None  # another master
    added = rule.booked(spent, known, most=open_seconds) if spent is not None else {}
    rest = open_seconds - sum(added.values())
    follows = spent is not None and known is not None
    without_report = spent is None and before.master is not None and state in _RUNS
    ends = state in (JobState.COMPLETE, JobState.FAILED, JobState.SUSPENDED)
    if ends or not (follows or without_report):
        if spent is not None and not ends:
            rest = max(0, rest - math.ceil(spent.undecided_seconds))
        added[bucket] = added.get(bucket, 0) + rest
    for name, seconds in added.items():
        entries[name] += seconds
    if spent is None and before.master is None:
        _mark_redone(entries, view, training)
    return Goodput(
        **entries,
        accounted_until=since + timedelta(seconds=sum(added.values())),
        master=before.master if spent is None else rule.whole(spent),
    )


def _bucket(status: DistTrainJobStatus) -> str | None:
    """Where the time goes that no master counts, by the stored status; None: nowhere."""
    scheduled = status.condition(ConditionType.SCHEDULED)
    waits = scheduled is not None and scheduled.status == "False" and scheduled.reason in _NO_NODE
    if status.state is JobState.RESTARTING and waits:
        return _BUCKETS[JobState.SCHEDULING]
    return _BUCKETS.get(status.state or JobState.PENDING)


def _mark_redone(entries: dict[str, int], view: JobView, training: TrainingStatus | None) -> None:
    """Where no master counts: the time of steps that were lost, and are done again, was not productive."""
    stored = view.status.training
    if stored is not None and training is not None:
        lost = rule.redone(entries["productive_seconds"], reached=stored.step, back_to=training.step)
        entries["productive_seconds"] -= lost
        entries["redone_seconds"] += lost
