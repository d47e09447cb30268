"""The jobs of a life and what happens to them, faults of the operator and of the API server aside.

A story waits for what it builds on: the next thing happens when the job runs whole and its status says so. So the story is the same however
long an operator was away.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from disttrain.api.names import API_VERSION, KIND, Role, pod_name
from disttrain.kube.api import JOBS, PODS, Body, NotFound
from simulation.controller.cluster import Cluster, Training

Condition: TypeAlias = Callable[[], bool]
Story: TypeAlias = "Callable[[Job], Iterator[Condition]]"
"""What happens; each condition that it yields is waited for."""

_MODEL = {"model": "a:b", "dataset": "a:c", "optimizer": {"name": "SGD", "learningRate": 0.1}, "epochs": 1}
SPECS: dict[str, dict[str, Any]] = {
    "loop": {"strategy": {"type": "DataParallel"}, "trainer": _MODEL},
    "servers": {
        "strategy": {"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}},
        "trainer": _MODEL,
        "parameterServer": {"replicas": 1},
    },
    "script": {"strategy": {"type": "DataParallel"}, "trainer": {"script": {"file": "t.py"}}},
    "command": {"strategy": {"type": "DataParallel"}, "trainer": {"command": ["x"]}},
}


@dataclass
class Job:
    """A job of a story, as its user sees it."""

    cluster: Cluster
    namespace: str
    name: str
    kind: str
    options: dict[str, Any]
    body: Body = field(default_factory=dict)

    def spec(self, **more: Any) -> dict[str, Any]:
        run_policy = {"progressDeadlineSeconds": 900, **self.options.get("runPolicy", {})}
        return {
            **SPECS[self.kind],
            "worker": {"replicas": 2},
            "observability": {"statusIntervalSeconds": 10},
            **{field: value for field, value in self.options.items() if field != "runPolicy"},
            "runPolicy": run_policy,
            **more,
        }

    def create(self, **more: Any) -> None:
        metadata = {"name": self.name}
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": self.spec(**more)}
        self.body = self.cluster.server.create(JOBS, self.namespace, body)

    def edit(self, **spec: Any) -> None:
        self.cluster.server.patch(JOBS, self.namespace, self.name, {"spec": spec})

    @property
    def uid(self) -> str:
        return str(self.body["metadata"]["uid"])

    @property
    def training(self) -> Training:
        return self.cluster.trainings[self.uid]

    @property
    def stored(self) -> Body | None:
        try:
            body = self.cluster.server.get(JOBS, self.namespace, self.name)
        except NotFound:
            return None
        return body if body["metadata"]["uid"] == self.uid else None

    @property
    def status(self) -> dict[str, Any]:
        stored = self.stored
        return (stored or {}).get("status") or {}

    def says(self, type_: str) -> str:
        """The status of a condition."""
        return next((c["status"] for c in self.status.get("conditions", ()) if c["type"] == type_), "")

    def pod(self, role: Role, index: int) -> str:
        return pod_name(self.name, role, index)

    # What is waited for

    def settled(self) -> bool:
        """Everything runs, and the status says so."""
        if not self.cluster.whole(self.training) or self.says("Ready") != "True" or self.says("Restarting") == "True":
            return False
        restarts = self.status.get("restarts", {})
        pods = self.cluster.pods(self.namespace, self.name, self.uid)
        return not restarts.get("accounted") and all("deletionTimestamp" not in pod["metadata"] for pod in pods)

    def ended(self) -> bool:
        return bool(self.status.get("completionTime"))

    def gone(self) -> bool:
        return self.stored is None

    def suspended(self) -> bool:
        return self.says("Suspended") == "True"

    def observed(self) -> bool:
        """The operator has seen the newest spec."""
        stored = self.stored
        return stored is not None and self.status.get("observedGeneration") == stored["metadata"]["generation"]

    def after(self, seconds: float) -> Condition:
        """A condition: so many seconds have passed."""
        until = self.cluster.world.now + seconds
        return lambda: self.cluster.world.now >= until

    def lost(self) -> Condition:
        """A condition: the status was told of a loss since now."""
        pods = {pod["metadata"]["uid"] for pod in self.cluster.pods(self.namespace, self.name, self.uid)}

        def replaced() -> bool:
            now = {pod["metadata"]["uid"] for pod in self.cluster.pods(self.namespace, self.name, self.uid)}
            return now != pods and self.settled()

        return replaced


def plain(job: Job) -> Iterator[Condition]:
    """Nothing happens."""
    yield job.settled


def worker_killed(job: Job) -> Iterator[Condition]:
    """A worker ends by a signal, and is replaced."""
    yield job.settled
    replaced = job.lost()
    job.cluster.fail(job.namespace, job.pod(Role.WORKER, 1), 137)
    yield replaced


def worker_killed_twice(job: Job) -> Iterator[Condition]:
    """Two failures, one after the other."""
    yield from worker_killed(job)
    yield from worker_killed(job)


def master_killed(job: Job) -> Iterator[Condition]:
    """The master ends by a signal."""
    yield job.settled
    replaced = job.lost()
    job.cluster.fail(job.namespace, job.pod(Role.MASTER, 0), 137)
    yield replaced


def user_code_fails(job: Job) -> Iterator[Condition]:
    """A mistake of the user's: the job fails."""
    yield job.settled
    for index in range(2):
        job.cluster.fail(job.namespace, job.pod(Role.WORKER, index), 1)
    yield job.ended


