"""A kubelet and a master to be played: none runs beside a bare API server, so a test says itself what becomes of a pod."""

from __future__ import annotations

import itertools
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from apiserver.operating import EVENTS, PODS, Refusal, Rest, stamp


class Kubelet:
    """Says what becomes of pods, as a kubelet would."""

    def __init__(self, rest: Rest) -> None:
        self._rest = rest
        self._ips = itertools.count(2)

    def wait(self, name: str, reason: str = "ContainerCreating") -> None:
        """The pod has a node, and its container waits for something that the kubelet does first."""
        self._status(name, {"containerStatuses": [self._container(False, {"waiting": {"reason": reason}})]})

    def tell(self, name: str, reason: str, message: str) -> None:
        """An Event about the pod."""
        pod, now = self._rest.get(PODS, name)["metadata"], stamp()
        about = {"apiVersion": "v1", "kind": "Pod", **{key: pod[key] for key in ("namespace", "name", "uid")}}
        self._rest.create(
            EVENTS,
            {
                "metadata": {"generateName": f"{name}."},
                "involvedObject": about,
                "type": "Warning",
                "reason": reason,
                "message": message,
                "firstTimestamp": now,
                "lastTimestamp": now,
                "count": 1,
                "source": {"component": "kubelet", "host": "node-1"},
            },
        )

    def run(self, name: str, ip: str = "") -> None:
        now = stamp()
        self._status(
            name,
            {
                "phase": "Running",
                "podIP": ip or f"127.2.0.{next(self._ips)}",  # loopback, where no process answers
                "conditions": [
                    {"type": "PodScheduled", "status": "True", "lastTransitionTime": now},
                    {"type": "Ready", "status": "True", "lastTransitionTime": now},
                ],
                "containerStatuses": [self._container(True, {"running": {"startedAt": now}})],
            },
        )

    def fail(
        self, name: str, *, code: int = 137, reason: str = "Error", message: str = "", conditions: Any = ()
    ) -> None:
        self._end(name, "Failed", {"exitCode": code, "reason": reason, "message": message}, conditions)

    def succeed(self, name: str, message: str = "") -> None:
        """The trainer ends well, and says that the job is done. A master gives its account with it, unless the test says something else."""
        labels = self._rest.get(PODS, name)["metadata"]["labels"]
        said: dict[str, Any] = {"done": True}
        if labels["disttrain.dev/role"] == "master":
            account = {"attempt": int(labels["disttrain.dev/attempt"]), "step": 90, "totalSteps": 90, "finished": True}
            said["progress"] = account
        message = message or json.dumps(said)
        self._end(name, "Succeeded", {"exitCode": 0, "reason": "Completed", "message": message}, ())

    def gone(self, name: str) -> None:
        """The pod has ended after its deletion, if the API server has not taken it away already, as it does with one that has no node."""
        try:
            self._rest.delete(PODS, name, gracePeriodSeconds=0)
        except Refusal as refusal:
            if refusal.status != 404:
                raise

    def lose(self, name: str) -> None:
        """The pod's node is gone and declared lost; no kubelet will report that the pod has ended."""
        now = stamp()
        disrupted = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
        pod = self._rest.get(PODS, name)
        conditions = [*pod["status"].get("conditions", ()), {**disrupted, "lastTransitionTime": now}]
        self._status(name, {"conditions": conditions})
        self._rest.delete(PODS, name, gracePeriodSeconds=1)

    def fall_silent(self, name: str) -> None:
        """The pod's node does not report: the node controller says that the pod is not ready, and leaves the rest as it was."""
        now = stamp()
        statuses = {"PodScheduled": "True", "ContainersReady": "True", "Ready": "False"}
        self._status(
            name, {"conditions": [{"type": t, "status": s, "lastTransitionTime": now} for t, s in statuses.items()]}
        )

    def crash_sidecar(self, name: str, sidecar: str) -> None:
        """A container beside the trainer of a running pod ends again and again."""
        now = stamp()
        ended = {"exitCode": 3, "reason": "Error", "startedAt": now, "finishedAt": now}
        waits = {"reason": "CrashLoopBackOff", "message": f"back-off 5m0s restarting failed container={sidecar}"}
        crashing = {**self._container(False, {"waiting": waits}), "name": sidecar, "lastState": {"terminated": ended}}
        statuses = {"PodScheduled": "True", "ContainersReady": "False", "Ready": "False"}
        self._status(
            name,
            {
                "conditions": [{"type": t, "status": s, "lastTransitionTime": now} for t, s in statuses.items()],
                "initContainerStatuses": [crashing],
            },
        )

    def place(self, name: str, node: str) -> None:
        """The scheduler's part: only of a pod with a node does a deletion wait for the node's word."""
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        self._rest.create(f"{PODS}/{name}/binding", binding)

    def find_no_node(self, name: str, message: str) -> None:
        """The scheduler's part: no node fits the pod."""
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        self._status(name, {"conditions": [{**condition, "lastTransitionTime": stamp()}]})

    def _end(self, name: str, phase: str, terminated: Any, conditions: Any) -> None:
        now = stamp()
        ended = {**terminated, "finishedAt": now, "startedAt": now}
        true = [{"type": type_, "status": "True", "lastTransitionTime": now} for type_ in ("PodScheduled", *conditions)]
        ready = {"type": "Ready", "status": "False", "lastTransitionTime": now}
        status = {
            "phase": phase,
            "conditions": [*true, ready],
            "containerStatuses": [self._container(False, {"terminated": ended})],
        }
        self._status(name, status)

    def _container(self, ready: bool, state: Any) -> Any:
        return {"name": "trainer", "image": "x", "imageID": "", "restartCount": 0, "ready": ready, "state": state}

    def _status(self, name: str, status: Any) -> None:
        self._rest.merge(f"{PODS}/{name}/status", {"status": status})


class Master:
    """What the master of a job tells of it, on loopback: for pods that run at 127.0.0.1, and operators with --progress=Pod. Through the
    API server it is asked at another address of this machine, since that is no proxy for loopback."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.address = address
        self.report = {"attempt": 1, "step": 0, "totalSteps": 90, "worldSize": 2}
        self.history = ""
        """What /history answers; "": it has none yet."""

    def __enter__(self) -> Master:
        master = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answers = {"/progress": json.dumps(master.report), "/history": master.history}
                body = answers.get(self.path, "").encode()
                self.send_response(200 if body else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((self.address, 0), Handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def observability(self) -> dict[str, int]:
        """Of a job whose master this is."""
        return {"metricsPort": self._server.server_port, "statusIntervalSeconds": 1}
