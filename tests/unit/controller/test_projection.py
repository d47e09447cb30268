"""What is read of a pod's body."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from disttrain.api.names import Role
from disttrain.controller.projection import project_pod
from unit.controller.bodies import pod


@pytest.mark.parametrize(
    ("label", "value"),
    [
        pytest.param("disttrain.dev/index", "many", id="no number"),
        pytest.param("disttrain.dev/index", "1", id="the place of another"),
        pytest.param("disttrain.dev/role", "master", id="the role of another"),
        pytest.param("disttrain.dev/job-name", "letters", id="another job's"),
    ],
)
def test_pod_whose_labels_were_changed_has_no_view(label: str, value: str) -> None:
    body = pod(5)
    body["metadata"]["labels"][label] = value
    assert project_pod(body) is None


@pytest.mark.parametrize(
    ("status", "reason", "exit_code"),
    [
        pytest.param(
            {
                "containerStatuses": [
                    {"name": "trainer", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
                ]
            },
            "OOMKilled",
            137,
            id="container killed for memory",
        ),
        pytest.param(
            {"reason": "Evicted", "message": "low on memory"}, "Evicted", None, id="pod evicted before it ran"
        ),
        pytest.param(
            {"containerStatuses": [{"name": "trainer", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]},
            "ImagePullBackOff",
            None,
            id="image cannot be pulled",
        ),
        pytest.param(
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]},
            "Unschedulable",
            None,
            id="no node",
        ),
    ],
)
def test_reason_of_a_pod_is_the_one_that_says_most(status: dict[str, Any], reason: str, exit_code: int | None) -> None:
    view = project_pod(pod(5, **status))
    assert view is not None
    assert (view.reason, view.exit_code, view.role) == (reason, exit_code, Role.WORKER)


def test_termination_message_is_read() -> None:
    terminated = {
        "exitCode": 1,
        "reason": "Error",
        "finishedAt": "2026-01-01T00:00:05Z",
        "message": '{"message": "boom"}',
    }
    view = project_pod(
        pod(5, phase="Failed", containerStatuses=[{"name": "trainer", "state": {"terminated": terminated}}])
    )
    assert view is not None
    assert view.termination.message == "boom"
    assert view.finished is not None


def test_deleted_pod_tells_when_its_grace_period_is_over() -> None:
    body = pod(5, phase="Running")
    body["metadata"] |= {"deletionTimestamp": "2026-01-01T00:01:30Z", "deletionGracePeriodSeconds": 60}
    view = project_pod(body)
    assert view
    assert (view.deleting, view.deletion_deadline) == (True, datetime(2026, 1, 1, 0, 1, 30, tzinfo=UTC))


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        ('exec: "nowhere": executable file not found in $PATH: unknown', 127),
        ("exec /opt/train.sh: no such file or directory", 127),
        ('exec: "/etc/passwd": permission denied: unknown', 126),
        ("error mounting /data: no such file or directory", 128),
        (
            'unable to retrieve OCI runtime error: exec: "nvidia-container-runtime": executable file not found in $PATH',
            128,
        ),
        ("error running createRuntime hook #0: fork/exec /usr/bin/nvidia-hook: no such file or directory", 128),
    ],
)
def test_program_that_could_not_be_started_has_the_exit_code_that_a_shell_gives_it(words: str, exit_code: int) -> None:
    terminated = {"exitCode": 128, "reason": "StartError", "message": f"OCI runtime create failed: {words}"}
    view = project_pod(
        pod(5, phase="Failed", containerStatuses=[{"name": "trainer", "state": {"terminated": terminated}}])
    )
    assert view is not None
    assert view.exit_code == exit_code


def init_container(name: str, code: int, **ended: Any) -> dict[str, Any]:
    terminated = {"exitCode": code, "reason": "Error" if code else "Completed", **ended}
    return {"name": name, "state": {"terminated": {"finishedAt": "2026-01-01T00:00:05Z", **terminated}}}


NEVER_RAN = {"name": "trainer", "state": {"waiting": {"reason": "PodInitializing"}}}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("no such host", "init container fetch (exit code 3): no such host"),
        ("", "init container fetch (exit code 3): its log is that of -c fetch"),
    ],
)
def test_init_container_that_failed_the_pod_is_named_and_its_exit_code_is_not_taken_for_the_trainers(
    message: str, words: str
) -> None:
    statuses = [init_container("prepare", 0), init_container("fetch", 3, message=message), init_container("later", 4)]
    view = project_pod(pod(5, phase="Failed", initContainerStatuses=statuses, containerStatuses=[NEVER_RAN]))
    assert view is not None
    assert (view.exit_code, view.reason, view.message) == (None, "Error", words)
    assert view.finished == datetime(2026, 1, 1, 0, 0, 5, tzinfo=UTC)
    assert view.termination.message == ""


def test_sidecar_that_was_told_to_end_is_not_taken_for_the_failure() -> None:
    statuses = [init_container("proxy", 143), init_container("fetch", 3)]
    body = pod(5, phase="Failed", initContainerStatuses=statuses, containerStatuses=[NEVER_RAN])
    body["spec"]["initContainers"] = [{"name": "proxy", "restartPolicy": "Always"}, {"name": "fetch"}]
    view = project_pod(body)
    assert view is not None
    assert (view.exit_code, view.message) == (None, "init container fetch (exit code 3): its log is that of -c fetch")


def test_exit_code_of_the_trainer_stands_above_that_of_an_init_container() -> None:
    trainer = {"name": "trainer", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    view = project_pod(
        pod(5, phase="Failed", initContainerStatuses=[init_container("fetch", 3)], containerStatuses=[trainer])
    )
    assert view is not None
    assert (view.exit_code, view.reason) == (137, "OOMKilled")


def test_pod_that_waits_has_not_failed_with_the_last_try_of_a_sidecar() -> None:
    view = project_pod(pod(5, initContainerStatuses=[init_container("proxy", 1)], containerStatuses=[NEVER_RAN]))
    assert view is not None
    assert (view.exit_code, view.finished, view.reason) == (None, None, "PodInitializing")


def test_ready_pod_tells_since_when() -> None:
    ready = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:01:30Z"}
    view = project_pod(pod(5, phase="Running", conditions=[ready]))
    assert view is not None
    assert view.ready_since == datetime(2026, 1, 1, 0, 1, 30, tzinfo=UTC)
    view = project_pod(pod(5, phase="Running", conditions=[{**ready, "status": "False"}]))
    assert view is not None
    assert view.ready_since is None
