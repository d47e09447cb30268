"""What remains of a finished job: its pods by cleanPodPolicy, and the job itself until its TTL is over. Never anything new."""

from datetime import timedelta

from disttrain.api.policies import CleanPodPolicy
from disttrain.plan import certificate, lost_nodes
from disttrain.plan.model import DeleteJob, DeletePod, Plan, PodView
from disttrain.plan.view import JobView


def after_the_end(view: JobView) -> Plan:
    """The plan for a finished job. Its status is final, to the letter: only the Secret that is deleted goes from it."""
    ttl = view.spec.run_policy.ttl_seconds_after_finished
    expiry = None
    if ttl is not None and view.status.completion_time is not None:
        expiry = view.status.completion_time + timedelta(seconds=ttl)
        if expiry <= view.now:
            return Plan(actions=(DeleteJob(),), status=view.status)
    deletions = tuple(
        DeletePod(name=pod.name, uid=pod.uid) for pod in view.snapshot.pods if not pod.deleting and _is_due(view, pod)
    )
    moments = [moment for moment in (expiry, lost_nodes.upcoming(view)) if moment is not None]
    return Plan(
        actions=(*deletions, *lost_nodes.forced(view), *certificate.spent(view)),
        status=view.status.model_copy(update={"certificate": None}) if view.status.certificate else view.status,
        look_again=min(moments) - view.now if moments else None,
    )


def _is_due(view: JobView, pod: PodView) -> bool:
    if pod.attempt < view.attempt:
        return True
    match view.spec.run_policy.clean_pod_policy:
        case CleanPodPolicy.ALL:
            return True
        case CleanPodPolicy.RUNNING:
            return not pod.done
        case CleanPodPolicy.NONE:
            return False
