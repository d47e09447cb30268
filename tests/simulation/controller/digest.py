"""The end state of a life: what a user sees of it, without times, words and uids; and where two of them differ."""

from collections.abc import Iterable
from typing import Any

from disttrain.api.names import LABEL_ATTEMPT
from disttrain.api.reasons import Reason
from disttrain.kube.api import CHILDREN, JOBS, PODS, SECRETS
from simulation.controller.api_server import ApiServer

_DONE = frozenset({Reason.WORKERS_SUCCEEDED, Reason.TRAINING_DONE})
"""Which of them it is depends on whose end the operator saw first, as do the workers that are known to have succeeded, and whether
cleanPodPolicy Running found a pod still running."""


def digest(server: ApiServer) -> dict[str, Any]:
    """The end state: what a user sees of it, times, words and uids apart."""
    jobs = []
    for body in server.list(JOBS, None)[0]:
        status, restarts = body.get("status") or {}, (body.get("status") or {}).get("restarts") or {}
        last = restarts.get("last") or {}
        conditions = {
            c["type"]: (c["status"], "Done" if c["reason"] in _DONE else c["reason"])
            for c in status.get("conditions", ())
        }
        if status.get("state") == "Failed":
            conditions.pop("Scheduled", None)  # that of the moment at which it failed
        replicas = [(r["role"], r.get("restarts", 0)) for r in status.get("replicaStatuses", ())]
        jobs.append(
            {
                "name": (body["metadata"]["namespace"], body["metadata"]["name"]),
                "state": status.get("state"),
                "attempt": status.get("attempt"),
                "conditions": conditions,
                "restarts": (restarts.get("total"), restarts.get("countedTowardsLimit"), restarts.get("accounted")),
                "last": (last.get("role"), last.get("index"), last.get("exitCode")),
                "replicas": replicas,
                "step": (status.get("training") or {}).get("step") if status.get("state") == "Complete" else None,
                "disruptions": status.get("disruptions"),
                "certificate": status.get("certificate"),
            }
        )
    children = [
        (resource.plural, body["metadata"]["namespace"], body["metadata"]["name"])
        for resource in (*CHILDREN.values(), SECRETS)
        for body in server.list(resource, None)[0]
    ]
    pods = [
        (
            pod["metadata"]["namespace"],
            pod["metadata"]["name"],
            pod["metadata"].get("labels", {}).get(LABEL_ATTEMPT),
            pod["status"]["phase"],
        )
        for pod in server.list(PODS, None)[0]
        if pod["status"]["phase"] != "Succeeded"
    ]
    return {"jobs": sorted_together([jobs]), "children": sorted(children), "pods": sorted(pods)}


def without_accounts(found: dict[str, Any]) -> dict[str, Any]:
    """A digest without what an API server that was restored from a backup may have lost for ever."""
    lost = ("restarts", "last", "replicas", "disruptions", "conditions")
    return {**found, "jobs": [{field: job[field] for field in job if field not in lost} for job in found["jobs"]]}


def sorted_together(parts: Iterable[list[Any]]) -> list[Any]:
    """One list of several, in the order of names."""
    return sorted(
        (one for part in parts for one in part), key=lambda one: one["name"] if isinstance(one, dict) else one
    )


def difference(wanted: Any, found: Any) -> str:
    """Where two digests differ first."""
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() == found.keys():
        return next(f"{key}: {difference(wanted[key], found[key])}" for key in wanted if wanted[key] != found[key])
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        return next(difference(one, other) for one, other in zip(wanted, found, strict=True) if one != other)
    return f"{found} instead of {wanted}"
