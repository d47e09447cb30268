"""What follows from a failed pod: replace it, restart the job, or fail it; counted exactly once.

A failure is written down before anything is done about it. Replaced is a pod one pass later, when its uid stands in
`restarts.accounted`; a restart of the job is written down as the next attempt, and the pods of older attempts are never counted.
Not here: the numbers (account.py), the deletions and creations themselves (children.py), the waits of the whole job (deadlines.py).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Any

from disttrain.api.environment import ExitCode
from disttrain.api.names import Role
from disttrain.api.reasons import ConditionType, Reason
from disttrain.api.spec import Action
from disttrain.api.status import LastRestart, ReplicaStatus, Restarts
from disttrain.plan import blame, children, disruptions, words
from disttrain.plan.account import checkpoint_resets, counted_so_far, counts, finished, record, rule_for
from disttrain.plan.blame import Verdict
from disttrain.plan.ending import fail
from disttrain.plan.model import DISRUPTED, Event, Phase, PodView
from disttrain.plan.step import Claim, Step
from disttrain.plan.view import REPORT_TIMEOUT, JobView

COLLECT_FAILURES_FOR = timedelta(seconds=3)
"""For a command: its peers fail from the loss of one, and the first to fail may be the last that we hear of."""


def failures(view: JobView) -> Step | None:
    """What to do about the failures that are not written down yet."""
    if view.runs_command and (lost := _lost_worker(view)):
        name, reason = lost
        message = f"Pod {name} {words.HOW_LOST[reason]}; the others cannot go on without it"
        return _restart_uncounted(view, reason, message)
    accounted = set(view.restarts.accounted)
    fresh = [pod for pod in view.failed if pod.uid not in accounted]
    if not fresh:
        return None
    if view.runs_command and (until := min(view.until(pod.ended, COLLECT_FAILURES_FOR) for pod in fresh)) > view.now:
        return Step(look=until)
    root = blame.root_cause(view, fresh)
    if root is None:
        master = _silent_master(view) if blame.recorded_cause(view) is None else None
        return _without_cause(view, fresh) if master is None else _replace_silent(view, master, fresh)
    verdict = blame.verdict(view, root)
    if verdict is Verdict.CONSEQUENCE:
        return _of_a_lost_peer(view, fresh, root)

    rule = rule_for(view, root)
    action = rule.action if rule else view.spec.failure_policy.default_action
    message = words.failure(view, root)
    if action is Action.FAIL_JOB and verdict is Verdict.OPEN:
        return _open(view, root, message)
    if action is Action.FAIL_JOB and verdict is Verdict.UNSURE:
        action, message = Action.RESTART_REPLICA, f"{message} (another pod is not ready, so it may have lost its peer)"
    if action is Action.FAIL_JOB:
        if where := _nan_loss(view):
            return fail(view, Reason.NAN_LOSS, f"The loss was not finite: {where}. {message}")
        reason = Reason.USER_CODE if root.exit_code == 1 else Reason.FAILURE_POLICY
        return fail(view, reason, f"{message} (rule {rule.name})" if rule else message)
    counted = counts(view, root)
    if counted and (over := limit_exceeded(view, message)):
        return over
    if action is Action.RESTART_JOB or view.runs_command:
        last = words.last_restart(root, finished=finished(view, root))
        restarts = record(view, failed=1, counted=counted, last=last)
        step = restart_job(view, blame=root.role, restarts=restarts, reason=_reason(root), message=message)
    else:
        step = _replace(view, fresh, first=root, counted=counted, message=message)
    return step if counted else _disrupted(view, step)


def limit_exceeded(view: JobView, message: str) -> Step | None:
    """The end of the job when one more failure is too many."""
    limit = view.spec.run_policy.backoff_limit
    if counted_so_far(view) < limit:
        return None
    tries = f"{limit} failure{'' if limit == 1 else 's'}"
    since = " since the last checkpoint" if checkpoint_resets(view) and view.checkpoint_step else ""
    return fail(
        view, Reason.BACKOFF_LIMIT_EXCEEDED, f"More than {tries}{since} (runPolicy.backoffLimit). The last: {message}"
    )


def restart_job(view: JobView, *, blame: Role | None, restarts: Restarts, reason: Reason, message: str) -> Step:
    """The next attempt, written down; its pods are made in the passes that follow."""
    return Step(
        status={
            "attempt": view.attempt + 1,
            # Pods of an older attempt are never counted, so there is nothing to remember of them.
            "restarts": restarts.model_copy(update={"accounted": ()}),
            **_replica_restarts(view, [blame] if blame else []),
        },
        claims=(
            Claim(type=ConditionType.RESTARTING, status="True", reason=reason, message=message),
            *new_attempt_claims("The job is restarted"),
        ),
        events=(
            Event(reason=reason, message=f"Restarting the job (attempt {view.attempt + 1}): {message}", warning=True),
        ),
        final=True,
        again=True,
    )


def new_attempt_claims(message: str) -> tuple[Claim, ...]:
    """What can be said of an attempt that has no pods yet."""
    reasons = {
        ConditionType.SCHEDULED: Reason.SCHEDULING,
        ConditionType.READY: Reason.STARTING,
        ConditionType.PROGRESSING: Reason.STARTING,
    }
    return tuple(Claim(type=kind, status="False", reason=reason, message=message) for kind, reason in reasons.items())


def _lost_worker(view: JobView) -> tuple[str, Reason] | None:
    """A worker of a command that was taken away after the job had all its pods, and by whom."""
    if not view.status.is_true(ConditionType.SCHEDULED):
        return None
    for slot in view.wanted:
        pod = view.present.get(slot)
        if slot[0] is Role.WORKER and not view.needs_no_pod(slot) and (pod is None or pod.deleting):
            return view.name(slot), words.disruption(pod) if pod is not None else Reason.REPLACED
    return None


def _restart_uncounted(view: JobView, reason: Reason, message: str) -> Step:
    step = restart_job(view, blame=None, restarts=view.restarts, reason=reason, message=message)
    return _disrupted(view, step)


def _disrupted(view: JobView, step: Step) -> Step:
    """What does not count has a pause of its own."""
    return replace(step, status={**step.status, "disruptions": disruptions.one_more(view)})


def _of_a_lost_peer(view: JobView, fresh: list[PodView], root: PodView) -> Step:
    """A program of the user's that ended because another pod was taken away, or has no node. That is no fault of the job."""
    message = f"{words.failure(view, root)} (after another pod of the job was lost)"
    if view.runs_command:
        return _restart_uncounted(view, Reason.REPLICA_FAILED, message)
    return _disrupted(view, _consequences(view, fresh, last=root))


