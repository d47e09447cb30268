"""network.tls Mutual as the operator carries it out: its requests about Secrets, and whose reports it believes."""

from __future__ import annotations

import base64

import pytest

from disttrain import certificates
from disttrain.api.names import CERTIFICATE
from disttrain.controller.progress import Master
from disttrain.kube.api import JOBS, SECRETS, ApiError, Refused, Unavailable
from unit.controller.fake_api import PODS_OF_JOB, ApiServer, job
from unit.controller.fake_cluster import eventually, operated
from unit.controller.hand_turned import hand_turned

MUTUAL = {"network": {"tls": "Mutual"}}


def secrets_of(server: ApiServer) -> list[str]:
    return [name for resource, name in server.objects if resource is SECRETS]


def asked(server: ApiServer) -> list[str]:
    """The verbs of the requests about Secrets."""
    return [verb for _, verb, plural, _ in server.requests if plural == "secrets"]


@hand_turned
async def test_secret_is_created_once_and_never_read() -> None:
    async with operated(job(**MUTUAL)) as (server, _):
        (name,) = secrets_of(server)
        kept = server.status["certificate"]
        assert name.endswith(f"-tls-1-{kept['suffix']}")
        body = server.objects[SECRETS, name]
        assert body["metadata"]["uid"] == kept["uid"]
        certificate = base64.b64decode(body["data"][CERTIFICATE])
        assert certificates.public_key(certificate) == kept["publicKey"]
        assert asked(server) == ["create"]


@hand_turned
async def test_creation_whose_answer_was_lost_leaves_one_secret() -> None:
    server = ApiServer()
    lost = [True]

    def fault(verb: str, resource: object, name: str) -> Unavailable | None:
        if verb == "create" and resource is SECRETS and lost:
            lost.clear()
            server.put(SECRETS, {"metadata": {"name": name, "namespace": "team"}})
            return Unavailable(0, "Timeout", "no answer")
        return None

    server.fault = fault
    async with operated(job(**MUTUAL), server=server):
        assert asked(server) == ["create", "create", "delete", "create"]
        (name,) = secrets_of(server)
        assert name.endswith(server.status["certificate"]["suffix"])


@hand_turned
@pytest.mark.parametrize(
    "error",
    [Unavailable(500, "InternalError", "etcd is away"), Refused(403, "Forbidden", "exceeded quota: secrets")],
    ids=["server error", "refusal"],
)
async def test_creation_that_fails_is_tried_again(error: ApiError) -> None:
    server, failures = ApiServer(), [error]
    server.fault = lambda verb, resource, _: (
        failures.pop() if failures and (verb, resource) == ("create", SECRETS) else None
    )
    async with operated(job(**MUTUAL), server=server):
        await eventually(lambda: server.status.get("certificate", {}).get("uid"))
        assert asked(server) == ["create", "create"]


@hand_turned
async def test_schema_that_does_not_know_the_certificate_is_named_and_asked_seldom(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = ApiServer()
    server.pruned = ("certificate",)
    async with operated(started=False, server=server):
        server.put(JOBS, job(**MUTUAL))
        await eventually(lambda: "apply that of this release" in caplog.text)
        assert asked(server) == []
        assert sum(verb == "patch" for _, verb, _, _ in server.requests) < 10


@hand_turned
async def test_end_of_the_job_deletes_the_secret_by_its_uid() -> None:
    async with operated(job(**MUTUAL)) as (server, _):
        server.run(*PODS_OF_JOB)
        server.fail("digits-worker-0", code=1)
        await eventually(lambda: server.condition("Failed")[0] == "True")
        await eventually(lambda: secrets_of(server) == [])
        await eventually(lambda: "certificate" not in server.objects[JOBS, "digits"]["status"])
        assert asked(server) == ["create", "delete"]


@hand_turned
async def test_master_under_tls_is_asked_with_a_nonce_and_believed_by_the_public_key_of_its_attempt() -> None:
    masters: list[Master] = []

    async def fetch(master: Master) -> bytes:
        masters.append(master)
        raise TimeoutError

    async with operated(job(**MUTUAL), fetch=fetch) as (server, _):
        server.run(*PODS_OF_JOB)
        await eventually(lambda: masters)
        assert masters[0].public_key == server.status["certificate"]["publicKey"]
        assert masters[0].path.startswith("progress/")
