"""Pod templates: judged alike in every role, and what is accepted makes pods that the API server takes, restricted ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest

from apiserver.corpus import Case, bad, good, named
from cluster.controlplane import ControlPlane
from cluster.kubectl import KubectlError
from disttrain.api.names import Role
from disttrain.api.status import CertificateStatus
from disttrain.cli.files import WrongInput, read
from disttrain.manifests import build_pod

WORKER = r"spec\.worker\.template\."


def moved(case: Case, role: str) -> Case | None:
    """A case about the workers' template with that template given to another role; None when it is about something else."""
    if not any(pattern.startswith(WORKER) for pattern in case.expected):
        return None
    body = copy.deepcopy(case.body)
    body["spec"].setdefault(role, {})["template"] = body["spec"]["worker"].pop("template")
    expected = tuple(pattern.replace(WORKER, rf"spec\.{role}\.template\.") for pattern in case.expected)
    return Case(f"{role}: {case.name}", body, expected)


def cases() -> list[Case]:
    return [found for case in bad() for role in ("master", "parameterServer") if (found := moved(case, role))]


@pytest.mark.parametrize("case", named(cases()))
def test_a_template_is_judged_alike_in_every_role(control_plane: ControlPlane, tmp_path: Path, case: Case) -> None:
    file = case.write(tmp_path)
    with pytest.raises(KubectlError) as refused:
        control_plane.kubectl("create", "--dry-run=server", "-f", file)
    assert not case.unmatched(refused.value.stderr), refused.value.stderr
    with pytest.raises(WrongInput) as refused:
        read(file)
    assert not case.unmatched(str(refused.value)), str(refused.value)


def test_every_input_about_a_template_takes_part() -> None:
    assert len(cases()) > 100


@pytest.fixture(scope="module")
def restricted(control_plane: ControlPlane) -> Iterator[str]:
    """A namespace whose pods must keep to the `restricted` standard."""
    priority = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "high"}, "value": 1}
    control_plane.kubectl("create", "-f", "-", input=priority)
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    with control_plane.namespace("templates", labels) as name:
        yield name
    control_plane.kubectl("delete", "priorityclass", "high")


@pytest.mark.parametrize("file", good(), ids=lambda file: file.stem)
def test_what_is_accepted_makes_pods_that_are_accepted(
    control_plane: ControlPlane, restricted: str, file: Path
) -> None:
    (found,) = read(str(file)).jobs
    metadata = found.job.metadata.model_copy(update={"namespace": restricted, "uid": "some-uid"})
    status = found.job.status.model_copy(update={"certificate": CertificateStatus(attempt=1, suffix="0" * 16)})
    job = found.job.model_copy(update={"metadata": metadata, "status": status})
    roles = [role for role in Role if role is not Role.PARAMETER_SERVER or job.spec.parameter_server is not None]
    pods = [build_pod(job, role, 0, 1, trainer_image="trainer:1") for role in roles]
    control_plane.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", input=pods)
