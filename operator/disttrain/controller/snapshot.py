"""The Snapshot of a job, which `decide` sees, from the cache and from the JobRecord. It judges nothing."""

import secrets
from dataclasses import replace
from datetime import datetime

from disttrain.api import DistTrainJob
from disttrain.api.names import Role
from disttrain.controller.cache import Cache, CachedPod, Entry
from disttrain.controller.record import JobRecord
from disttrain.kube.api import CHILDREN
from disttrain.manifests.secret import name_of_secret
from disttrain.plan.model import MadeSecret, Phase, PodView, Snapshot

CANNOT_START = "CreateContainerConfigError"
"""What the kubelet itself says of a container that cannot be made for want of a Secret, when an environment variable names it."""


def take_snapshot(
    cache: Cache,
    record: JobRecord,
    job: DistTrainJob,
    now: datetime,
    *,
    not_understood: tuple[str, ...] = (),
    allows_host_access: bool = False,
) -> Snapshot:
    """The job and its children, by namespace and owner uid, as the cache has them now."""
    owner = job.metadata.namespace, job.metadata.uid
    views = [with_volume_failure(view, record) for entry in cache.pods.owned_by(*owner) if (view := entry.value.view)]
    return Snapshot(
        job=job,
        now=now,
        pods=tuple(sorted(views, key=lambda view: (view.role, view.index, view.name))),
        children=frozenset(
            kind
            for kind, where in CHILDREN.items()
            if job.metadata.name in {entry.key.name for entry in cache.stores[where].owned_by(*owner)}
        ),
        pod_group_phase=next((entry.value for entry in cache.volcano_groups.owned_by(*owner)), ""),
        unavailable=frozenset(kind for kind, where in CHILDREN.items() if where in cache.absent),
        secret=_secret(record, job),
        random_suffix=secrets.token_hex(8),
        progress=record.progress,
        progress_before=record.progress_before,
        progress_read=record.progress_read,
        step_seen=record.step_seen,
        listening_since=record.known_since,
        not_understood=not_understood,
        allows_host_access=allows_host_access,
        # Sorted, since answers come in any order, and the status names the first: its message must not change with the order.
        refusals=tuple(sorted(record.refusals.values(), key=lambda refusal: refusal.name)),
        suspend_refused=record.suspend_refused,
        name_conflicts=tuple(sorted({child.key.name for child in record.name_conflicts.keys() - record.former})),
        former=tuple(sorted({child.key.name for child in record.name_conflicts.keys() & record.former})),
    )


def _secret(record: JobRecord, job: DistTrainJob) -> MadeSecret | None:
    """What became of the Secret that the status names."""
    if record.secret is None or job.status.certificate is None:
        return None
    name, made = record.secret
    return made if name == name_of_secret(job) else None


def with_volume_failure(view: PodView, record: JobRecord) -> PodView:
    """The pod, with what only Events say of it."""
    message = record.volume_failures.get(view.uid)
    return replace(view, reason=CANNOT_START, message=message) if message else view


def running_master(cache: Cache, namespace: str, uid: str) -> Entry[CachedPod] | None:
    """The pod whose /progress can be read."""
    for entry in cache.pods.owned_by(namespace, uid):
        view = entry.value.view
        if view and view.role is Role.MASTER and view.phase is Phase.RUNNING and not view.deleting and entry.value.ip:
            return entry
    return None
