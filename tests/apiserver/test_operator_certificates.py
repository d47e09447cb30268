"""network.tls Mutual on a real API server: one Secret an attempt, which its pods mount, and which goes with the attempt."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography import x509

from apiserver.operating import JOBS, PODS, SECRETS, Operator, Rest, eventually, job, pod_names
from apiserver.playing import Kubelet
from cluster.controlplane import ControlPlane

FLAGS = ("--namespaces=certificates", "--progress=Pod")
MUTUAL = {"network": {"tls": "Mutual"}}


@pytest.fixture(scope="module")
def rest(control_plane: ControlPlane) -> Rest:
    control_plane.kubectl("create", "namespace", "certificates")
    return Rest(control_plane, "certificates")


@pytest.fixture
def operator(control_plane: ControlPlane, rest: Rest, request: pytest.FixtureRequest) -> Iterator[Operator]:
    with Operator(control_plane, *FLAGS, name=f"operator-{request.node.name}") as operator:
        yield operator


def started(rest: Rest, name: str, **spec: Any) -> None:
    rest.create(JOBS, job(name, **MUTUAL, **spec))
    eventually(lambda: sorted(rest.pods_of(name)) == pod_names(name))


def certificates_of(rest: Rest, name: str) -> list[Any]:
    return rest.list(SECRETS, f"disttrain.dev/job-name={name}")


def secret_name(rest: Rest, name: str) -> str:
    """As the status has it."""
    found = rest.get(JOBS, name)
    kept = found["status"]["certificate"]
    return f"{name}-{found['metadata']['uid'][:8]}-tls-{kept['attempt']}-{kept['suffix']}"


def test_the_pods_of_an_attempt_mount_one_certificate_that_the_job_owns(rest: Rest, operator: Operator) -> None:
    started(rest, "made")
    (secret,) = certificates_of(rest, "made")
    assert secret["metadata"]["name"] == secret_name(rest, "made")
    assert secret["metadata"]["uid"] == rest.get(JOBS, "made")["status"]["certificate"]["uid"]
    (owner,) = secret["metadata"]["ownerReferences"]
    assert owner["uid"] == rest.get(JOBS, "made")["metadata"]["uid"]
    files = {name: base64.b64decode(content) for name, content in secret["data"].items()}
    tokens = {"join-parameter-server-0", "join-worker-0", "join-worker-1"} & files.keys()
    assert files.keys() == {"ca.crt", "tls.crt", "tls.key", "join.key", *tokens}
    leaf, authority = (x509.load_pem_x509_certificate(files[name]) for name in ("tls.crt", "ca.crt"))
    leaf.verify_directly_issued_by(authority)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["*.made.certificates.svc"]
    for name in pod_names("made"):
        volumes = {each["name"]: each for each in rest.get(PODS, name)["spec"]["volumes"]}
        assert volumes["disttrain-tls"]["secret"]["secretName"] == secret["metadata"]["name"]


def test_an_operator_that_starts_leaves_the_certificate_as_it_is(control_plane: ControlPlane, rest: Rest) -> None:
    """It asks for no Secret. One that a user deleted is not made again: the pods that run have the old certificate."""
    with Operator(control_plane, *FLAGS, name="operator-before"):
        started(rest, "restarted")
    (before,) = certificates_of(rest, "restarted")
    with Operator(control_plane, *FLAGS, name="operator-after") as operator:
        rest.delete(PODS, "restarted-worker-0", gracePeriodSeconds=0)
        eventually(lambda: sorted(rest.pods_of("restarted")) == pod_names("restarted"))
        assert certificates_of(rest, "restarted") == [before]
        rest.delete(SECRETS, before["metadata"]["name"])
        rest.delete(PODS, "restarted-worker-0", gracePeriodSeconds=0)
        eventually(lambda: sorted(rest.pods_of("restarted")) == pod_names("restarted"))
        assert not [request for request in operator.requests() if request[1] == "secrets"]
    assert certificates_of(rest, "restarted") == []


def test_the_next_attempt_has_another_one_and_the_end_of_the_job_leaves_none(rest: Rest, operator: Operator) -> None:
    kubelet = Kubelet(rest)
    started(rest, "failing", failurePolicy={"defaultAction": "RestartJob"})
    (first,) = certificates_of(rest, "failing")
    for name in pod_names("failing"):
        kubelet.run(name)
    kubelet.fail("failing-worker-0")
    eventually(
        lambda: ["-tls-2-" in one["metadata"]["name"] for one in certificates_of(rest, "failing")] == [True], seconds=40
    )
    (second,) = certificates_of(rest, "failing")
    assert second["data"]["ca.crt"] != first["data"]["ca.crt"]
    eventually(lambda: sorted(rest.pods_of("failing")) == pod_names("failing"), seconds=40)
    for name in pod_names("failing"):
        kubelet.run(name)
    for name in pod_names("failing"):
        kubelet.succeed(name)
    eventually(lambda: certificates_of(rest, "failing") == [])


def test_a_suspended_job_has_none(rest: Rest, operator: Operator) -> None:
    started(rest, "suspended")
    rest.merge(f"{JOBS}/suspended", {"spec": {"suspend": True}})
    eventually(lambda: certificates_of(rest, "suspended") == [])
