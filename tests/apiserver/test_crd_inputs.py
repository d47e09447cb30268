"""Wrong input is refused by the API server itself, with the path, the value and what to do; and the Python models agree."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from apiserver.corpus import Body, Case, bad, good, named, transitions
from cluster.controlplane import ControlPlane
from cluster.kubectl import KubectlError
from disttrain.api.job import DistTrainJob
from disttrain.cli.files import WrongInput, read

_OF_THE_API_SERVER = re.compile(
    "|".join(
        (
            "some validation rules were not checked",
            "accessor error: .* is of the type",
            "should be a non-negative integer",
            "must be an object for an array of list-type map",
            "a lowercase RFC 1123 subdomain must consist of",
        )
    )
)
"""What it adds of its own to a cause: about the rest, the scale subresource, the keys of a list, the names of all objects."""


def causes(stderr: str) -> list[str]:
    """What the API server holds against an object, each `path: what`."""
    _, found, text = stderr.partition(" is invalid: ")
    listed = [part.strip() for part in re.split(r"\n\* |^\n?\* ", text)] if found else [stderr]
    return [cause for cause in listed if cause and not _OF_THE_API_SERVER.search(cause)]


def missing_value(body: Body, cause: str) -> str:
    """The scalar that a cause is about, if the cause does not say it; "" if it does, or is about no scalar."""
    if re.search(r"must be of type|Too long|unknown field|\([a-zA-Z.]+: .*\)$", cause):
        return ""  # the type, the bound or the name is all there is to say, or the value of another field is
    value: Any = body
    for part in re.findall(r"[^.\[\]]+", cause.partition(": ")[0]):
        match value:
            case dict():
                value = value.get(part)
            case list() if part.isdigit():
                value = value[int(part)]
            case _:
                return ""
    if value is None or isinstance(value, dict | list):
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return "" if text in cause or ascii(text)[1:-1] in cause else text


@pytest.mark.parametrize("case", named(bad()))
def test_the_api_server_refuses(control_plane: ControlPlane, tmp_path: Path, case: Case) -> None:
    with pytest.raises(KubectlError) as refused:
        control_plane.kubectl("create", "--dry-run=server", "-f", case.write(tmp_path))
    assert not case.unmatched(refused.value.stderr), refused.value.stderr
    found = causes(refused.value.stderr)
    assert len(found) == case.mistakes, "one mistake, one cause"
    assert [value for cause in found if (value := missing_value(case.body, cause))] == [], "the message has the value"


@pytest.mark.parametrize("case", named(bad()))
def test_lint_refuses_what_the_api_server_refuses(tmp_path: Path, case: Case) -> None:
    with pytest.raises(WrongInput) as refused:
        read(case.write(tmp_path))
    assert not case.unmatched(str(refused.value)), str(refused.value)
    found = refused.value.problems
    assert len(found) == case.mistakes, "one mistake, one line"
    if not any("…" in problem.text for problem in found):  # a long value is shown by its beginning
        assert [value for problem in found if (value := missing_value(case.body, problem.text))] == [], (
            "the message has the value"
        )


@pytest.mark.parametrize("file", good(), ids=lambda file: file.stem)
def test_good_input_is_accepted_and_read_alike(control_plane: ControlPlane, file: Path) -> None:
    stored = json.loads(control_plane.kubectl("create", "--dry-run=server", "-o", "json", "-f", str(file)))
    (found,) = read(str(file)).jobs
    # What the API server stored after defaulting and pruning is what the models make of the file.
    assert found.job.to_dict()["spec"] == stored["spec"]
    assert DistTrainJob.parse(stored).spec == found.job.spec


@pytest.mark.parametrize("case", named(transitions()))
def test_what_may_change_in_a_job_that_exists(control_plane: ControlPlane, case: Case) -> None:
    before = case.before
    assert before is not None
    control_plane.kubectl("create", "-f", "-", input=before)
    if "status" in before:  # as the operator had written it
        patch = json.dumps({"status": before["status"]})
        control_plane.kubectl(
            "patch", "dtj", before["metadata"]["name"], "--subresource=status", "--type=merge", "-p", patch
        )
    assert case.unmatched(_refusal(control_plane, case.body)) == []


@pytest.mark.parametrize("file", sorted(Path("examples").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_example_is_accepted(control_plane: ControlPlane, file: Path) -> None:
    control_plane.kubectl("create", "--dry-run=server", "-f", str(file))
    assert len(read(str(file)).jobs) == 1


def _refusal(control_plane: ControlPlane, body: dict[str, Any]) -> str:
    try:
        control_plane.kubectl("replace", "-f", "-", input=body)
    except KubectlError as error:
        return error.stderr
    return ""


def test_a_file_larger_than_etcd_takes_is_refused_by_both(control_plane: ControlPlane, tmp_path: Path) -> None:
    body = yaml.safe_load(good()[0].read_text())
    body["spec"]["trainer"]["config"] = {"text": "x" * 4_000_000}
    file = tmp_path / "huge.yaml"
    file.write_text(yaml.safe_dump(body))
    with pytest.raises(KubectlError, match=r"too large|larger than|limit"):
        control_plane.kubectl("create", "-f", str(file))
    with pytest.raises(WrongInput, match="larger than"):
        read(str(file))


def test_a_bomb_of_aliases_is_refused_by_both(control_plane: ControlPlane, tmp_path: Path) -> None:
    bomb = "\n".join(
        f"    l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" if n else "    l0: &l0 [x]" for n in range(10)
    )
    text = (
        good()[0]
        .read_text()
        .replace("  trainer: {command: [python, -m, mine]}", f"  trainer:\n   command: [x]\n   config:\n{bomb}")
    )
    file = tmp_path / "bomb.yaml"
    file.write_text(text)
    with pytest.raises(KubectlError, match="excessive aliasing"):
        control_plane.kubectl("create", "-f", str(file))
    with pytest.raises(WrongInput, match="aliases are counted"):
        read(str(file))


def test_a_status_in_the_file_is_ignored_by_the_api_server(control_plane: ControlPlane) -> None:
    body = yaml.safe_load(good()[0].read_text())
    body["metadata"]["name"] = "claims-to-be-complete"
    body["status"] = {"state": "Complete"}
    control_plane.kubectl("create", "-f", "-", input=body)
    assert "status" not in control_plane.get("disttrainjob", "claims-to-be-complete", namespace="default")


def test_an_old_object_reads_back_as_it_was_written(control_plane: ControlPlane) -> None:
    body = yaml.safe_load(good()[0].read_text())
    body["metadata"]["name"] = "read-back"
    control_plane.kubectl("create", "-f", "-", input=body)
    stored = control_plane.get("disttrainjob", "read-back", namespace="default")
    again = copy.deepcopy(stored)
    again["spec"] = DistTrainJob.parse(stored).to_dict()["spec"]
    control_plane.kubectl("replace", "-f", "-", input=again)
    assert control_plane.get("disttrainjob", "read-back", namespace="default")["metadata"]["generation"] == 1
