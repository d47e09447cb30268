"""What is secret in a job leaves nothing in what an operator writes: status, Events, log, annotations, metrics, command lines."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from apiserver.operating import (
    EVENTS,
    JOBS,
    PODS,
    POLICIES,
    SECRETS,
    SERVICES,
    Operator,
    Rest,
    eventually,
    job,
    pod_names,
)
from apiserver.playing import Kubelet
from cluster.controlplane import ControlPlane

NAMESPACE = "secrets-stay"
CANARY = "canary-7f3a9c51d2"


def test_no_secret_of_a_job_is_in_anything_that_the_operator_writes(
    control_plane: ControlPlane, rest: Rest, kubelet: Kubelet
) -> None:
    """A variable of the template, the Secret that another variable names, and the keys that the operator makes itself."""
    rest.create(SECRETS, {"metadata": {"name": "token"}, "stringData": {"key": CANARY}})
    named = {"secretKeyRef": {"name": "token", "key": "key"}}
    env = [{"name": "PLAIN", "value": CANARY}, {"name": "NAMED", "valueFrom": named}]
    template = {"spec": {"containers": [{"name": "trainer", "env": env}]}}
    with Operator(control_plane, f"--namespaces={NAMESPACE}", "--progress=Pod", "--log-level=debug") as operator:
        rest.create(JOBS, job("kept", network={"tls": "Mutual"}, worker={"replicas": 2, "template": template}))
        eventually(lambda: sorted(rest.pods_of("kept")) == pod_names("kept"))
        (made,) = rest.list(SECRETS, "disttrain.dev/job-name=kept")
        kubelet.wait("kept-ps-0")
        for name in pod_names("kept"):
            kubelet.run(name)
        uid = rest.get(PODS, "kept-worker-0")["metadata"]["uid"]
        kubelet.fail("kept-worker-0")
        eventually(lambda: rest.get(PODS, "kept-worker-0")["metadata"]["uid"] != uid)
        eventually(lambda: rest.get(JOBS, "kept")["status"]["restarts"]["total"] == 1)
        eventually(lambda: [each for each in rest.list(EVENTS) if each["involvedObject"]["name"] == "kept"])
        assert operator.program
        process = Path("/proc") / str(operator.program.pid)
        kept = rest.get(JOBS, "kept")
        pods = rest.list(PODS, "disttrain.dev/job-name=kept")
        sinks = {
            "status": kept["status"],
            "metadata of the job": kept["metadata"],
            "Events": rest.list(EVENTS),
            "Service and policy": [*rest.list(SERVICES), *rest.list(POLICIES)],
            "metadata of pods": [pod["metadata"] for pod in pods],
            "command lines of pods": [
                (container["command"], container.get("args")) for pod in pods for container in pod["spec"]["containers"]
            ],
            "metrics": operator.answer("/metrics")[1],
            "log": operator.log,
            "command line": process.joinpath("cmdline").read_bytes().decode(),
            "environment": process.joinpath("environ").read_bytes().decode(errors="replace"),
        }
        sinks |= {f"configuration of {pod['metadata']['name']}": ours(pod) for pod in pods}
    secrets = {CANARY, base64.b64encode(CANARY.encode()).decode()}
    for name in ("tls.key", "join.key", "join-worker-0"):
        encoded = made["data"][name]
        secrets |= {encoded, *base64.b64decode(encoded).decode("latin-1").split("\n")[1:2]} - {""}
    texts = {where: sink if isinstance(sink, str) else json.dumps(sink) for where, sink in sinks.items()}
    assert [(where, secret) for where, text in texts.items() for secret in secrets if secret in text] == []
    assert len(secrets) > 4
    assert all(texts.values())


def ours(pod: dict) -> list[dict]:  # type: ignore[type-arg]
    """The variables that the operator sets: those of the template are the user's word."""
    return [
        each
        for container in pod["spec"]["containers"]
        for each in container["env"]
        if each["name"] not in ("PLAIN", "NAMED")
    ]
