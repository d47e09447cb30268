"""A policy's step made into a Plan: the whole status, written only if it says something new."""

from datetime import timedelta
from typing import Any

from disttrain.api.names import LABEL_JOB_NAME, LABEL_ROLE, Role
from disttrain.api.policies import CleanPodPolicy
from disttrain.api.reasons import ConditionType, Reason
from disttrain.api.status import DistTrainJobStatus, ReplicaStatus, WorkerStatus
from disttrain.plan import conditions, disruptions, elastic, goodput, health, in_place, progress
from disttrain.plan.failures import account
from disttrain.plan.indexes import format_indexes
from disttrain.plan.model import Action, CreatePod, DeletePod, Event, Phase, Plan
from disttrain.plan.state import state
from disttrain.plan.step import Claim, Step
from disttrain.plan.view import JobView

_ANNOUNCED = frozenset({Reason.REPLACED, Reason.PREEMPTED, Reason.EVICTED, Reason.NODE_LOST, Reason.NOT_READY})
"""Reasons of Restarting that no policy has posted an Event about."""


def plan(view: JobView, step: Step) -> Plan:
    """The Plan of a step."""
    seen = {claim.type: claim for claim in conditions.observe(view)}
    claims = tuple({**seen, **{claim.type: claim for claim in step.claims}}.values())
    status = _status(view, step, claims)
    return Plan(
        actions=step.actions,
        status=status,
        events=(*_events(view, seen, step), *step.events, *_resumed(view, status)),
        look_again=timedelta(0) if step.again else None,
        final=step.final,
        asks=step.asks,
    )


def _status(view: JobView, step: Step, claims: tuple[Claim, ...]) -> DistTrainJobStatus:
    making = any(isinstance(action, CreatePod) for action in step.actions)
    fields: dict[str, Any] = {
        "observed_generation": view.job.metadata.generation,
        # What was refused a moment ago will hardly be made now: that is not said before it is so.
        "state": state(view, claims, making=making and not view.refusals),
        "conditions": conditions.merge(view, claims),
        "restarts": account.carried_over(view),
        "disruptions": disruptions.carried_over(view),
        "health": health.carried_over(view),
        **_beginning(view, making),
        **_parts_per_step(view, making),
        **step.status,
    }
    room = fields.pop(elastic.ROOM, elastic.room(view))
    same_attempt = fields.get("attempt", view.attempt) == view.attempt
    fields["replica_statuses"] = _replica_statuses(view, fields, step.actions if same_attempt else None)
    fields["worker"] = WorkerStatus(
        ready_replicas=next(r.ready for r in fields["replica_statuses"] if r.role == Role.WORKER.status_name),
        # Where there is room again, the job uses all that it asks for; so a job that is resumed is not on the way from another number.
        target_replicas=elastic.target(view) if room is not None or elastic.room(view) is None else view.wish,
        room=room,
        selector=f"{LABEL_JOB_NAME}={view.job.metadata.name},{LABEL_ROLE}={Role.WORKER.value}",
        completed_indexes=(format_indexes(view.completed) or None) if same_attempt else None,
    )
    status = view.status.model_copy(update=fields)
    training = progress.training(view, moves=_moves(view, claims))
    if training is not None and status.roll_back is not None and status.roll_back != view.status.roll_back:
        training = progress.without_set_aside(training, status.roll_back)
    if status == view.status and (training == view.status.training or not progress.due(view)):
        return view.status
    return status.model_copy(
        update={"training": training, "goodput": goodput.time_spent(view, training, state=status.state)}
    )


def _moves(view: JobView, claims: tuple[Claim, ...]) -> bool:
    """Whether steps are made: what is said of speed and time left holds. A job that is complete keeps the speed that it had."""
    by_type = {claim.type: claim for claim in claims}
    if by_type[ConditionType.COMPLETE].status == "True":
        return True
    if by_type[ConditionType.PROGRESSING].status != "True":
        return False
    restarting, before = by_type[ConditionType.RESTARTING], view.status.condition(ConditionType.RESTARTING)
    if restarting.status != "True" or view.steps_now:
        return True
    # Others may make steps without the missing pod; those from before it was missed do not count.
    since = before.last_transition_time if before is not None and before.status == "True" else view.now
    return view.stepped_since(since)


def _beginning(view: JobView, making: bool) -> dict[str, Any]:
    """Start and first attempt. Pods without either were made by a pass that did not live to write it down."""
    begins = not view.started and (making or view.snapshot.pods)
    return {"start_time": view.second, "attempt": view.attempt} if begins else {}


