"""Deletion, with the garbage collector at work: nothing of a job remains, the operator there or not.

The collector looks for new kinds every 30 s only. Here it starts with the kind known, as on a cluster where the CRD is older than that.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from apiserver.operating import JOBS, PODS, POLICIES, SECRETS, SERVICES, Operator, Rest, eventually, job, pod_names
from cluster.controlplane import ControlPlane
from cluster.programs import require


@pytest.fixture(scope="module")
def collecting() -> Iterator[ControlPlane]:
    require("apiserver")
    with ControlPlane(controllers=True) as control_plane:
        control_plane.kubectl("apply", "--server-side", "-f", "crds/disttrainjobs.yaml")
        eventually(lambda: Rest(control_plane)("GET", JOBS))
        control_plane.controller_manager.stop()
        control_plane.controller_manager.start()
        yield control_plane


@pytest.mark.timeout(300)
@pytest.mark.parametrize("there", [True, False], ids=["with the operator", "without it"])
def test_deleted_job_leaves_nothing(collecting: ControlPlane, *, there: bool) -> None:
    rest = Rest(collecting)
    with Operator(collecting, "--progress=Pod", name=f"operator-{there}") as operator:
        rest.create(JOBS, job("ended", network={"tls": "Mutual"}))
        eventually(lambda: sorted(pod["metadata"]["name"] for pod in rest.list(PODS)) == pod_names("ended"))
        if not there:
            operator.kill()
        rest.delete(JOBS, "ended")
        selector = "disttrain.dev/job-name=ended"
        eventually(
            lambda: not any(rest.list(path, selector) for path in (PODS, SERVICES, POLICIES, SECRETS)), seconds=100
        )
        if there:
            # What was deleted with its job is not made again by a pass that was late.
            rest.create(JOBS, job("later"))
            eventually(lambda: len(rest.list(PODS)) == len(pod_names("later")))
            assert rest.list(PODS, selector) == []
            rest.delete(JOBS, "later")
            eventually(lambda: not rest.list(PODS), seconds=100)