def too_many_failures(job: Job) -> Iterator[Condition]:
    """More failures than the limit allows."""
    job.edit(runPolicy={"backoffLimit": 1})
    yield from worker_killed(job)
    job.cluster.fail(job.namespace, job.pod(Role.WORKER, 0), 137)
    yield job.ended


def pod_deleted(job: Job) -> Iterator[Condition]:
    """Another client deletes a pod."""
    yield job.settled
    replaced = job.lost()
    job.cluster.delete(job.namespace, job.pod(Role.WORKER, 0))
    yield replaced


def pod_evicted(job: Job) -> Iterator[Condition]:
    """A pod is preempted."""
    yield job.settled
    replaced = job.lost()
    job.cluster.fail(job.namespace, job.pod(Role.WORKER, 0), 143, conditions=("DisruptionTarget",))
    yield replaced


def node_lost(job: Job) -> Iterator[Condition]:
    """A node does not report any more."""
    yield job.settled
    replaced = job.lost()
    job.cluster.lose_node(job.namespace, job.pod(Role.WORKER, 1))
    yield replaced


def suspended(job: Job) -> Iterator[Condition]:
    """The user suspends the job and resumes it."""
    yield job.settled
    job.edit(suspend=True)
    yield job.suspended
    job.edit(suspend=False)
    yield job.settled


def deleted_and_made_again(job: Job) -> Iterator[Condition]:
    """Another job of the same name follows, while the pods of the first one still end."""
    yield job.settled
    job.cluster.server.delete(JOBS, job.namespace, job.name)
    job.create()
    yield job.settled


def restart_of_the_job(job: Job) -> Iterator[Condition]:
    """The failure policy restarts the whole job."""
    job.edit(failurePolicy={"rules": [], "defaultAction": "RestartJob"})
    yield from worker_killed(job)


def expired(job: Job) -> Iterator[Condition]:
    """The finished job is deleted by its TTL."""
    job.edit(runPolicy={"ttlSecondsAfterFinished": 15})
    yield job.settled
    job.training.finish()
    yield job.gone


def quota_is_full(job: Job) -> Iterator[Condition]:
    """The namespace takes no pod for a while."""
    job.cluster.full.add(job.namespace)
    yield job.after(25.0)
    job.cluster.full.discard(job.namespace)
    yield job.settled


def edited(job: Job) -> Iterator[Condition]:
    """The user changes what may change in a job that runs, and takes some of it back."""
    yield job.settled
    for patch in (
        {"network": {"policy": "None"}},
        {"runPolicy": {"backoffLimit": 3}},
        {"network": {"policy": "JobOnly"}},
    ):
        job.edit(**patch)
        yield job.observed
    yield job.settled


EDITS: tuple[dict[str, Any], ...] = (
    {"network": {"policy": "None"}},
    {"runPolicy": {"cleanPodPolicy": "All"}},
    {"runPolicy": {"backoffLimit": 3}},
    {"failurePolicy": {"rules": [], "defaultAction": "RestartJob"}},
    {"scheduling": {"priorityClassName": "high"}},
    {"observability": {"statusIntervalSeconds": 20}},
    {"network": {"policy": "JobOnly"}},
)
"""What a user may change while the job runs, by the CRD (tests/apiserver/test_contract.py)."""


def edits(patches: Sequence[dict[str, Any]]) -> Story:
    """A user makes these changes, each when the operator has seen the one before it; the last of them while nothing else happens."""

    def story(job: Job) -> Iterator[Condition]:
        yield job.settled
        for patch in patches:
            job.edit(**patch)
            yield job.observed
        yield job.settled

    return story


STORIES: tuple[Story, ...] = (
    plain,
    worker_killed,
    worker_killed_twice,
    master_killed,
    user_code_fails,
    too_many_failures,
    pod_deleted,
    pod_evicted,
    node_lost,
    suspended,
    deleted_and_made_again,
    restart_of_the_job,
    expired,
    quota_is_full,
    edited,
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"runPolicy": {"cleanPodPolicy": "All"}},
    {"runPolicy": {"cleanPodPolicy": "None"}, "network": {"policy": "None"}},
    {"runPolicy": {"startupDeadlineSeconds": 50}},
)


def pod_of_another_namespace(cluster: Cluster, namespace: str, job: Job) -> None:
    """A pod elsewhere claims to be one of the job's."""
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": job.name, "uid": job.uid, "controller": True}
    labels = {"job-name": job.name, "role": "worker", "index": "0", "attempt": "1"}
    metadata = {
        "name": job.pod(Role.WORKER, 0),
        "labels": {f"disttrain.dev/{label}": value for label, value in labels.items()},
        "ownerReferences": [owner],
        "finalizers": ["example.org/stays"],
    }
    cluster.server.create(PODS, namespace, {"metadata": metadata, "spec": {"containers": []}})
