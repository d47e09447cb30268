"""One control plane for all tests of this folder; each test takes names of its own."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from apiserver.operating import JOBS, Rest, eventually
from apiserver.playing import Kubelet, Master
from cluster import runs
from cluster.controlplane import ControlPlane
from cluster.programs import require


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed keeps the logs of its control plane, the operators' among them: the session's own goes on, and would throw
    them away."""
    report = yield
    if report.failed:
        for used in getattr(item, "funcargs", {}).values():
            if isinstance(used, ControlPlane):
                kept = runs.keep_logs(used.folder, f"{item.nodeid} failed")
                report.sections.append(("the logs of API server and operators", str(kept)))
    return report


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    require("apiserver")
    # As on OpenShift: who names an owner that may not go before it needs a right for that.
    flags = ["--enable-admission-plugins=OwnerReferencesPermissionEnforcement"]
    with ControlPlane(api_server_flags=flags) as control_plane:
        control_plane.kubectl("apply", "--server-side", "-f", "crds/disttrainjobs.yaml")
        eventually(lambda: Rest(control_plane)("GET", JOBS))
        yield control_plane


@pytest.fixture(scope="module")
def rest(control_plane: ControlPlane, request: pytest.FixtureRequest) -> Rest:
    """Requests about the namespace that the module names, which is made."""
    namespace = request.module.NAMESPACE
    control_plane.kubectl("create", "namespace", namespace)
    return Rest(control_plane, namespace)


@pytest.fixture
def kubelet(rest: Rest) -> Kubelet:
    return Kubelet(rest)


@pytest.fixture
def master() -> Iterator[Master]:
    with Master() as master:
        yield master
