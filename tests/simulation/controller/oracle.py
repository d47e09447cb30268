"""What must hold in every life, whatever fails. It sees each write at the moment when the API server has it, and each end."""

from collections import Counter
from typing import Never

from disttrain.api.names import LABEL_ATTEMPT, LABEL_INDEX, LABEL_ROLE, Role
from disttrain.api.names import pod_name as name_of_pod
from disttrain.kube.api import EVENTS, JOBS, PODS, Body, Resource
from disttrain.plan.indexes import parse_indexes
from simulation.controller.api_server import ApiServer, Change
from simulation.controller.cluster import Cluster, owner
from simulation.controller.operators import Operator

_OF_PROGRESS = frozenset({"training", "goodput", "worker", "replicaStatuses"})
"""Fields of a status that change as time goes on."""
_TIMES = frozenset({"lastTransitionTime", "observedGeneration", "message"})


class Violation(AssertionError):
    """A promise is broken."""


class Oracle:
    """The promises of the operator."""

    def __init__(self, server: ApiServer, cluster: Cluster, *, late: bool = False, woken: bool = False) -> None:
        self._server, self._cluster, self._woken = server, cluster, woken
        self._late = late
        """Whether requests may arrive so late that the job has ended meanwhile, or another operator ended it. `woken`: a pass of a former
        leader may be in its middle then, and is ended by the loss of the Lease."""
        self.writes: Counter[str] = Counter()
        """Of operators, that changed something; Events and progress apart."""
        self.progress_writes = 0
        self.passes_bound = 0
        self._jobs: dict[str, str] = {}
        """The namespace of every job that ever was, by uid."""
        self._ready: dict[str, set[tuple[str, int]]] = {}
        """By job: role and index of the pods that were ever ready, with their attempt."""
        self._failed: dict[str, set[str]] = {}
        self._succeeded: dict[str, set[int]] = {}
        self._made: dict[str, Counter[str]] = {}
        self.reasons: set[str] = set()
        """Of the conditions that were ever written."""
        self.over = False
        """Whether nothing may be written any more."""

    def wrong(self, text: str) -> Never:
        raise Violation(text)

    # What is true

    def see(self, resource: Resource, change: Change) -> None:
        metadata, uid = change.body["metadata"], owner(change.body)
        if resource is JOBS:
            self._jobs[metadata["uid"]] = metadata["namespace"]
        if resource is not PODS or self._jobs.get(uid) != metadata["namespace"]:
            return
        labels, status = metadata.get("labels", {}), change.body["status"]
        if status["phase"] == "Failed":
            self._failed.setdefault(uid, set()).add(metadata["uid"])
        if status["phase"] == "Succeeded" and labels.get(LABEL_ROLE) == Role.WORKER:
            self._succeeded.setdefault(uid, set()).add(int(labels[LABEL_INDEX]))
        if status["phase"] == "Running":
            self._ready.setdefault(uid, set()).add((labels.get(LABEL_ROLE, ""), int(labels.get(LABEL_INDEX, 0))))

    # What operators write

    def wrote(
        self,
        operator: Operator,
        verb: str,
        resource: Resource,
        namespace: str,
        name: str,
        before: Body | None,
        after: Body | None,
        knew: bool,
    ) -> None:
        if resource is EVENTS:
            return
        what = f"{operator.name}: {verb} {resource.plural} {namespace}/{name}"
        if operator.namespaces and namespace not in operator.namespaces:
            self.wrong(f"{what}: it serves {', '.join(operator.namespaces)}")
        if self.over:
            self.wrong(f"{what}: everything was done")
        if verb == "create" and after is not None:
            self._created(what, resource, namespace, after, knew=knew)
        elif verb == "delete" and before is not None:
            self._deleted(what, resource, namespace, before)
        elif resource is JOBS and before is not None and after is not None:
            if self._is_progress(before, after):
                self.progress_writes += 1
                self._check_status(what, before, after)
                return
            self._check_status(what, before, after)
        self.writes[f"{verb} {resource.plural}"] += 1

    def _created(self, what: str, resource: Resource, namespace: str, after: Body, *, knew: bool) -> None:
        uid = owner(after)
        if self._jobs.get(uid) != namespace:
            self.wrong(f"{what}: its owner is of namespace {self._jobs.get(uid)}")
        job = self._job(namespace, uid)
        ended = job is not None and job.get("status", {}).get("completionTime")
        if ended and (not self._late or (knew and not self._woken)):
            self.wrong(f"{what}: made after the end of the job")
        if resource is not PODS:
            return
        labels = after["metadata"]["labels"]
        if not self._cluster.has_group(after):
            self.wrong(f"{what}: its PodGroup does not exist, or is not admitted")
        place = Role(labels[LABEL_ROLE]), int(labels[LABEL_INDEX])
        for program in self._cluster.programs.values():
            same = (program.job, program.role, program.index, program.attempt) == (
                uid,
                *place,
                int(labels[LABEL_ATTEMPT]),
            )
            if same and not program.silent:
                self.wrong(f"{what}: another pod of this place and attempt still runs")
        expected = name_of_pod(after["metadata"]["ownerReferences"][0]["name"], *place)
        if after["metadata"]["name"] != expected:
            self.wrong(f"{what}: its labels are those of {expected}")

    def _deleted(self, what: str, resource: Resource, namespace: str, before: Body) -> None:
        if resource is JOBS:
            status, policy = before.get("status", {}), before["spec"].get("runPolicy", {})
            if not status.get("completionTime") or policy.get("ttlSecondsAfterFinished") is None:
                self.wrong(f"{what}: the job has not ended, or has no TTL")
            return
        uid = owner(before)
        if self._jobs.get(uid) != namespace:
            self.wrong(f"{what}: it is not of a job of this namespace")
        job = self._job(namespace, uid)
        if resource is not PODS or job is None:
            return
        status, metadata = job.get("status", {}), before["metadata"]
        program = self._cluster.programs.get(metadata["uid"])
        conditions = {condition["type"]: condition for condition in status.get("conditions", ())}
        asked = job["spec"].get("suspend") or conditions.get("Suspended", {}).get("reason") in (
            "Suspending",
            "Suspended",
        )
        attempt = int(metadata.get("labels", {}).get(LABEL_ATTEMPT, 0))
        well = program is not None and not program.silent and "deletionTimestamp" not in metadata
        if well and not asked and not status.get("completionTime") and attempt == (status.get("attempt") or 1):
            self.wrong(f"{what}: a pod that does its work")

    def _check_status(self, what: str, before: Body, after: Body) -> None:
        old, new, uid = before.get("status") or {}, after.get("status") or {}, after["metadata"]["uid"]
        if old.get("completionTime") and _without(old, "certificate") != _without(new, "certificate"):
            self.wrong(f"{what}: the status of a finished job changes: {_difference(old, new)}")
        if (new.get("attempt") or 1) - (old.get("attempt") or 1) not in (0, 1):
            self.wrong(f"{what}: from attempt {old.get('attempt')} to {new.get('attempt')}")
        self.reasons.update(condition["reason"] for condition in new.get("conditions", ()))
        true = {c["type"] for c in new.get("conditions", ()) if c["status"] == "True"}
        if {"Complete", "Failed"} <= true:
            self.wrong(f"{what}: Complete and Failed")
        restarts = new.get("restarts") or {}
        failed = self._failed.get(uid, set())
        if restarts.get("total", 0) > len(failed):
            self.wrong(f"{what}: {restarts['total']} restarts, and {len(failed)} pods failed")
        if unknown := set(restarts.get("accounted", ())) - failed:
            self.wrong(f"{what}: failures of pods that did not fail: {sorted(unknown)}")
        done = parse_indexes((new.get("worker") or {}).get("completedIndexes") or "")
        if unseen := done - self._succeeded.get(uid, set()):
            self.wrong(f"{what}: workers {sorted(unseen)} are said to have succeeded")
        ready = self._ready.get(uid, set())
        for replicas in new.get("replicaStatuses", ()):
            role = next(role for role in Role if role.status_name == replicas["role"])
            seen = sum(one == role.value for one, _ in ready)
            if replicas.get("ready", 0) > seen:
                self.wrong(f"{what}: {replicas['ready']} {replicas['role']} ready, and {seen} ever were")
        training = self._cluster.trainings.get(uid)
        if training is not None and (new.get("training") or {}).get("step", 0) > training.step:
            self.wrong(f"{what}: step {new['training']['step']}, and the training is at {training.step}")

    # The end

    def check_end(self) -> None:
        """Accounts are exact when everything is done."""
        for job in self._server.list(JOBS, None)[0]:
            status, training = job.get("status") or {}, self._cluster.trainings[job["metadata"]["uid"]]
            counted = (status.get("restarts") or {}).get("countedTowardsLimit", 0)
            if not status.get("completionTime"):
                self.wrong(f"{job['metadata']['name']} never ends: {status.get('state')}")
            if counted > training.failures:
                self.wrong(f"{counted} failures are counted of {training.failures}")

    # Parts

    def _job(self, namespace: str, uid: str) -> Body | None:
        return next((job for job in self._server.list(JOBS, namespace)[0] if job["metadata"]["uid"] == uid), None)

    def _is_progress(self, before: Body, after: Body) -> bool:
        """Whether a write of the status tells no more than how far the training is, and what time has done."""
        old, new = before.get("status") or {}, after.get("status") or {}
        changed = {field for field in old.keys() | new.keys() if old.get(field) != new.get(field)}
        if not changed <= {*_OF_PROGRESS, "conditions"}:
            return False
        told = [{c["type"]: _without(c, *_TIMES) for c in one.get("conditions", ())} for one in (old, new)]
        return told[0] == told[1]


def _without(body: Body, *fields: str) -> Body:
    return {field: value for field, value in body.items() if field not in fields}


def _difference(old: Body, new: Body) -> str:
    fields = sorted(field for field in old.keys() | new.keys() if old.get(field) != new.get(field))
    return ", ".join(f"{field}: {old.get(field)} -> {new.get(field)}" for field in fields)[:500]
