"""Where the time of a job went: every second between its start and its end in exactly one bucket.

The master's own count is taken as it is (trainer_image/disttrain_trainer/coordinator/goodput.py), so that the status and Prometheus say the
same. Here the time without a master is added, by the state that was stored then; a change of state is always written, so that none is given
to the wrong one. A command has no master that hears of steps: there the state decides alone.
"""

import math
from datetime import timedelta

from disttrain.api.reasons import ConditionType, JobState, Reason
from disttrain.api.runtime import TimeSpent
from disttrain.api.status import DistTrainJobStatus, Goodput, MasterTime, TrainingStatus
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
_OF_THE_MASTER = ("starting_seconds", "stalled_seconds", "redone_seconds", "productive_seconds")
"""In this order a part is left out that the state was given already, while the master was not heard."""
_NO_NODE = frozenset({Reason.UNSCHEDULABLE, Reason.POD_REFUSED, Reason.WAITING_FOR_GANG})
"""Reasons of Scheduled with which a job that has lost a pod waits for a node or a quota, as it did at its start."""
_RUNS = frozenset({JobState.TRAINING, JobState.STALLED})


def ledger(view: JobView, training: TrainingStatus | None, *, state: JobState | None) -> Goodput | None:
    """The ledger up to now. `state`: that of the status which is written."""
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
    booked = _news(spent, known, open_seconds) if spent is not None else {}
    rest = open_seconds - sum(booked.values())
    follows = spent is not None and known is not None
    unheard = spent is None and before.master is not None and state in _RUNS
    ends = state in (JobState.COMPLETE, JobState.FAILED, JobState.SUSPENDED)
    if ends or not (follows or unheard):
        if spent is not None and not ends:
            rest = max(0, rest - math.ceil(spent.undecided_seconds))
        booked[bucket] = booked.get(bucket, 0) + rest
    for name, seconds in booked.items():
        entries[name] += seconds
    if spent is None and before.master is None:
        _mark_redone(entries, view, training)
    return Goodput(
        **entries,
        accounted_until=since + timedelta(seconds=sum(booked.values())),
        master=before.master if spent is None else _whole(spent),
    )


def _bucket(status: DistTrainJobStatus) -> str | None:
    """Where the time goes that no master counts, by the stored status; None: nowhere."""
    scheduled = status.condition(ConditionType.SCHEDULED)
    waits = scheduled is not None and scheduled.status == "False" and scheduled.reason in _NO_NODE
    if status.state is JobState.RESTARTING and waits:
        return _BUCKETS[JobState.SCHEDULING]
    return _BUCKETS.get(status.state or JobState.PENDING)


def _news(spent: TimeSpent, known: MasterTime | None, most: int) -> dict[str, int]:
    """The whole seconds of a report that are not in the ledger yet, `most` at the most."""
    now = _whole(spent)
    news = {name: max(0, getattr(now, name) - (getattr(known, name) if known else 0)) for name in _OF_THE_MASTER}
    excess = sum(news.values()) - most
    for name in _OF_THE_MASTER:
        if excess > 0:
            cut = min(excess, news[name])
            news[name] -= cut
            excess -= cut
    return news


def _whole(spent: TimeSpent) -> MasterTime:
    return MasterTime(began=spent.began, **{name: int(getattr(spent, name)) for name in _OF_THE_MASTER})


def _mark_redone(entries: dict[str, int], view: JobView, training: TrainingStatus | None) -> None:
    """Where no master counts: steps that were lost are done again. The time that they had taken, at the mean speed, was not productive."""
    stored = view.status.training
    if stored is not None and training is not None and training.step < stored.step:
        lost = entries["productive_seconds"] * (stored.step - training.step) // stored.step
        entries["productive_seconds"] -= lost
        entries["redone_seconds"] += lost
