"""What goes on in the cluster beside the operator: nodes run pods, the garbage collector deletes, and the programs in the pods train.

It acts by what the API server has, and knows nothing of the operator. The training of a job makes a step a second while all of its pods
run; it reaches its last step when the story of the job is told (`Training.finish`).
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from disttrain.api.names import LABEL_ATTEMPT, LABEL_INDEX, LABEL_JOB_NAME, LABEL_ROLE, Role, pod_name
from disttrain.kube.api import (
    CHILDREN,
    COSCHEDULING_GROUPS,
    JOBS,
    PODS,
    SECRETS,
    VOLCANO_GROUPS,
    Body,
    NotFound,
    Resource,
)
from simulation.controller.api_server import ApiServer, Change
from simulation.controller.world import World

SCHEDULE_SECONDS, START_SECONDS, END_SECONDS, COLLECT_SECONDS = 0.7, 1.3, 1.0, 0.4
"""For a pod to find a node, to start from there, to end when it is asked to; for the garbage collector to see that an owner is gone."""
STEPS = 100
"""Of a training."""
MEMBERSHIP: Mapping[Resource, tuple[str, str]] = MappingProxyType(
    {
        COSCHEDULING_GROUPS: ("labels", "scheduling.x-k8s.io/pod-group"),
        VOLCANO_GROUPS: ("annotations", "scheduling.k8s.io/group-name"),
    }
)
"""Where a pod names its PodGroup."""


@dataclass(slots=True)
class Program:
    """The trainer in a pod, from its start to its end."""

    job: str
    """uid of the job."""
    role: Role
    index: int
    attempt: int
    silent: bool = False
    """Its node does not report; whether it goes on there is unknown."""


@dataclass(slots=True)
class Training:
    """What the programs of one job do together."""

    namespace: str
    name: str
    uid: str
    kind: str
    step: int = 0
    finishing: bool = False
    failures: int = 0
    """Pods that failed by themselves."""
    finished_at: int | None = None

    def finish(self) -> None:
        """It may come to its end."""
        self.finishing = True


@dataclass
class Cluster:
    """Nodes, garbage collector, programs."""

    world: World
    server: ApiServer
    programs: dict[str, Program] = field(default_factory=dict)
    """Those that run, by the uid of the pod."""
    trainings: dict[str, Training] = field(default_factory=dict)
    """By the uid of the job."""
    silent_nodes: set[str] = field(default_factory=set)
    """uids of pods whose node does not report."""
    full: set[str] = field(default_factory=set)
    """Namespaces whose quota takes no pod."""
    _ends: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What a kubelet says of a pod whose program has ended, by the uid of the pod."""

    def see(self, resource: Resource, change: Change) -> None:
        """The API server has changed."""
        metadata = change.body["metadata"]
        key = metadata["namespace"], metadata["name"], metadata["uid"]
        if change.type == "DELETED":
            if resource is PODS:
                self.world.after(END_SECONDS, self.programs.pop, metadata["uid"], None)
            if resource is JOBS:
                self.world.after(COLLECT_SECONDS, self._collect, metadata["namespace"], metadata["uid"])
        elif resource is PODS:
            if "deletionTimestamp" in metadata:
                self.world.after(END_SECONDS, self._end_deleted, *key)
            elif change.type == "ADDED":
                self.world.after(SCHEDULE_SECONDS, self._schedule, *key)
        elif resource is JOBS and change.type == "ADDED":
            spec = change.body["spec"]
            kind = next((kind for kind in ("script", "command") if kind in spec["trainer"]), "loop")
            training = Training(metadata["namespace"], metadata["name"], metadata["uid"], kind)
            self.trainings[metadata["uid"]] = training
            self.world.after(1.0, self._train, training)
        if resource is VOLCANO_GROUPS and change.type == "ADDED":
            self.world.after(SCHEDULE_SECONDS, self._admit, *key)
        if change.type == "ADDED" and resource in (PODS, SECRETS, *CHILDREN.values()):
            self.world.after(COLLECT_SECONDS, self._collect_orphan, resource, *key)

    # What a story makes happen

    def pods(self, namespace: str, job: str, uid: str) -> list[Body]:
        """The pods that the job of that uid owns."""
        found, _ = self.server.list(PODS, namespace, selector=f"{LABEL_JOB_NAME}={job}")
        return [pod for pod in found if owner(pod) == uid]

    def fail(self, namespace: str, name: str, code: int, *, conditions: tuple[str, ...] = ()) -> None:
        """The program of a pod ends with an exit code."""
        pod = self.server.get(PODS, namespace, name)
        if self.programs.pop(pod["metadata"]["uid"], None) is None:
            return
        if not conditions:
            self.trainings[owner(pod)].failures += 1
        self._say_ended(pod, code, "", conditions)

    def lose_node(self, namespace: str, name: str) -> None:
        """The node of a pod does not report any more; the node controller says so, and the taint manager deletes the pod."""
        pod = self.server.get(PODS, namespace, name)
        uid = pod["metadata"]["uid"]
        self.silent_nodes.add(uid)
        if program := self.programs.get(uid):
            program.silent = True
        self._say(pod, conditions=_conditions(self.world.stamp(), Ready="False", ContainersReady="True"))
        self.world.after(30.0, self._give_up, namespace, name, uid)

    def delete(self, namespace: str, name: str) -> None:
        """Another client deletes a pod."""
        self.server.delete(PODS, namespace, name)

    def wanted(self, training: Training) -> list[tuple[Role, int]]:
        spec = self.server.get(JOBS, training.namespace, training.name)["spec"]
        servers = spec.get("parameterServer", {}).get("replicas", 0)
        workers = spec.get("worker", {}).get("replicas", 1)
        return [
            (Role.MASTER, 0),
            *((Role.PARAMETER_SERVER, i) for i in range(servers)),
            *((Role.WORKER, i) for i in range(workers)),
        ]

    def running(self, training: Training) -> dict[tuple[Role, int], int]:
        """The attempt of each program that runs on a node that reports."""
        return {
            (program.role, program.index): program.attempt
            for program in self.programs.values()
            if program.job == training.uid and not program.silent
        }

    def whole(self, training: Training) -> bool:
        """Whether every program of the newest attempt runs."""
        running = self.running(training)
        try:
            wanted = self.wanted(training)
        except NotFound:
            return False
        return set(wanted) <= running.keys() and len(set(running.values())) == 1

    def report(self, namespace: str, pod: str) -> bytes | None:
        """What a master says of its training; None: nothing listens there."""
        try:
            body = self.server.get(PODS, namespace, pod)
        except NotFound:
            return None
        program = self.programs.get(body["metadata"]["uid"])
        training = self.trainings.get(owner(body))
        if program is None or training is None or training.kind == "command" or program.silent:
            return None
        return json.dumps(self._progress(training, program.attempt)).encode()

    def restored(self) -> None:
        """The API server has an older state: kubelets say again how their pods are, and begin again what they had ended."""
        pods = {pod["metadata"]["uid"]: pod for pod in self.server.list(PODS, None)[0]}
        for uid in self.programs.keys() - pods.keys():
            del self.programs[uid]
        for uid, pod in pods.items():
            key = pod["metadata"]["namespace"], pod["metadata"]["name"], uid
            if "deletionTimestamp" in pod["metadata"]:
                self.world.after(END_SECONDS, self._end_deleted, *key)
            elif uid in self.silent_nodes:
                self.world.after(END_SECONDS, self._give_up, *key)
            elif uid in self._ends:
                self._say(pod, **self._ends[uid])
            elif pod["status"]["phase"] == "Pending":
                self.world.after(
                    SCHEDULE_SECONDS, self._schedule if not pod["spec"].get("nodeName") else self._start, *key
                )
            elif uid not in self.programs and pod["status"]["phase"] == "Running":
                self._run(pod)
        for resource in (PODS, SECRETS, *CHILDREN.values()):
            for body in self.server.list(resource, None)[0]:
                key = body["metadata"]["namespace"], body["metadata"]["name"], body["metadata"]["uid"]
                self.world.after(COLLECT_SECONDS, self._collect_orphan, resource, *key)
                if resource is VOLCANO_GROUPS:
                    self.world.after(SCHEDULE_SECONDS, self._admit, *key)

    # Parts

    def _progress(self, training: Training, attempt: int) -> dict[str, Any]:
        return {
            "attempt": attempt,
            "step": training.step,
            "totalSteps": STEPS,
            "worldSize": 1,
            "loss": 0.5 if training.step else None,
            "finished": training.step >= STEPS,
            "lastUpdateTime": self.world.stamp() if training.step else None,
            "waitingFor": None if self.whole(training) or training.step >= STEPS else "its peers",
        }

    def _train(self, training: Training) -> None:
        """A second of training."""
        try:
            if self.server.get(JOBS, training.namespace, training.name)["metadata"]["uid"] != training.uid:
                return
        except NotFound:
            return
        running = self.running(training)
        if training.step < STEPS and self.whole(training):
            training.step = STEPS if training.finishing else min(training.step + 1, STEPS - 1)
        if training.step >= STEPS:
            # The workers end first, then the servers, then the master; a second apart, so that it is the same in every life.
            for role in (Role.WORKER, Role.PARAMETER_SERVER, Role.MASTER):
                ends = [(uid, p) for uid, p in self.programs.items() if (p.job, p.role) == (training.uid, role)]
                for uid, program in ends if training.kind != "command" or role is Role.WORKER else ():
                    self._succeed(training, uid, program)
                if ends:
                    break
        if training.step < STEPS or running:
            self.world.after(1.0, self._train, training)

    def _succeed(self, training: Training, uid: str, program: Program) -> None:
        del self.programs[uid]
        try:
            pod = self.server.get(PODS, training.namespace, pod_name(training.name, program.role, program.index))
        except NotFound:
            return
        if pod["metadata"]["uid"] != uid:
            return
        said: dict[str, Any] = {"done": True}
        if program.role is Role.MASTER:
            said["progress"] = self._progress(training, program.attempt)
        self._say_ended(pod, 0, json.dumps(said) if training.kind != "command" else "", ())

    def _say_ended(self, pod: Body, code: int, message: str, conditions: tuple[str, ...]) -> None:
        now = self.world.stamp()
        ended = {"exitCode": code, "reason": "Error" if code else "Completed", "finishedAt": now, "message": message}
        status = self._ends[pod["metadata"]["uid"]] = {
            "phase": "Failed" if code else "Succeeded",
            "conditions": _conditions(now, Ready="False", **dict.fromkeys(conditions, "True")),
            "containerStatuses": [{"name": "trainer", "ready": False, "state": {"terminated": ended}}],
        }
        self._say(pod, **status)

    def _find(self, namespace: str, name: str, uid: str) -> Body | None:
        """The pod of that uid, on a node that reports."""
        try:
            pod = self.server.get(PODS, namespace, name)
        except NotFound:
            return None
        return pod if pod["metadata"]["uid"] == uid and uid not in self.silent_nodes else None

    def has_group(self, pod: Body) -> bool:
        """Whether the PodGroup exists that a pod names, and lets it be created; also of one that names none."""
        named = group_of(pod)
        if named is None:
            return True
        try:
            group = self.server.get(named[0], pod["metadata"]["namespace"], named[1])
        except NotFound:
            return False
        return named[0] is not VOLCANO_GROUPS or "status" in group

    def _gang_waits(self, pod: Body) -> bool:
        """Whether the gang scheduler lets a pod wait: its group does not exist, or has too few pods."""
        named, namespace = group_of(pod), pod["metadata"]["namespace"]
        if named is None:
            return False
        try:
            group = self.server.get(named[0], namespace, named[1])
        except NotFound:
            return True
        return sum(group_of(one) == named for one in self.server.list(PODS, namespace)[0]) < group["spec"]["minMember"]

    def _admit(self, namespace: str, name: str, uid: str) -> None:
        """Volcano finds room for a PodGroup."""
        with contextlib.suppress(NotFound):
            if self.server.get(VOLCANO_GROUPS, namespace, name)["metadata"]["uid"] == uid:
                self.server.patch_status(VOLCANO_GROUPS, namespace, name, {"status": {"phase": "Inqueue"}})

    def _schedule(self, namespace: str, name: str, uid: str) -> None:
        pod = self._find(namespace, name, uid)
        if pod is None or "deletionTimestamp" in pod["metadata"] or pod["spec"].get("nodeName"):
            return
        if self._gang_waits(pod):
            self.world.after(SCHEDULE_SECONDS, self._schedule, namespace, name, uid)
            return
        self.server.patch(PODS, namespace, name, {"spec": {"nodeName": f"node-{uid}"}})
        self.world.after(START_SECONDS, self._start, namespace, name, uid)

    def _start(self, namespace: str, name: str, uid: str) -> None:
        pod = self._find(namespace, name, uid)
        if pod is None or "deletionTimestamp" in pod["metadata"] or pod["status"]["phase"] != "Pending":
            return
        now = self.world.stamp()
        self._run(pod)
        self._say(
            pod,
            phase="Running",
            podIP="10.0.0.1",
            conditions=_conditions(now, Ready="True", ContainersReady="True"),
            containerStatuses=[{"name": "trainer", "ready": True, "state": {"running": {"startedAt": now}}}],
        )

    def _run(self, pod: Body) -> None:
        labels, job = pod["metadata"].get("labels", {}), owner(pod)
        if LABEL_ROLE in labels and job:
            place = Role(labels[LABEL_ROLE]), int(labels[LABEL_INDEX])
            self.programs[pod["metadata"]["uid"]] = Program(job, *place, int(labels[LABEL_ATTEMPT]))

    def _end_deleted(self, namespace: str, name: str, uid: str) -> None:
        """The kubelet: the program has ended after its SIGTERM."""
        if self._find(namespace, name, uid) is not None:
            self.programs.pop(uid, None)
            self.server.delete(PODS, namespace, name, uid=uid, grace_seconds=0)

    def _give_up(self, namespace: str, name: str, uid: str) -> None:
        """The taint manager deletes the pod of a node that does not report. No kubelet confirms it."""
        try:
            pod = self.server.get(PODS, namespace, name)
        except NotFound:
            return
        if pod["metadata"]["uid"] == uid:
            reason = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
            conditions = [*pod["status"]["conditions"], {**reason, "lastTransitionTime": self.world.stamp()}]
            self._say(pod, conditions=conditions)
            self.server.delete(PODS, namespace, name)

    def _collect(self, namespace: str, uid: str) -> None:
        """The garbage collector: what a job owned goes after it."""
        for resource in (PODS, SECRETS, *CHILDREN.values()):
            for body in self.server.list(resource, namespace)[0]:
                if owner(body) == uid:
                    self.server.delete(resource, namespace, body["metadata"]["name"], uid=body["metadata"]["uid"])

    def _collect_orphan(self, resource: Resource, namespace: str, name: str, uid: str) -> None:
        """What was made after its owner was gone goes too; also what names an owner of another namespace."""
        try:
            body = self.server.get(resource, namespace, name)
        except NotFound:
            return
        if body["metadata"]["uid"] != uid or not owner(body):
            return
        jobs = {job["metadata"]["uid"] for job in self.server.list(JOBS, namespace)[0]}
        if owner(body) not in jobs:
            self.server.delete(resource, namespace, name, uid=uid)

    def _say(self, pod: Body, **status: Any) -> None:
        metadata = pod["metadata"]
        self.server.patch_status(PODS, metadata["namespace"], metadata["name"], {"status": status})


def group_of(pod: Body) -> tuple[Resource, str] | None:
    """Kind and name of the PodGroup that a pod names."""
    for resource, (where, key) in MEMBERSHIP.items():
        if name := (pod["metadata"].get(where) or {}).get(key):
            return resource, name
    return None


def owner(body: Body) -> str:
    """The uid of the controller of an object, "" for none."""
    references = body["metadata"].get("ownerReferences") or ()
    return next((reference["uid"] for reference in references if reference.get("controller")), "")


def _conditions(now: str, **statuses: str) -> list[Body]:
    statuses = {"PodScheduled": "True", **statuses}
    return [{"type": type_, "status": status, "lastTransitionTime": now} for type_, status in statuses.items()]
