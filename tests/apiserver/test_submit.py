"""`disttrain submit` against a real API server: what it creates, how it waits, and one line for what it cannot do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apiserver.kubelet_logs import KubeletLogs
from apiserver.operating import JOBS, Rest, eventually, job
from apiserver.playing import Kubelet
from apiserver.test_cli import Call, disttrain
from apiserver.test_logs import Cluster, node
from cluster.controlplane import ControlPlane

NAMESPACE = "submit"
CONFIG_MAPS = "api/v1/{}/configmaps"
CLAIMS = "api/v1/{}/persistentvolumeclaims"
CRDS = "apis/apiextensions.k8s.io/v1/customresourcedefinitions"
__all__ = ["disttrain", "node"]  # fixtures


def write(folder: Path, name: str, **spec: Any) -> None:
    """job.yaml with a claim beside the job, and code/."""
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "ckpt"}}
    claim["spec"] = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    spec = {"checkpoint": {"volume": {"persistentVolumeClaim": "ckpt"}}, **spec}
    (folder / "job.yaml").write_text("\n---\n".join(map(json.dumps, (claim, job(name, **spec)))))
    (folder / "code" / "mine").mkdir(parents=True, exist_ok=True)
    (folder / "code" / "train.py").write_text("import mine\n")
    (folder / "code" / "mine" / "net.py").write_text("def model(config): ...\n")


def test_a_job_is_created_with_its_code_which_it_owns_and_what_its_file_has(
    rest: Rest, disttrain: Call, tmp_path: Path
) -> None:
    write(tmp_path, "whole")
    command = ("submit", "job.yaml", "-n", NAMESPACE, "--code", "code")
    code, out, err = disttrain(*command)
    assert (code, err) == (0, "")
    assert out.startswith("whole: submitted to namespace submit; `disttrain logs -f whole -n submit` shows it, ")
    stored = rest.get(JOBS, "whole")
    config_map = rest.get(CONFIG_MAPS, stored["spec"]["trainer"]["code"]["configMap"])
    assert config_map["immutable"] is True
    assert (config_map["data"], list(config_map["binaryData"])) == ({"train.py": "import mine\n"}, ["packages.zip"])
    assert [owner["uid"] for owner in config_map["metadata"]["ownerReferences"]] == [stored["metadata"]["uid"]]
    assert rest.get(CLAIMS, "ckpt")["spec"]["resources"]["requests"]["storage"] == "1Gi"

    code, out, err = disttrain(*command)
    assert (code, out) == (7, "")
    assert err == (
        "disttrain: namespace submit has a DistTrainJob whole already: `disttrain cancel whole -n submit` deletes it, or give this one "
        "another metadata.name\n"
    )

    # Nothing collects the ConfigMap here: the next job of the name takes it over.
    assert disttrain("cancel", "whole", "-n", NAMESPACE)[0] == 0
    code, _, err = disttrain(*command)
    assert (code, err) == (0, "whole: PersistentVolumeClaim ckpt was there already and stays as it is\n")
    (owner,) = rest.get(CONFIG_MAPS, config_map["metadata"]["name"])["metadata"]["ownerReferences"]
    assert owner["uid"] == rest.get(JOBS, "whole")["metadata"]["uid"]


def test_what_a_cluster_refuses_is_one_line_with_an_exit_code_of_its_own_and_creates_nothing(
    control_plane: ControlPlane, rest: Rest, disttrain: Call, tmp_path: Path
) -> None:
    write(tmp_path, "refused")
    command = ("submit", "job.yaml", "--code", "code")
    for arguments, kubeconfig, expected in (
        (("-n", NAMESPACE), control_plane.kubeconfig_for("stranger"), (4, "you may not create the job in namespace")),
        (("-n", "nowhere"), None, (2, "there is no namespace nowhere: `kubectl create namespace nowhere` makes it")),
        (("-n", NAMESPACE), tmp_path / "missing", (3, "there is no kubeconfig at")),
    ):
        code, out, err = disttrain(*command, *arguments, kubeconfig=kubeconfig)
        assert (code, out, err.count("\n")) == (expected[0], "", 1), err
        assert expected[1] in err
    assert rest.find(JOBS, "refused") is None
    assert not [one for one in rest.list(CONFIG_MAPS) if one["metadata"]["name"].startswith("refused-")]


@pytest.fixture
def older_crd(rest: Rest) -> Iterator[None]:
    """A CRD that does not know spec.runPolicy.ttlSecondsAfterFinished."""
    name = "disttrainjobs.disttrain.dev"
    whole = rest.get(CRDS, name)["spec"]
    older = json.loads(json.dumps(whole))
    fields = older["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    del fields["runPolicy"]["properties"]["ttlSecondsAfterFinished"]
    rest.merge(f"{CRDS}/{name}", {"spec": older})
    try:
        yield
    finally:
        patch = [{"op": "replace", "path": "/spec", "value": whole}]
        rest("PATCH", f"{CRDS}/{name}", patch, kind="application/json-patch+json")
        body = job("restored", runPolicy={"ttlSecondsAfterFinished": 9})
        eventually(lambda: rest.create(f"{JOBS}?fieldValidation=Strict&dryRun=All", body), seconds=60)


def test_an_older_crd_is_named_with_the_field_that_it_does_not_know(
    rest: Rest, older_crd: None, disttrain: Call, tmp_path: Path
) -> None:
    write(tmp_path, "newer", runPolicy={"ttlSecondsAfterFinished": 9})

    def refused() -> str:
        code, _, err = disttrain("submit", "job.yaml", "-n", NAMESPACE)
        disttrain("cancel", "newer", "-n", NAMESPACE)  # of an API server that has not read its CRD again yet
        return err if code == 6 else ""

    err = eventually(refused, seconds=60)
    assert err.count("\n") == 1
    assert 'unknown field "spec.runPolicy.ttlSecondsAfterFinished"' in err
    assert "upgrade it (kubectl apply -k deploy/base)" in err


@pytest.fixture
def waiting(control_plane: ControlPlane, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    def start(name: str, *options: str) -> subprocess.Popen[str]:
        write(tmp_path, name)
        program = str(Path(sys.executable).with_name("disttrain"))
        command = [program, "submit", "job.yaml", "--wait", "-n", NAMESPACE, *options]
        environment = {**os.environ, "KUBECONFIG": str(control_plane.kubeconfig)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)  # type: ignore[call-overload]

    return start


def created(rest: Rest, name: str) -> Any:
    return eventually(lambda: rest.find(JOBS, name), seconds=60)


def status(rest: Rest, name: str, state: str, **fields: Any) -> None:
    rest.merge(f"{JOBS}/{name}/status", {"status": {"state": state, **fields}})


@pytest.mark.parametrize(("state", "code"), [("Complete", 0), ("Failed", 1)])
def test_waiting_shows_states_and_log_and_ends_with_the_job(
    rest: Rest, kubelet: Kubelet, node: KubeletLogs, waiting: Callable[..., Any], state: str, code: int
) -> None:
    name = state.lower()
    with waiting(name) as child:
        cluster = Cluster(rest, kubelet, node, name, created(rest, name))
        status(rest, name, "Starting")
        cluster.start("worker-0")
        cluster.print("worker-0")
        assert child.stdout.readline() == "[worker-0] worker-0 line 0\n"
        status(rest, name, "Training", training={"step": 3, "totalSteps": 9, "progressPercent": 33})
        lines = []
        while not lines or "Training" not in lines[-1]:
            lines.append(child.stderr.readline())
        assert lines[-1] == f"{name}: Training  3 of 9 (33%)\n"
        condition = {"type": state, "status": "True", "reason": "Why", "message": "because", "lastTransitionTime": NOW}
        cluster.print("worker-0")
        node.end(f"{name}-worker-0")
        kubelet.succeed(f"{name}-worker-0")
        status(rest, name, state, conditions=[condition])
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (code, "[worker-0] worker-0 line 1\n")
    assert f"\n{name}: {state}  Why: because\n" in "".join(["\n", err])


NOW = "2026-11-30T12:00:00Z"


def test_a_time_out_and_ctrl_c_leave_the_job_running_and_a_job_that_is_deleted_is_a_failure(
    rest: Rest, waiting: Callable[..., Any]
) -> None:
    with waiting("slow", "--timeout", "1s") as child:
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (2, "")
    assert err.splitlines()[-1] == (
        "slow: not at its end after 1s; it goes on: `disttrain logs -f slow -n submit` shows it, `disttrain cancel slow -n submit` ends it"
    )
    assert rest.find(JOBS, "slow") is not None

    with waiting("left") as child:
        assert child.stderr.readline().startswith(("left: submitted", "left: PersistentVolumeClaim"))
        eventually(lambda: "not seen by an operator yet" in child.stderr.readline())
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert (
        err
        == "left: it goes on: `disttrain logs -f left -n submit` shows it, `disttrain cancel left -n submit` ends it\n"
    )
    assert rest.find(JOBS, "left") is not None

    with waiting("gone") as child:
        created(rest, "gone")
        rest.delete(JOBS, "gone")
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err.splitlines()[-1]) == (1, "gone: it was deleted")
