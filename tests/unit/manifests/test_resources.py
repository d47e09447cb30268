"""What the pods of a gang request together, as the scheduler counts it."""

import pytest

from disttrain.api.names import Role
from disttrain.manifests.resources import requests_of
from unit.manifests.jobs import job


def worker(
    containers: list[dict[str, object]], init: list[dict[str, object]] | None = None, **fields: object
) -> object:
    spec = {"containers": containers, **({"initContainers": init} if init else {})}
    return job(worker={"replicas": 2, "template": {"spec": spec}, **fields})


def container(name: str, **requests: str) -> dict[str, object]:
    return {"name": name, "image": "x:1", "resources": {"requests": requests}}


TRAINER = container("trainer", cpu="1500m", memory="1Gi")


@pytest.mark.parametrize(
    ("containers", "init", "wanted"),
    [
        ([TRAINER], [], {"cpu": "3", "memory": str(2**31)}),
        ([TRAINER, container("log", cpu="250m")], [], {"cpu": "3500m", "memory": str(2**31)}),
        ([TRAINER], [container("fetch", cpu="4")], {"cpu": "8", "memory": str(2**31)}),
        (
            [TRAINER],
            [{**container("proxy", cpu="100m"), "restartPolicy": "Always"}, container("fetch", cpu="4")],
            {"cpu": "8200m", "memory": str(2**31)},
        ),
        ([{"name": "trainer", "resources": {"limits": {"cpu": "2"}}}], [], {"cpu": "4"}),
        ([container("trainer", cpu="0.0005")], [], {"cpu": "1m"}),
        ([], [], {}),
    ],
    ids=["trainer", "sidecar", "init container", "sidecar before it", "limit alone", "fraction", "nothing"],
)
def test_requests_of_two_workers(
    containers: list[dict[str, object]], init: list[dict[str, object]], wanted: dict[str, str]
) -> None:
    assert requests_of(worker(containers, init), {Role.WORKER: 2}) == wanted  # type: ignore[arg-type]


def test_gpus_of_a_worker_count_and_the_master_has_none() -> None:
    assert requests_of(worker([], gpusPerWorker=8), {Role.MASTER: 1, Role.WORKER: 3}) == {"nvidia.com/gpu": "24"}  # type: ignore[arg-type]
