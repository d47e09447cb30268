"""How an answer to a failure is written down: the account, the restarts of each role, the condition Restarting, the Event."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from disttrain.api.names import Role
from disttrain.api.reasons import ConditionType, Reason
from disttrain.api.status import WHOLE_JOB, LastRestart, ReplicaStatus, Restarts
from disttrain.plan import disruptions, words
from disttrain.plan.completion import fail
from disttrain.plan.failures.account import finished, of_pods_that_exist, record
from disttrain.plan.model import DISRUPTED, Event, PodView
from disttrain.plan.step import Claim, Step
from disttrain.plan.view import JobView


def limit_exceeded(view: JobView, message: str) -> Step | None:
    """The step that fails the job when one more failure is too many; None when it is not."""
    limit = view.spec.run_policy.backoff_limit
    if view.counted_so_far < limit:
        return None
    return out_of_tries(view, message)


def out_of_tries(view: JobView, message: str) -> Step:
    """The step that fails the job because of its limit."""
    limit = view.spec.run_policy.backoff_limit
    tries = f"{limit} failure{'' if limit == 1 else 's'}"
    since = " since the last checkpoint" if view.checkpoint_resets and view.checkpoint_step else ""
    return fail(
        view, Reason.BACKOFF_LIMIT_EXCEEDED, f"More than {tries}{since} (runPolicy.backoffLimit). The last: {message}"
    )


def restart_job(view: JobView, *, blame: Role | None, restarts: Restarts, reason: Reason, message: str) -> Step:
    """The next attempt. Later passes delete the pods of this one and create the new ones."""
    return Step(
        status={
            "attempt": view.attempt + 1,
            # Pods of an older attempt are never counted, so their uids need not be kept.
            "restarts": restarts.model_copy(update={"accounted": (), "in_place": ()}),
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


def restart_by_rule(
    view: JobView, reason: Reason, message: str, *, blame: Role | None = None, index: int = 0, counted: bool = True
) -> Step:
    """The next attempt, which a deadline or a rule of the spec asks for while no process failed. blame: None where it is the whole job."""
    role = blame.status_name if blame is not None else WHOLE_JOB
    last = LastRestart(role=role, index=index, reason=reason, message=message, time=view.second)
    restarts = record(view, failed=1, counted=counted, last=last)
    return restart_job(view, blame=blame, restarts=restarts, reason=reason, message=message)


def new_attempt_claims(message: str) -> tuple[Claim, ...]:
    """The conditions of an attempt that has no pods yet."""
    reasons = {
        ConditionType.SCHEDULED: Reason.SCHEDULING,
        ConditionType.READY: Reason.STARTING,
        ConditionType.PROGRESSING: Reason.STARTING,
    }
    return tuple(Claim(type=kind, status="False", reason=reason, message=message) for kind, reason in reasons.items())


def restart_uncounted(view: JobView, reason: Reason, message: str) -> Step:
    """The next attempt, after a loss that is no fault of the job."""
    return with_pause(view, restart_job(view, blame=None, restarts=view.restarts, reason=reason, message=message))


def with_pause(view: JobView, step: Step) -> Step:
    """The step, with one more disruption: what does not count towards the limit waits by that number."""
    return replace(step, status={**step.status, "disruptions": disruptions.one_more(view)})


def replace_pods(view: JobView, fresh: list[PodView], *, first: PodView, counted: bool, message: str) -> Step:
    """The failures written down, so that a later pass replaces their pods. `first`: the one that stands in `restarts.last`."""
    last = words.last_restart(first, finished=finished(view, first))
    step = written_down(view, fresh, record(view, failed=len(fresh), counted=counted, last=last))
    return announced(step, reason_of(first), _and_more(message, fresh))


def consequences(view: JobView, fresh: list[PodView], *, last: PodView | None) -> Step:
    """Failures that have their cause elsewhere, written down without counting. `last`: the pod that stands in `restarts.last`; None keeps
    what is there."""
    last_restart = words.last_restart(last, finished=finished(view, last)) if last is not None else None
    step = written_down(view, fresh, record(view, failed=len(fresh), counted=False, last=last_restart))
    if view.status.is_true(ConditionType.RESTARTING):
        return step  # its message already names the cause
    first = min(fresh, key=lambda pod: (finished(view, pod), pod.role.value, pod.index))
    return announced(step, reason_of(first), _and_more(words.failure(view, first), fresh))


def written_down(view: JobView, pods: list[PodView], restarts: Restarts) -> Step:
    """The account with these pods in it."""
    kept = of_pods_that_exist(view, restarts)
    accounted = (*kept.accounted, *sorted(pod.uid for pod in pods))
    return Step(
        status={
            "restarts": kept.model_copy(update={"accounted": accounted}),
            **_replica_restarts(view, [pod.role for pod in pods]),
        },
        # What was counted before is forgotten with its pod, which the cache may show for longer than the status names it.
        final=view.restarts.total > 0,
        again=True,
    )


def announced(step: Step, reason: Reason, message: str) -> Step:
    """The step, with the condition Restarting and an Event."""
    claim = Claim(type=ConditionType.RESTARTING, status="True", reason=reason, message=message)
    return replace(step, claims=(claim,), events=(Event(reason=reason, message=message, warning=True),))


def reason_of(pod: PodView) -> Reason:
    """The reason of Restarting for a failed pod."""
    return words.disruption(pod) if DISRUPTED in pod.conditions else Reason.REPLICA_FAILED


def _and_more(message: str, fresh: list[PodView]) -> str:
    return f"{message} (and {len(fresh) - 1} more after it)" if len(fresh) > 1 else message


def _replica_restarts(view: JobView, roles: Iterable[Role]) -> dict[str, Any]:
    """replicaStatuses with the restarts of the roles raised; report.py fills in the other counts."""
    more = Counter(roles)
    statuses = []
    for role in view.replicas:
        before = view.replica_status(role) or ReplicaStatus(role=role.status_name)
        statuses.append(before.model_copy(update={"restarts": before.restarts + more[role]}))
    return {"replica_statuses": tuple(statuses)}
