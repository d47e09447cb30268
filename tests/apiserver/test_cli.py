"""`disttrain` against a real API server: with the rights of the user who calls it, and one line for what it cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from apiserver.operating import JOBS, Rest, job
from cluster.controlplane import ControlPlane

NAMESPACE = "cli"

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def disttrain(control_plane: ControlPlane, tmp_path: Path) -> Call:
    def call(*arguments: str, kubeconfig: Path | None = None) -> tuple[int, str, str]:
        environment = {**os.environ, "KUBECONFIG": str(kubeconfig or control_plane.kubeconfig)}
        program = Path(sys.executable).with_name("disttrain")
        done = subprocess.run(
            [program, *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return call


def test_a_job_is_listed_shown_suspended_resumed_scaled_and_cancelled(rest: Rest, disttrain: Call) -> None:
    rest.create(JOBS, job("mine", worker={"replicas": 2, "elastic": {"minReplicas": 1, "maxReplicas": 4}}))
    here = ("-n", NAMESPACE)
    code, out, _ = disttrain("ls", *here)
    assert (code, out.splitlines()[1].split()[:4]) == (0, ["mine", "-", "ParameterServer", "0/2"])
    assert [NAMESPACE, "mine"] in [line.split()[:2] for line in disttrain("ls", "-A")[1].splitlines()]
    assert json.loads(disttrain("ls", *here, "-o", "json")[1])["items"][0]["metadata"]["name"] == "mine"
    assert disttrain("status", "mine", *here)[1].startswith(f"{NAMESPACE}/mine  not seen by an operator yet")
    assert disttrain("suspend", "mine", *here)[0] == 0
    assert rest.get(JOBS, "mine")["spec"]["suspend"] is True
    assert disttrain("resume", "mine", *here)[0] == 0
    assert rest.get(JOBS, "mine")["spec"]["suspend"] is False
    assert disttrain("scale", "mine", "3", *here)[1] == "mine: 2 -> 3 workers\n"
    assert rest.get(JOBS, "mine")["spec"]["worker"]["replicas"] == 3
    assert "choose 1 to 4" in disttrain("scale", "mine", "5", *here)[2]
    assert disttrain("events", "mine", *here)[1].startswith("no events about mine")
    assert disttrain("cancel", "mine", *here)[0] == 0
    assert rest.find(JOBS, "mine") is None


def test_what_cannot_be_done_is_one_line_with_an_exit_code_of_its_own(
    control_plane: ControlPlane, rest: Rest, disttrain: Call, tmp_path: Path
) -> None:
    stranger = control_plane.kubeconfig_for("stranger")
    for arguments, kubeconfig, expected in (
        (("status", "none", "-n", NAMESPACE), None, (2, "has no DistTrainJob none")),
        (("ls", "--context", "nowhere"), None, (3, "nowhere")),
        (("ls",), tmp_path / "missing", (3, "there is no kubeconfig at")),
        (("ls", "-n", NAMESPACE), stranger, (4, "you may not list the jobs in namespace cli")),
        (("scale", "mine", "many"), None, (2, "'many' is no number of workers")),
    ):
        code, out, err = disttrain(*arguments, kubeconfig=kubeconfig)
        assert (code, out) == (expected[0], "")
        assert expected[1] in err
        assert err.count("\n") == 1, err


def test_a_name_that_no_job_can_have_is_refused_and_no_job_is_deleted(rest: Rest, disttrain: Call) -> None:
    rest.create(JOBS, job("kept"))
    for name in ("", "kept?x=y"):
        code, out, err = disttrain("cancel", "-n", NAMESPACE, "--", name)
        assert (code, out) == (2, "")
        assert err.startswith(f"disttrain: {name!r} is no name of a job")
        assert rest.find(JOBS, "kept") is not None


def test_doctor_says_what_a_cluster_lacks_and_what_a_user_may_not(
    control_plane: ControlPlane, rest: Rest, disttrain: Call
) -> None:
    code, out, _ = disttrain("doctor", "-n", NAMESPACE, "-o", "json")
    found = {(one["check"], one["level"]): one for one in json.loads(out)}
    assert code == 1  # there is no node
    assert found["CRD", "ok"]["text"] == "disttrainjobs.disttrain.dev v1alpha1, as this command knows it"
    assert found["permissions", "ok"]["text"] == f"all that the command needs in {NAMESPACE}"
    assert found["nodes", "missing"]["text"] == "none of 0 takes pods"
    assert found["storage", "warning"]["text"].startswith("no storage class")
    assert found["operator", "warning"]["mend"] == "kubectl apply --server-side -k deploy/base"
    code, out, _ = disttrain("doctor", "-n", NAMESPACE, kubeconfig=control_plane.kubeconfig_for("nobody"))
    assert code == 1
    assert f"you may not create disttrainjobs, get disttrainjobs, list disttrainjobs in {NAMESPACE}" in out
    assert "you may not get pods/log" in out
    assert "unknown nodes" in " ".join(out.split())
