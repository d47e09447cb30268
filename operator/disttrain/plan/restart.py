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
from disttrain.plan.world import SILENCE, World

SETTLE = timedelta(seconds=3)
"""For a command: its peers fail from the loss of one, and the first to fail may be the last that we hear of."""


def failures(world: World) -> Step | None:
    """What to do about the failures that are not written down yet."""
    if world.runs_command and (lost := _lost_worker(world)):
        name, reason = lost
        message = f"Pod {name} {words.HOW_LOST[reason]}; the others cannot go on without it"
        return _restart_uncounted(world, reason, message)
    accounted = set(world.restarts.accounted)
    fresh = [pod for pod in world.failed if pod.uid not in accounted]
    if not fresh:
        return None
    if world.runs_command and (settled := min(world.until(pod.ended, SETTLE) for pod in fresh)) > world.now:
        return Step(look=settled)
    root = blame.root_cause(world, fresh)
    if root is None:
        master = _silent_master(world) if blame.recorded_cause(world) is None else None
        return _without_cause(world, fresh) if master is None else _replace_silent(world, master, fresh)
    verdict = blame.verdict(world, root)
    if verdict is Verdict.CONSEQUENCE:
        return _of_a_lost_peer(world, fresh, root)

    rule = rule_for(world, root)
    action = rule.action if rule else world.spec.failure_policy.default_action
    message = words.failure(world, root)
    if action is Action.FAIL_JOB and verdict is Verdict.OPEN:
        return _open(world, root, message)
    if action is Action.FAIL_JOB and verdict is Verdict.UNSURE:
        action, message = Action.RESTART_REPLICA, f"{message} (another pod is not ready, so it may have lost its peer)"
    if action is Action.FAIL_JOB:
        if where := _nan_loss(world):
            return fail(world, Reason.NAN_LOSS, f"The loss was not finite: {where}. {message}")
        reason = Reason.USER_CODE if root.exit_code == 1 else Reason.FAILURE_POLICY
        return fail(world, reason, f"{message} (rule {rule.name})" if rule else message)
    counted = counts(world, root)
    if counted and (over := limit_exceeded(world, message)):
        return over
    if action is Action.RESTART_JOB or world.runs_command:
        last = words.last_restart(root, finished=finished(world, root))
        restarts = record(world, failed=1, counted=counted, last=last)
        step = restart_job(world, blame=root.role, restarts=restarts, reason=_reason(root), message=message)
    else:
        step = _replace(world, fresh, first=root, counted=counted, message=message)
    return step if counted else _disrupted(world, step)


def limit_exceeded(world: World, message: str) -> Step | None:
    """The end of the job when one more failure is too many."""
    limit = world.spec.run_policy.backoff_limit
    if counted_so_far(world) < limit:
        return None
    tries = f"{limit} failure{'' if limit == 1 else 's'}"
    since = " since the last checkpoint" if checkpoint_resets(world) and world.checkpoint_step else ""
    return fail(
        world, Reason.BACKOFF_LIMIT_EXCEEDED, f"More than {tries}{since} (runPolicy.backoffLimit). The last: {message}"
    )


def restart_job(world: World, *, blame: Role | None, restarts: Restarts, reason: Reason, message: str) -> Step:
    """The next attempt, written down; its pods are made in the passes that follow."""
    return Step(
        status={
            "attempt": world.attempt + 1,
            # Pods of an older attempt are never counted, so there is nothing to remember of them.
            "restarts": restarts.model_copy(update={"accounted": ()}),
            **_replica_restarts(world, [blame] if blame else []),
        },
        claims=(
            Claim(type=ConditionType.RESTARTING, status="True", reason=reason, message=message),
            *begun_anew("The job is restarted"),
        ),
        events=(
            Event(reason=reason, message=f"Restarting the job (attempt {world.attempt + 1}): {message}", warning=True),
        ),
        final=True,
        again=True,
    )


