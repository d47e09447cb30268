"""Which scheduler places the pods of a job together. Not here: what follows from it (gang.py)."""

from disttrain.api.gangs import GANG_SCHEDULERS, GangScheduler, named_schedulers
from disttrain.api.policies import Gang
from disttrain.plan.model import Snapshot


def gang_scheduler(snapshot: Snapshot) -> GangScheduler | None:
    """The one that does; None: each pod is placed by itself."""
    spec = snapshot.job.spec
    if snapshot.local:
        return None
    if spec.scheduling.gang is not Gang.AUTO:
        return GANG_SCHEDULERS.get(spec.scheduling.gang)
    named = named_schedulers(spec)
    return next((one for one in GANG_SCHEDULERS.values() if named == (one.name,) and _there(snapshot, one)), None)


def _there(snapshot: Snapshot, one: GangScheduler) -> bool:
    """Auto: whether the cluster has it. A PodGroup that came after the pods would wait for more pods than will ever name it."""
    before_the_pods = one.kind in snapshot.children or not snapshot.pods
    return before_the_pods and one.kind not in snapshot.unavailable
