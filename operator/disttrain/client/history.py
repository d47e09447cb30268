"""The history of a job that lives, from its master through the API server, with the user's rights."""

from typing import Final

from disttrain.api.job import DistTrainJob
from disttrain.api.names import METRICS_PORT, Role, pod_name
from disttrain.client.errors import ClusterError, of_answer
from disttrain.client.jobs import Jobs
from disttrain.client.text import one_line
from disttrain.kube.api import ApiError, Body, KubeApi, NotFound

_MOST_BYTES: Final = 32 << 20
"""More than twice what a master keeps."""


async def of_job(jobs: Jobs, api: KubeApi, name: str) -> bytes:
    """The lines of its history (disttrain.api.history). Raises ClusterError."""
    job = await jobs.get(name)
    master = pod_name(name, Role.MASTER, 0)
    pods = {pod["metadata"]["name"]: pod for pod in await jobs.pods(job)}
    if (pods.get(master, {}).get("status") or {}).get("phase") != "Running":
        state = one_line((job.get("status") or {}).get("state", "not seen by an operator yet"))
        raise ClusterError(f"{name} is {state}, and only a master that runs serves its history{_place(job)}")
    try:
        return await api.proxy(jobs.namespace, master, _port(job), "/history", most=_MOST_BYTES)
    except NotFound as error:
        raise ClusterError(f"the master of {name} has no history yet, or its trainer is of an older release") from error
    except ApiError as error:
        raise of_answer(error, what="read the history by pods/proxy", namespace=jobs.namespace) from error


def _place(job: Body) -> str:
    """Where the file is that stays."""
    volume = ((job["spec"].get("checkpoint") or {}).get("volume") or {}).get("persistentVolumeClaim")
    return f"; it lies beside the checkpoints on claim {one_line(volume)}" if volume else ""


def _port(job: Body) -> int:
    try:
        return DistTrainJob.parse(job).spec.observability.metrics_port
    except ValueError:  # of another version
        return METRICS_PORT