def begun_anew(message: str) -> tuple[Claim, ...]:
    """What can be said of an attempt that has no pods yet."""
    reasons = {
        ConditionType.SCHEDULED: Reason.SCHEDULING,
        ConditionType.READY: Reason.STARTING,
        ConditionType.PROGRESSING: Reason.STARTING,
    }
    return tuple(Claim(type=kind, status="False", reason=reason, message=message) for kind, reason in reasons.items())


def _lost_worker(world: World) -> tuple[str, Reason] | None:
    """A worker of a command that was taken away after the world was complete, and by whom."""
    if not world.status.is_true(ConditionType.SCHEDULED):
        return None
    for slot in world.wanted:
        pod = world.present.get(slot)
        if slot[0] is Role.WORKER and not world.settled(slot) and (pod is None or pod.deleting):
            return world.name(slot), words.disruption(pod) if pod is not None else Reason.REPLACED
    return None


def _restart_uncounted(world: World, reason: Reason, message: str) -> Step:
    step = restart_job(world, blame=None, restarts=world.restarts, reason=reason, message=message)
    return _disrupted(world, step)


def _disrupted(world: World, step: Step) -> Step:
    """What does not count has a pause of its own."""
    return replace(step, status={**step.status, "disruptions": disruptions.one_more(world)})


def _of_a_lost_peer(world: World, fresh: list[PodView], root: PodView) -> Step:
    """A program of the user's that ended because another pod was taken away, or has no node. That is no fault of the job."""
    message = f"{words.failure(world, root)} (after another pod of the job was lost)"
    if world.runs_command:
        return _restart_uncounted(world, Reason.REPLICA_FAILED, message)
    return _disrupted(world, _consequences(world, fresh, last=root))


def _open(world: World, root: PodView, message: str) -> Step:
    """The rest of the job goes on while it is not known whether the exit code is the cause; a node's loss shows within a minute."""
    until = blame.open_until(world, root)
    text = f"{message} (the job fails for it at {until:%H:%M:%S} UTC unless a node turns out to be lost)"
    step = children.converge(world)
    claims = [Claim(type=ConditionType.READY, status="False", reason=Reason.REPLICA_FAILED, message=text)]
    if world.status.is_true(ConditionType.SCHEDULED):  # the job had all its pods
        claims.append(replace(claims[0], type=ConditionType.RESTARTING, status="True"))
    look = min(step.look, until) if step.look is not None else until
    return replace(step, claims=tuple(claims), look=look)


def _without_cause(world: World, fresh: list[PodView]) -> Step:
    """Pods that lost their peers, or that failed because of another one. Once that is nobody's fault.

    When those that came in their place met, made no step and lost one another again, it is a failure like any other: a network that
    cuts them off, a device that hangs. Else it would go on without end. Those that fail one by one after the same loss are older
    than what was written down of the first, and are one loss with it.
    """
    ordered = sorted(fresh, key=lambda pod: (finished(world, pod), pod.role.value, pod.index))
    last = world.restarts.last
    if blame.recorded_cause(world) is not None:
        return _consequences(world, fresh, last=None)
    lost_before = last is not None and last.exit_code == ExitCode.PEER_LOST and not world.stepped_since(last.time)
    if last is None or not lost_before:
        return _consequences(world, fresh, last=ordered[0])
    for pod in ordered:
        rule = rule_for(world, pod)
        if (rule is None or rule.count_towards_limit) and pod.created > last.time and _met(world, pod):
            message = f"{words.failure(world, pod)}; so it was before, and no step was made since"
            return limit_exceeded(world, message) or _replace(world, fresh, first=pod, counted=True, message=message)
    return _consequences(world, fresh, last=None)


def _met(world: World, pod: PodView) -> bool:
    """Whether the job was ready in the time of the pod. One that waits for a peer without a node does not fail in vain: the start-up and
    recovery deadlines say for how long it may."""
    ready = world.status.condition(ConditionType.READY)
    return ready is not None and (ready.status == "True" or ready.last_transition_time > pod.created)


