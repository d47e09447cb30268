"""Gangs under the schedulers that place them, on fake nodes: each test under each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from apiserver.operating import JOBS, PODS, Rest, eventually, job, pod_names
from cluster.controlplane import ControlPlane
from schedulers.projects import GANG_SCHEDULERS, VOLCANO_PROJECT, Project

SECONDS = 60
"""Until a scheduler has looked again at pods that it has refused: its back-off is ten seconds at most."""
TEMPLATE = {"spec": {"containers": [{"name": "trainer", "resources": {"requests": {"cpu": "1"}}}]}}
"""Each pod asks for a whole node."""


@contextlib.contextmanager
def gang(rest: Rest, project: Project, name: str, *, workers: int, timeout: int = 600) -> Iterator[None]:
    """A job of a master, a server and these workers; with its pods it is gone after the block."""
    body = job(
        name,
        master={"template": TEMPLATE},
        parameterServer={"replicas": 1, "template": TEMPLATE},
        worker={"replicas": workers, "template": TEMPLATE},
        scheduling={"gang": project.gang, "timeoutSeconds": timeout},
    )
    rest.create(JOBS, body)
    try:
        yield
    finally:
        if rest.find(JOBS, name) is not None:
            rest.delete(JOBS, name)
        eventually(lambda: pods(rest, name) == [], seconds=SECONDS)


@contextlib.contextmanager
def closed(control_plane: ControlPlane, node: str) -> Iterator[None]:
    """No new pod gets this node."""
    control_plane.kubectl("cordon", node)
    try:
        yield
    finally:
        control_plane.kubectl("uncordon", node)


def pods(rest: Rest, name: str) -> list[Any]:
    return rest.list(PODS, f"disttrain.dev/job-name={name}")


def placed(rest: Rest, name: str) -> dict[str, str]:
    """The node of each pod that has one."""
    return {pod["metadata"]["name"]: node for pod in pods(rest, name) if (node := pod["spec"].get("nodeName"))}


def scheduled(rest: Rest, name: str) -> Any:
    conditions = rest.get(JOBS, name)["status"]["conditions"]
    return next(one for one in conditions if one["type"] == "Scheduled")


def given_back(rest: Rest, project: Project, name: str, words: str) -> None:
    """The job holds nothing after its time-out, which counts nowhere, and says why."""
    eventually(lambda: scheduled(rest, name)["reason"] == "GangTimedOut", seconds=SECONDS)
    eventually(lambda: (pods(rest, name), rest.find(project.groups, name)) == ([], None), seconds=SECONDS)
    status = rest.get(JOBS, name)["status"]
    assert status.get("restarts", {}).get("countedTowardsLimit", 0) == 0
    assert scheduled(rest, name)["reason"] == "GangTimedOut"
    assert words in scheduled(rest, name)["message"]


def test_gang_that_fits_is_placed_whole(rest: Rest, project: Project) -> None:
    with gang(rest, project, "fits", workers=6):
        eventually(lambda: sorted(placed(rest, "fits")) == pod_names("fits", workers=6), seconds=SECONDS)
        assert len(set(placed(rest, "fits").values())) == 8
        eventually(lambda: scheduled(rest, "fits")["status"] == "True")
        assert rest.get(project.groups, "fits")["spec"]["minResources"] == {"cpu": "8"}


def test_gang_of_8_on_7_places_holds_nothing_after_the_time_out(
    control_plane: ControlPlane, rest: Rest, project: Project
) -> None:
    with closed(control_plane, "fake-7"), gang(rest, project, "eight", workers=6, timeout=10):
        given_back(rest, project, "eight", f"{project.placed} of 8 placed; eight-")


def test_gang_that_lost_a_pod_and_finds_no_other_node_gives_all_back(
    control_plane: ControlPlane, rest: Rest, project: Project
) -> None:
    with gang(rest, project, "loses", workers=6, timeout=10):
        lost = "loses-worker-5"
        eventually(lambda: len(placed(rest, "loses")) == 8, seconds=SECONDS)
        eventually(lambda: scheduled(rest, "loses")["status"] == "True")
        with closed(control_plane, placed(rest, "loses")[lost]):
            rest.delete(PODS, lost)
            eventually(
                lambda: scheduled(rest, "loses")["message"].startswith(f"7 of 8 placed; {lost}: "), seconds=SECONDS
            )
            given_back(rest, project, "loses", f"7 of 8 placed; {lost}: ")


@pytest.mark.parametrize("project", GANG_SCHEDULERS, indirect=True, ids=lambda project: project.label)
def test_of_two_gangs_that_each_need_5_of_8_places_one_is_placed_whole(rest: Rest, project: Project) -> None:
    with gang(rest, project, "one", workers=3), gang(rest, project, "two", workers=3):
        eventually(lambda: sorted(len(placed(rest, name)) for name in ("one", "two")) == [0, 5], seconds=SECONDS)


# Not Coscheduling: in v0.33.5 a pod that leaves wakes no gang that it has refused.
@pytest.mark.parametrize("project", [VOLCANO_PROJECT], indirect=True, ids=lambda project: project.label)
def test_nodes_that_a_gang_leaves_go_to_one_that_waits(rest: Rest, project: Project) -> None:
    with gang(rest, project, "leaves", workers=3):
        eventually(lambda: len(placed(rest, "leaves")) == 5, seconds=SECONDS)
        with gang(rest, project, "waits", workers=3):
            eventually(lambda: scheduled(rest, "waits")["reason"] == "WaitingForGang")
            rest.delete(JOBS, "leaves")
            eventually(lambda: len(placed(rest, "waits")) == 5, seconds=SECONDS)
