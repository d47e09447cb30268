"""A job and what it needs, created on a cluster with the user's rights. Not here: what the file must be like (disttrain.cli.files)."""

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

    The API server is asked first whether it takes the job: of one that it refuses nothing is created. An object of the file that is there
    already stays as it is. The code's ConfigMap is the job's own: it goes when the job is deleted.
    """
    await _create_job(api, namespace, job, dry_run=True)
    kept = [one for one in beside if not await _create(api, namespace, one)]
    if code is not None and not await _create(api, namespace, code):
        await _check_same(api, namespace, code)
    created = await _create_job(api, namespace, job)
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


async def _create(api: KubeApi, namespace: str, body: Body) -> bool:
    """False: an object of that name is there."""
    try:
        await api.create(BESIDE[body["kind"]], namespace, body)
    except Conflict:
        return False
    except ApiError as error:
        raise of_answer(error, what=f"create the {_title(body)}", namespace=namespace) from error
    return True


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
