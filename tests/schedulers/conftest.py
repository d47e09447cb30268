"""One control plane with eight fake nodes, of which each holds one pod, and one gang scheduler at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from apiserver.operating import JOBS, Operator, Rest, eventually
from cluster.controlplane import ControlPlane
from cluster.programs import require
from schedulers.projects import PROJECTS, Project

NAMESPACE = "gangs"
_RUNS = itertools.count(1)
"""A scheduler may be set up twice, and an operator takes its port from a log of its own."""


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    require("apiserver")
    with ControlPlane(controllers=True) as control_plane:
        control_plane.kubectl("apply", "--server-side", "-f", "crds/disttrainjobs.yaml")
        control_plane.kubectl("create", "namespace", NAMESPACE)
        eventually(lambda: Rest(control_plane)("GET", JOBS))
        control_plane.add_fake_nodes(8, cpu="1", memory="8Gi", pods=10)
        yield control_plane


@pytest.fixture(scope="session")
def rest(control_plane: ControlPlane) -> Rest:
    return Rest(control_plane, NAMESPACE)


@pytest.fixture(scope="module", params=PROJECTS, ids=lambda project: project.label)
def project(control_plane: ControlPlane, rest: Rest, request: pytest.FixtureRequest) -> Iterator[Project]:
    """The gang scheduler that runs, and the operator that asks it."""
    project: Project = request.param
    require(project.needs)
    project.install(control_plane)
    eventually(lambda: rest("GET", project.groups)["kind"] == "PodGroupList")
    flags = (f"--namespaces={NAMESPACE}", "--progress=Pod", "--resync-seconds=1")
    with (
        project.running(control_plane),
        Operator(control_plane, *flags, name=f"operator-{project.label}-{next(_RUNS)}"),
    ):
        yield project
