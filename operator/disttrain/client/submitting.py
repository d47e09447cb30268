"""A job and what it needs, created on a cluster with the user's rights. Not here: what the file must be like (disttrain.cli.files)."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from disttrain import __version__
from disttrain.api.names import API_VERSION, KIND
from disttrain.client.errors import ClusterError, JobExists, OtherVersion, Rejected, of_answer
from disttrain.client.text import one_line
from disttrain.kube.api import CLAIMS, CONFIG_MAPS, JOBS, SECRETS, ApiError, Body, Conflict, KubeApi, NotFound, Resource

BESIDE: Final[Mapping[str, Resource]] = MappingProxyType(
    {resource.kind: resource for resource in (CONFIG_MAPS, SECRETS, CLAIMS)}
)
"""The kinds that a job can name, and its file can hold."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that was created."""

    job: Body
    """Its metadata."""
    notes: tuple[str, ...]
    """What is not as the file says, a line each."""


async def submit(
    api: KubeApi, namespace: str, job: Body, *, beside: Sequence[Body] = (), code: Body | None = None
) -> Submitted:
    """Creates the objects beside a job, the ConfigMap of its code, and the job. Raises ClusterError.

    The API server is asked first whether it takes the job: of one that it refuses nothing is created, and the code is removed again if it
    refuses the job after all. An object of the file that is there
    already stays as it is. The code's ConfigMap is the job's own: it goes when the job is deleted.
    """
    await _create_job(api, namespace, job, dry_run=True)
    kept = [one for one in beside if await _create(api, namespace, one) is None]
    ours = None if code is None else await _create(api, namespace, code)
    if code is not None and ours is None:
        await _check_same(api, namespace, code)
    try:
        created = await _create_job(api, namespace, job)
    except ClusterError as error:
        if ours is not None and _is_refusal(error):
            await _remove(api, namespace, ours)
        raise
    notes = [f"{_title(one)} was there already and stays as it is" for one in kept]
    if code is not None:
        notes += await _own(api, namespace, code, created)
    return Submitted(created, tuple(notes))


async def _create_job(api: KubeApi, namespace: str, job: Body, *, dry_run: bool = False) -> Body:
    name = job["metadata"]["name"]
    try:
        return await api.create(JOBS, namespace, job, dry_run=dry_run)
    except ApiError as error:
        if isinstance(error, Conflict):
            raise JobExists(
                f"namespace {namespace} has a DistTrainJob {name} already: `disttrain cancel {name} -n {namespace}` deletes it, or give "
                "this one another metadata.name"
            ) from error
        if error.status in (400, 422):  # with these rules this version has checked it
            raise OtherVersion(
                f"the cluster refuses a job that disttrain {__version__} takes: its DistTrain is of another version, or has a policy of "
                f"its own: {one_line(error.message)}; upgrade it (kubectl apply -k deploy/base), or leave out what it names"
            ) from error
        raise of_answer(error, what="create the job", namespace=namespace) from error


async def _create(api: KubeApi, namespace: str, body: Body) -> Body | None:
    """What was created; None: an object of that name is there."""
    try:
        return await api.create(BESIDE[body["kind"]], namespace, body)
    except Conflict:
        return None
    except ApiError as error:
        raise of_answer(error, what=f"create the {_title(body)}", namespace=namespace) from error


def _is_refusal(error: ClusterError) -> bool:
    """Whether the API server refused the request; of one that it did not answer, or failed to, the object may be there."""
    return isinstance(error.__cause__, ApiError) and 400 <= error.__cause__.status < 500


async def _remove(api: KubeApi, namespace: str, code: Body) -> None:
    """The job was refused after its code was created. Another job of this name may have taken the code meanwhile. What cannot be removed
    stays: the user reads why the job was refused."""
    name, uid = code["metadata"]["name"], code["metadata"]["uid"]
    with contextlib.suppress(ApiError):
        stored = await api.get(CONFIG_MAPS, namespace, name)
        if not stored["metadata"].get("ownerReferences"):
            await api.delete(CONFIG_MAPS, namespace, name, uid=uid)


async def _check_same(api: KubeApi, namespace: str, code: Body) -> None:
    """The name has the digest, but whoever may create ConfigMaps may have given it to something else."""
    try:
        stored = await api.get(CONFIG_MAPS, namespace, code["metadata"]["name"])
    except NotFound:  # that of a former job, which is collected; `_own` creates it again
        return
    except ApiError as error:
        raise of_answer(error, what=f"read the {_title(code)}", namespace=namespace) from error
    if any(stored.get(field) != code.get(field) for field in ("data", "binaryData", "immutable")):
        name = code["metadata"]["name"]
        raise Rejected(
            f"{_title(code)} is there and holds other code: `kubectl delete configmap {name} -n {namespace}`"
        )


async def _own(api: KubeApi, namespace: str, code: Body, job: Body) -> list[str]:
    """Makes the job the one owner of its code. What could not be done, in a line: the job is there, and trains."""
    metadata = job["metadata"]
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": metadata["name"], "uid": metadata["uid"]}
    owned = {"metadata": {"ownerReferences": [owner]}}
    try:
        try:
            await api.patch(CONFIG_MAPS, namespace, code["metadata"]["name"], owned)
        except NotFound:
            await _create(api, namespace, {**code, "metadata": {**code["metadata"], **owned["metadata"]}})
    except (ApiError, ClusterError) as error:
        return [f"{_title(code)} stays when the job is deleted: {one_line(error)}"]
    return []


def _title(body: Body) -> str:
    return f"{body['kind']} {body['metadata']['name']}"
