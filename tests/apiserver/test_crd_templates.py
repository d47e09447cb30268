"""Pod templates: judged alike in every role, and what is accepted makes pods that the API server takes, restricted ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from apiserver.corpus import files, wanted
from cluster.controlplane import ControlPlane
from cluster.kubectl import KubectlError
from disttrain.api.names import Role
from disttrain.cli.files import WrongInput, read
from disttrain.manifests import build_pod

WORKER = r"spec\.worker\.template\."


def moved(file: Path, role: str) -> dict[str, Any] | None:
    """The object of a file with the workers' template given to another role; None when the file has none."""
    body: dict[str, Any] = yaml.safe_load(file.read_text())
    spec = body.get("spec")
    if not isinstance(spec, dict) or not isinstance(spec.get("worker"), dict) or "template" not in spec["worker"]:
        return None
    spec.setdefault(role, {})["template"] = spec["worker"].pop("template")
    return body


def cases() -> list[Any]:
    return [
        pytest.param(file, role, id=f"{role}: {file.stem}")
        for file in files("bad")
        for role in ("master", "parameterServer")
        if moved(file, role) and any(want.pattern.startswith(WORKER) for want in wanted(file))
    ]


@pytest.mark.parametrize(("file", "role"), cases())
def test_a_template_is_judged_alike_in_every_role(
    control_plane: ControlPlane, tmp_path: Path, file: Path, role: str
) -> None:
    target = tmp_path / file.name
    wants = [want.pattern.replace(WORKER, rf"spec\.{role}\.template\.") for want in wanted(file)]
    target.write_text("".join(f"# want: {want}\n" for want in wants) + yaml.safe_dump(moved(file, role)))
    with pytest.raises(KubectlError) as refused:
        control_plane.kubectl("create", "--dry-run=server", "-f", str(target))
    with pytest.raises(WrongInput) as told:
        read(str(target))
    for message in (refused.value.stderr, str(told.value)):
        flat = " ".join(message.split())
        assert [want.pattern for want in wanted(target) if not want.search(flat)] == [], message


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


@pytest.mark.parametrize("file", files("good"), ids=lambda file: file.stem)
def test_what_is_accepted_makes_pods_that_are_accepted(
    control_plane: ControlPlane, restricted: str, file: Path
) -> None:
    (found,) = read(str(file)).jobs
    metadata = found.job.metadata.model_copy(update={"namespace": restricted, "uid": "some-uid"})
    job = found.job.model_copy(update={"metadata": metadata})
    roles = [role for role in Role if role is not Role.PARAMETER_SERVER or job.spec.parameter_server is not None]
    pods = [build_pod(job, role, 0, 1, trainer_image="trainer:1") for role in roles]
    control_plane.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", input=pods)
