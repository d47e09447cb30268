"""What `submit` makes of the answers of an API server: nothing is created of a job that is refused, and the job owns its code."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disttrain.client import submitting
from disttrain.client.errors import ClusterError, JobExists, NotInstalled, NotPermitted, OtherVersion, Rejected
from disttrain.kube.api import ApiError, Conflict, NotFound, Refused, Resource

JOB = {"kind": "DistTrainJob", "metadata": {"name": "digits"}, "spec": {}}
CODE = {"kind": "ConfigMap", "metadata": {"name": "digits-code-0a"}, "data": {"mine.py": "x"}, "immutable": True}
CLAIM = {"kind": "PersistentVolumeClaim", "metadata": {"name": "ckpt"}}


class Played:
    """An API server that holds objects by name, and answers a request with an error where the test has put one."""

    def __init__(self, **objects: Any) -> None:
        self.objects: dict[str, Any] = {body["metadata"]["name"]: body for body in objects.values()}
        self.errors: dict[tuple[str, str], ApiError] = {}
        self.before_patch = lambda: None

    async def create(self, resource: Resource, namespace: str, body: Any, *, dry_run: bool = False) -> Any:
        self._fail("dry run" if dry_run else "create", body["kind"])
        name = body["metadata"]["name"]
        if name in self.objects:
            raise Conflict(409, "AlreadyExists", "already exists")
        if not dry_run:
            self.objects[name] = body
        return {"metadata": {**body["metadata"], "uid": f"uid of {name}", "namespace": namespace}}

    async def get(self, resource: Resource, namespace: str, name: str) -> Any:
        if name not in self.objects:
            raise NotFound(404, "NotFound", f'{resource.plural} "{name}" not found')
        return self.objects[name]

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Any) -> Any:
        self.before_patch()
        self._fail("patch", resource.kind)
        body = await self.get(resource, namespace, name)
        self.objects[name] = {**body, "metadata": {**body["metadata"], **patch["metadata"]}}

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str) -> None:
        assert uid == f"uid of {name}"
        del self.objects[name]

    def owners(self) -> list[str]:
        return [owner["uid"] for owner in self.objects[CODE["metadata"]["name"]]["metadata"]["ownerReferences"]]

    def _fail(self, verb: str, kind: str) -> None:
        if error := self.errors.get((verb, kind)):
            raise error


def submit(played: Played) -> submitting.Submitted:
    return asyncio.run(submitting.submit(played, "team", JOB, beside=[CLAIM], code=CODE))  # type: ignore[arg-type]


def test_the_job_owns_its_code_and_an_object_that_is_there_stays() -> None:
    played = Played(claim=CLAIM)
    assert submit(played).notes == ("PersistentVolumeClaim ckpt was there already and stays as it is",)
    assert played.owners() == ["uid of digits"]


@pytest.mark.parametrize("collected", [False, True])
def test_code_of_a_former_job_becomes_that_of_the_new_one_also_where_it_is_collected_meanwhile(collected: bool) -> None:
    played = Played(code={**CODE, "metadata": {**CODE["metadata"], "ownerReferences": [{"uid": "former"}]}})
    if collected:
        played.before_patch = lambda: played.objects.pop(CODE["metadata"]["name"])
    submit(played)
    assert played.owners() == ["uid of digits"]


@pytest.mark.parametrize(
    ("error", "owned", "stays"),
    [
        (Refused(403, "Forbidden", "exceeded quota"), False, False),
        (Refused(403, "Forbidden", "exceeded quota"), True, True),
        (ApiError(0, "Unavailable", "closed"), False, True),
    ],
    ids=["refused", "another job has taken it", "the job may be there"],
)
def test_the_code_of_a_job_that_is_refused_at_last_is_removed(error: ApiError, owned: bool, stays: bool) -> None:
    played = Played()
    played.errors["create", "DistTrainJob"] = error
    code = {**CODE, "metadata": {**CODE["metadata"], **({"ownerReferences": [{"uid": "other"}]} if owned else {})}}
    with pytest.raises(ClusterError):
        asyncio.run(submitting.submit(played, "team", JOB, code=code))  # type: ignore[arg-type]
    assert (CODE["metadata"]["name"] in played.objects) is stays


def test_other_code_under_the_name_of_the_digest_is_not_taken() -> None:
    played = Played(code={**CODE, "data": {"mine.py": "evil"}})
    with pytest.raises(Rejected, match="ConfigMap digits-code-0a is there and holds other code: `kubectl delete"):
        submit(played)
    assert "digits" not in played.objects


def test_a_job_that_is_created_is_a_success_though_its_code_cannot_be_given_to_it() -> None:
    played = Played()
    played.errors["patch", "ConfigMap"] = Refused(403, "Forbidden", "cannot patch")
    assert submit(played).notes[0].startswith("ConfigMap digits-code-0a stays when the job is deleted: ")


@pytest.mark.parametrize(
    ("error", "kind", "code", "text"),
    [
        (
            Conflict(409, "AlreadyExists", ""),
            JobExists,
            7,
            "has a DistTrainJob digits already: `disttrain cancel digits",
        ),
        (
            Refused(400, "BadRequest", 'unknown field "spec.x"'),
            OtherVersion,
            6,
            'another version.*unknown field "spec.x"',
        ),
        (Refused(422, "Invalid", "not supported"), OtherVersion, 6, "not supported"),
        (Refused(403, "Forbidden", "cannot create"), NotPermitted, 4, "you may not create the job"),
        (NotFound(404, "NotFound", "404 page not found"), NotInstalled, 5, "install DistTrain there"),
        (NotFound(404, "NotFound", 'namespaces "team" not found'), Rejected, 2, "kubectl create namespace team"),
    ],
)
def test_of_a_job_that_is_refused_nothing_is_created(
    error: ApiError, kind: type[ClusterError], code: int, text: str
) -> None:
    played = Played()
    played.errors["dry run", "DistTrainJob"] = error
    with pytest.raises(kind, match=text) as refused:
        submit(played)
    assert refused.value.exit_code == code
    assert played.objects == {}
