"""How many workers an elastic job uses now, and whether it is on the way from one number to another.

`spec.worker.replicas` is the wish: the scale subresource of a cluster changes it, and `disttrain scale` in a local run.
"""

from disttrain.api.names import Role
from disttrain.api.reasons import JobState
from disttrain.api.spec import DistTrainJobSpec
from disttrain.plan.view import JobView


def target(spec: DistTrainJobSpec) -> int | None:
    """The number of workers that an elastic job uses; None for a job with a fixed number."""
    elastic = spec.worker.elastic
    if elastic is None:
        return None
    return min(max(spec.worker.replicas, elastic.min_replicas), elastic.max_replicas)


def resizing(view: JobView) -> bool:
    """Whether an elastic job that trains gets other workers: from the change of the target until the trainer has exactly these."""
    wanted, before = target(view.spec), view.status.worker
    if wanted is None or before is None or before.target_replicas is None or not view.trained:
        return False
    if before.target_replicas != wanted:
        return True
    return view.status.state is JobState.RESIZING and not _settled(view, wanted)


def sentence(view: JobView) -> str | None:
    """Such as "Resizing from 2 to 4 workers", in the pass in which the target changes; None in any other."""
    wanted, before = target(view.spec), view.status.worker
    if wanted is None or before is None or before.target_replicas in (None, wanted):
        return None
    return f"Resizing from {before.target_replicas} to {wanted} workers"


def is_new(view: JobView, role: Role, index: int) -> bool:
    """Whether a worker was not among those of the status that was last written: its pod is no lost one."""
    before = view.status.worker
    if role is not Role.WORKER or before is None or before.target_replicas is None:
        return False
    return index >= before.target_replicas


def _settled(view: JobView, wanted: int) -> bool:
    leaving = any(pod.role is Role.WORKER and pod.attempt == view.attempt for pod in view.outdated)
    counted = view.progress is None or view.progress.world_size == wanted * view.spec.processes_per_worker
    return view.whole and counted and not leaving
