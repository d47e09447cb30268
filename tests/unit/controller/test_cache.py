"""The cache: of three writers in no order, the newest version of an object wins."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from disttrain.api.names import API_VERSION, KIND, Role
from disttrain.controller.cache import Cache, Key, project_pod
from disttrain.plan.model import Phase


def pod(
    version: int, *, uid: str = "u1", owner: str = "job-uid", name: str = "digits-worker-0", **status: Any
) -> dict[str, Any]:
    reference = {"apiVersion": API_VERSION, "kind": KIND, "name": "digits", "uid": owner, "controller": True}
    return {
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": uid,
            "resourceVersion": str(version),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {
                "disttrain.dev/job-name": "digits",
                "disttrain.dev/role": "worker",
                "disttrain.dev/index": "0",
                "disttrain.dev/attempt": "1",
            },
            "ownerReferences": [reference] if owner else [],
        },
        "spec": {"containers": []},
        "status": {"phase": "Pending", **status},
    }


KEY = Key("default", "digits-worker-0")


def phase(cache: Cache) -> Phase | None:
    entry = cache.pods.get(KEY)
    return entry.value.view.phase if entry and entry.value.view else None


def test_older_version_that_comes_later_is_ignored() -> None:
    cache = Cache()
    assert cache.pods.put(pod(7, phase="Running"))
    assert cache.pods.put(pod(5, phase="Pending")) is None
    assert phase(cache) is Phase.RUNNING


def test_version_that_changes_nothing_we_keep_is_no_news() -> None:
    cache = Cache()
    assert cache.pods.put(pod(5))
    assert cache.pods.put(pod(6)) is None
    assert cache.pods.put(pod(7, phase="Running"))


def test_deleted_pod_does_not_come_back_with_a_late_event() -> None:
    cache = Cache()
    cache.pods.put(pod(5))
    assert cache.pods.drop(KEY, "u1")
    assert cache.pods.put(pod(6, phase="Running")) is None
    assert phase(cache) is None


def test_late_deletion_of_a_former_pod_leaves_its_successor() -> None:
    cache = Cache()
    cache.pods.put(pod(9, uid="u2"))
    assert cache.pods.drop(KEY, "u1") is None
    assert phase(cache) is Phase.PENDING


def test_list_finds_what_vanished_but_not_what_was_made_after_it() -> None:
    cache = Cache()
    cache.pods.put(pod(5, uid="old", name="digits-worker-0"))
    cache.pods.put(pod(20, uid="new", name="digits-worker-1"))
    assert [entry.uid for entry in cache.pods.vanished(set(), version=10)] == ["old"]


def test_pods_are_found_by_the_uid_of_their_job_and_not_by_its_name() -> None:
    cache = Cache()
    cache.pods.put(pod(5, owner="former"))
    assert list(cache.pods.owned_by("job-uid")) == []
    assert [entry.uid for entry in cache.pods.owned_by("former")] == ["u1"]
    cache.pods.drop(KEY, "u1")
    assert list(cache.pods.owned_by("former")) == []


def test_pod_whose_labels_were_changed_is_kept_without_a_view() -> None:
    body = pod(5)
    body["metadata"]["labels"]["disttrain.dev/index"] = "many"
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
