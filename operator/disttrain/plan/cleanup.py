"""What remains of a finished job: its pods by cleanPodPolicy, and the job itself until its TTL is over. Never anything new."""

from datetime import timedelta

from disttrain.api.spec import CleanPodPolicy
from disttrain.plan import lost_nodes
from disttrain.plan.model import DeleteJob, DeletePod, Plan, PodView
from disttrain.plan.world import World


def after_the_end(world: World) -> Plan:
    """The plan for a finished job. Its status is final, to the letter."""
    ttl = world.spec.run_policy.ttl_seconds_after_finished
    expiry = None
    if ttl is not None and world.status.completion_time is not None:
        expiry = world.status.completion_time + timedelta(seconds=ttl)
        if expiry <= world.now:
            return Plan(actions=(DeleteJob(),), status=world.status)
    deletions = tuple(
        DeletePod(name=pod.name, uid=pod.uid)
        for pod in world.snapshot.pods
        if not pod.deleting and _shall_go(world, pod)
    )
    moments = [moment for moment in (expiry, lost_nodes.upcoming(world)) if moment is not None]
    return Plan(
        actions=(*deletions, *lost_nodes.forced(world)),
        status=world.status,
        look_again=min(moments) - world.now if moments else None,
    )


def _shall_go(world: World, pod: PodView) -> bool:
    if pod.attempt < world.attempt:
        return True
    match world.spec.run_policy.clean_pod_policy:
        case CleanPodPolicy.ALL:
            return True
        case CleanPodPolicy.RUNNING:
            return not pod.done
        case CleanPodPolicy.NONE:
            return False
