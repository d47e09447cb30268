"""One control plane for all tests of this folder; each test takes names of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from apiserver.operating import JOBS, Rest, eventually
from cluster.controlplane import ControlPlane
from cluster.programs import require


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    require("apiserver")
    # As on OpenShift: who names an owner that may not go before it needs a right for that.
    flags = ["--enable-admission-plugins=OwnerReferencesPermissionEnforcement"]
    with ControlPlane(api_server_flags=flags) as control_plane:
        control_plane.kubectl("apply", "--server-side", "-f", "crds/disttrainjobs.yaml")
        eventually(lambda: Rest(control_plane)("GET", JOBS))
        yield control_plane