def _consequences(world: World, fresh: list[PodView], *, last: PodView | None) -> Step:
    """Written down without counting. `last`: the one that stands for them, None when what is written there says more."""
    words_of_last = words.last_restart(last, finished=finished(world, last)) if last is not None else None
    step = _written_down(world, fresh, record(world, failed=len(fresh), counted=False, last=words_of_last))
    if world.status.is_true(ConditionType.RESTARTING):
        return step  # what is said already names the cause; these are its consequences
    first = min(fresh, key=lambda pod: (finished(world, pod), pod.role.value, pod.index))
    return _told(step, _reason(first), _and_more(words.failure(world, first), fresh))


def _replace(world: World, fresh: list[PodView], *, first: PodView, counted: bool, message: str) -> Step:
    """The failures written down, so that their pods are replaced in a later pass."""
    last = words.last_restart(first, finished=finished(world, first))
    step = _written_down(world, fresh, record(world, failed=len(fresh), counted=counted, last=last))
    return _told(step, _reason(first), _and_more(message, fresh))


def _and_more(message: str, fresh: list[PodView]) -> str:
    return f"{message} (and {len(fresh) - 1} more after it)" if len(fresh) > 1 else message


def _silent_master(world: World) -> PodView | None:
    """A master that runs, was heard once, and is heard no more, neither by the operator nor by peers that gave it up.

    Either alone says little: the operator's own network may be cut, and peers lose one another too. Together they say that it hangs.
    """
    master, read = world.present.get((Role.MASTER, 0)), world.snapshot.progress_read
    if master is None or master.deleting or master.phase is not Phase.RUNNING or read is None:
        return None
    if master in world.given_up:
        return None  # it is written down; these are its consequences
    if master.silent_since is not None:
        return None  # its whole node is not heard: that is no failure of the master
    return master if master.created < read < world.now - SILENCE else None


def _replace_silent(world: World, master: PodView, fresh: list[PodView]) -> Step:
    """A running pod fails by our judgement. As any failure it is written down first; children.py deletes what is given up."""
    message = f"Pod {master.name} hangs: for {SILENCE.seconds} s neither its peers nor the operator heard of it"
    if over := limit_exceeded(world, message):
        return over
    silent = Reason.MASTER_SILENT
    last = LastRestart(role=master.role.status_name, index=0, reason=silent, message=message, time=world.second)
    failed = [*fresh, master]
    step = _written_down(world, failed, record(world, failed=len(failed), counted=True, last=last))
    return replace(_told(step, silent, message), final=True)


def _written_down(world: World, fresh: list[PodView], restarts: Restarts) -> Step:
    uids = {pod.uid for pod in world.snapshot.pods}
    kept = [uid for uid in world.restarts.accounted if uid in uids]
    accounted = (*kept, *sorted(pod.uid for pod in fresh))
    account = {
        "restarts": restarts.model_copy(update={"accounted": accounted}),
        **_replica_restarts(world, [pod.role for pod in fresh]),
    }
    return Step(status=account, again=True)


def _told(step: Step, reason: Reason, message: str) -> Step:
    claim = Claim(type=ConditionType.RESTARTING, status="True", reason=reason, message=message)
    return replace(step, claims=(claim,), events=(Event(reason=reason, message=message, warning=True),))


def _reason(pod: PodView) -> Reason:
    return words.disruption(pod) if DISRUPTED in pod.conditions else Reason.REPLICA_FAILED


def _nan_loss(world: World) -> str:
    """Where the loss was not finite, "" when nobody said so."""
    reports = [world.progress, *(pod.termination.progress for pod in world.present.values())]
    return next((report.nan_loss for report in reports if report is not None and report.nan_loss), "")


def _replica_restarts(world: World, roles: Iterable[Role]) -> dict[str, Any]:
    """replicaStatuses with the restarts of the roles raised; the other counts are filled in by report.py."""
    more = Counter(roles)
    statuses = []
    for role in world.replicas:
        before = world.replica_status(role) or ReplicaStatus(role=role.status_name)
        statuses.append(before.model_copy(update={"restarts": before.restarts + more[role]}))
    return {"replica_statuses": tuple(statuses)}
