"""What remains of a finished job: its pods by cleanPodPolicy, and the job itself until its TTL is over. Never anything new."""

from datetime import timedelta

from disttrain.api.policies import CleanPodPolicy
from disttrain.plan import certificate, gang, lost_nodes
from disttrain.plan.model import DeleteJob, DeletePod, Plan, PodView
from disttrain.plan.view import JobView


def after_the_end(view: JobView) -> Plan:
    """The plan for a finished job. Its status is final, to the letter: only the Secret that is deleted goes from it."""
    ttl, end = view.spec.run_policy.ttl_seconds_after_finished, view.status.completion_time
    if ttl is not None and end is not None and view.reached(end + timedelta(seconds=ttl)):
        return Plan(actions=(DeleteJob(),), status=view.status)
    deletions = tuple(
        DeletePod(name=pod.name, uid=pod.uid) for pod in view.snapshot.pods if not pod.deleting and _is_due(view, pod)
    )
    return Plan(
        actions=(*deletions, *lost_nodes.forced(view), *certificate.spent(view), *gang.group_deletions(view)),
        status=view.status.model_copy(update={"certificate": None}) if view.status.certificate else view.status,
    )


def _is_due(view: JobView, pod: PodView) -> bool:
    end = view.status.completion_time
    # A creation may arrive late, of an operator that had lost its Lease by then: no policy keeps such a pod.
    if pod.attempt < view.attempt or (end is not None and pod.created > end):
        return True
    match view.spec.run_policy.clean_pod_policy:
        case CleanPodPolicy.ALL:
            return True
        case CleanPodPolicy.RUNNING:
            return not pod.done
        case CleanPodPolicy.NONE:
            return False