def _open(view: JobView, root: PodView, message: str) -> Step:
    """The rest of the job goes on while it is not known whether the exit code is the cause; a node's loss shows within a minute."""
    until = blame.open_until(view, root)
    text = f"{message} (the job fails for it at {until:%H:%M:%S} UTC unless a node turns out to be lost)"
    step = children.converge(view)
    claims = [Claim(type=ConditionType.READY, status="False", reason=Reason.REPLICA_FAILED, message=text)]
    if view.status.is_true(ConditionType.SCHEDULED):  # the job had all its pods
        claims.append(replace(claims[0], type=ConditionType.RESTARTING, status="True"))
    look = min(step.look, until) if step.look is not None else until
    return replace(step, claims=tuple(claims), look=look)


def _without_cause(view: JobView, fresh: list[PodView]) -> Step:
    """Pods that lost their peers, or that failed because of another one. Once that is nobody's fault.

    When those that came in their place met, made no step and lost one another again, it is a failure like any other: a network that
    cuts them off, a device that hangs. Else it would go on without end. Those that fail one by one after the same loss are older
    than what was written down of the first, and are one loss with it.
    """
    ordered = sorted(fresh, key=lambda pod: (finished(view, pod), pod.role.value, pod.index))
    last = view.restarts.last
    if blame.recorded_cause(view) is not None:
        return _consequences(view, fresh, last=None)
    lost_before = last is not None and last.exit_code == ExitCode.PEER_LOST and not view.stepped_since(last.time)
    if last is None or not lost_before:
        return _consequences(view, fresh, last=ordered[0])
    for pod in ordered:
        rule = rule_for(view, pod)
        if (rule is None or rule.count_towards_limit) and pod.created > last.time and _met(view, pod):
            message = f"{words.failure(view, pod)}; so it was before, and no step was made since"
            return limit_exceeded(view, message) or _replace(view, fresh, first=pod, counted=True, message=message)
    return _consequences(view, fresh, last=None)