def _parts_per_step(view: JobView, making: bool) -> dict[str, Any]:
    """Written once: by it the work of a step is numbered, also when the job goes on with another number of workers."""
    begun = view.started or making or view.snapshot.pods
    if not view.runs_our_loop or view.status.parts_per_step is not None or not begun:
        return {}
    return {"parts_per_step": view.spec.trainer.parts_per_step or view.spec.default_parts_per_step}


def _replica_statuses(
    view: JobView, fields: dict[str, Any], actions: tuple[Action, ...] | None
) -> tuple[ReplicaStatus, ...]:
    """The counts of each role. `actions`: what is done before they are written; None: of the attempt that begins no pod exists."""
    seen = [status for role in view.replicas if (status := view.replica_status(role)) is not None]
    before = {status.role: status for status in fields.get("replica_statuses", seen)}
    ended = "completion_time" in fields and view.spec.run_policy.clean_pod_policy is not CleanPodPolicy.NONE
    made = [action.role for action in actions or () if isinstance(action, CreatePod)]
    deleted = {action.uid for action in actions or () if isinstance(action, DeletePod)}
    statuses = []
    for role, desired in view.replicas.items():
        pods = [pod for (pod_role, _), pod in view.present.items() if pod_role is role and not pod.deleting]
        succeeded = sum(pod.phase is Phase.SUCCEEDED for pod in pods)
        earlier = before.get(role.status_name)
        counts = {
            "desired": desired,
            # The pods of a job that has just ended are on their way out.
            "ready": 0 if ended else sum(pod.ready and not pod.done for pod in pods),
            "succeeded": len(view.completed) if role is Role.WORKER else succeeded,
            "failed": sum(pod.phase is Phase.FAILED for pod in pods),
            "restarts": earlier.restarts if earlier is not None else 0,
            "existing": 0 if actions is None else sum(pod.uid not in deleted for pod in pods) + made.count(role),
        }
        if earlier is not None and all(getattr(earlier, name) == count for name, count in counts.items()):
            statuses.append(earlier)  # most passes change no count, and a model costs more than all of them
        else:
            statuses.append(ReplicaStatus(role=role.status_name, **counts))
    known = {status.role for status in statuses}
    return (*statuses, *(_left(status) for status in view.status.replica_statuses if status.role not in known))


def _left(status: ReplicaStatus) -> ReplicaStatus:
    """The counts of a role that the job has no more, since its strategy was changed; those of another version's role stay."""
    ours = status.role in {role.status_name for role in Role}
    return ReplicaStatus(role=status.role, restarts=status.restarts) if ours else status


def _events(view: JobView, seen: dict[ConditionType, Claim], step: Step) -> tuple[Event, ...]:
    """Events about what is seen for the first time, where no policy posts one."""
    events = []
    valid = seen[ConditionType.VALID]
    before = view.status.condition(ConditionType.VALID)
    if valid.status == "False" and (before is None or (before.status, before.reason) != (valid.status, valid.reason)):
        events.append(Event(reason=valid.reason, message=valid.message, warning=True))
    if trouble := _trouble(view, seen[ConditionType.READY], step):
        events.append(trouble)
    if (restarted := in_place.sentence(view.restarted_in_place)) is not None:
        failed = any(one.failures for one in view.restarted_in_place)
        events.append(Event(reason=Reason.RESTARTED_IN_PLACE, message=restarted, warning=failed))
    if (resized := elastic.sentence(view)) is not None:
        events.append(Event(reason=Reason.RESIZING, message=resized))
    restarting = seen[ConditionType.RESTARTING]
    overruled = any(claim.type is ConditionType.RESTARTING for claim in step.claims)
    if (
        restarting.status == "True"
        and restarting.reason in _ANNOUNCED
        and not overruled
        and not view.status.is_true(ConditionType.RESTARTING)
    ):
        events.append(Event(reason=restarting.reason, message=restarting.message))
    return tuple(events)


def _trouble(view: JobView, ready: Claim, step: Step) -> Event | None:
    """Once for each trouble of a container: while Ready speaks of it, it is no news."""
    before = view.status.condition(ConditionType.READY)
    overruled = any(claim.type is ConditionType.READY for claim in step.claims)
    trouble = conditions.sidecar_trouble(view)
    if overruled or not trouble or (before is not None and trouble in before.message):
        return None
    return Event(reason=Reason.SIDECAR_FAILING, message=trouble, warning=True)


def _resumed(view: JobView, status: DistTrainJobStatus) -> tuple[Event, ...]:
    """An Event that says where the training resumed, for a user who changed the job or lost checkpoints."""
    before = view.status.training.resumed if view.status.training else None
    after = status.training.resumed if status.training else None
    return (Event(reason=Reason.RESUMED, message=after),) if after and after != before else ()