def _met(view: JobView, pod: PodView) -> bool:
    """Whether the job was ready in the time of the pod. One that waits for a peer without a node does not fail in vain: the start-up and
    recovery deadlines say for how long it may."""
    ready = view.status.condition(ConditionType.READY)
    return ready is not None and (ready.status == "True" or ready.last_transition_time > pod.created)


def _consequences(view: JobView, fresh: list[PodView], *, last: PodView | None) -> Step:
    """Written down without counting. `last`: the one that stands for them, None when what is written there says more."""
    words_of_last = words.last_restart(last, finished=finished(view, last)) if last is not None else None
    step = _written_down(view, fresh, record(view, failed=len(fresh), counted=False, last=words_of_last))
    if view.status.is_true(ConditionType.RESTARTING):
        return step  # what is said already names the cause; these are its consequences
    first = min(fresh, key=lambda pod: (finished(view, pod), pod.role.value, pod.index))
    return _told(step, _reason(first), _and_more(words.failure(view, first), fresh))


def _replace(view: JobView, fresh: list[PodView], *, first: PodView, counted: bool, message: str) -> Step:
    """The failures written down, so that their pods are replaced in a later pass."""
    last = words.last_restart(first, finished=finished(view, first))
    step = _written_down(view, fresh, record(view, failed=len(fresh), counted=counted, last=last))
    return _told(step, _reason(first), _and_more(message, fresh))


def _and_more(message: str, fresh: list[PodView]) -> str:
    return f"{message} (and {len(fresh) - 1} more after it)" if len(fresh) > 1 else message


def _silent_master(view: JobView) -> PodView | None:
    """A master that runs, was heard once, and is heard no more, neither by the operator nor by peers that gave it up.

    Either alone says little: the operator's own network may be cut, and peers lose one another too. Together they say that it hangs.
    """
    master, read = view.present.get((Role.MASTER, 0)), view.snapshot.progress_read
    if master is None or master.deleting or master.phase is not Phase.RUNNING or read is None:
        return None
    if master in view.declared_failed:
        return None  # it is written down; these are its consequences
    if master.silent_since is not None:
        return None  # its whole node is not heard: that is no failure of the master
    return master if master.created < read < view.now - REPORT_TIMEOUT else None


def _replace_silent(view: JobView, master: PodView, fresh: list[PodView]) -> Step:
    """A running pod fails by our judgement. As any failure it is written down first; children.py deletes what is given up."""
    message = f"Pod {master.name} hangs: for {REPORT_TIMEOUT.seconds} s neither its peers nor the operator heard of it"
    if over := limit_exceeded(view, message):
        return over
    silent = Reason.MASTER_SILENT
    last = LastRestart(role=master.role.status_name, index=0, reason=silent, message=message, time=view.second)
    failed = [*fresh, master]
    step = _written_down(view, failed, record(view, failed=len(failed), counted=True, last=last))
    return replace(_told(step, silent, message), final=True)


def _written_down(view: JobView, fresh: list[PodView], restarts: Restarts) -> Step:
    uids = {pod.uid for pod in view.snapshot.pods}
    kept = [uid for uid in view.restarts.accounted if uid in uids]
    accounted = (*kept, *sorted(pod.uid for pod in fresh))
    account = {
        "restarts": restarts.model_copy(update={"accounted": accounted}),
        **_replica_restarts(view, [pod.role for pod in fresh]),
    }
    return Step(status=account, again=True)


def _told(step: Step, reason: Reason, message: str) -> Step:
    claim = Claim(type=ConditionType.RESTARTING, status="True", reason=reason, message=message)
    return replace(step, claims=(claim,), events=(Event(reason=reason, message=message, warning=True),))


def _reason(pod: PodView) -> Reason:
    return words.disruption(pod) if DISRUPTED in pod.conditions else Reason.REPLICA_FAILED


def _nan_loss(view: JobView) -> str:
    """Where the loss was not finite, "" when nobody said so."""
    reports = [view.progress, *(pod.termination.progress for pod in view.present.values())]
    return next((report.nan_loss for report in reports if report is not None and report.nan_loss), "")


def _replica_restarts(view: JobView, roles: Iterable[Role]) -> dict[str, Any]:
    """replicaStatuses with the restarts of the roles raised; the other counts are filled in by report.py."""
    more = Counter(roles)
    statuses = []
    for role in view.replicas:
        before = view.replica_status(role) or ReplicaStatus(role=role.status_name)
        statuses.append(before.model_copy(update={"restarts": before.restarts + more[role]}))
    return {"replica_statuses": tuple(statuses)}
