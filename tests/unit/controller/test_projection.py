"""What is read of a pod's body."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from disttrain.api.names import Role
from disttrain.controller.projection import project_pod
from disttrain.plan.model import Phase, PodView, Trouble
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
        ("", "init container fetch (exit code 3): see its log with -c fetch"),
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


def test_sidecar_that_was_asked_to_end_is_not_taken_for_the_failure() -> None:
    statuses = [init_container("proxy", 143), init_container("fetch", 3)]
    body = pod(5, phase="Failed", initContainerStatuses=statuses, containerStatuses=[NEVER_RAN])
    body["spec"]["initContainers"] = [{"name": "proxy", "restartPolicy": "Always"}, {"name": "fetch"}]
    view = project_pod(body)
    assert view is not None
    assert (view.exit_code, view.message) == (None, "init container fetch (exit code 3): see its log with -c fetch")


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


def seen(body: dict[str, Any]) -> PodView:
    view = project_pod(body)
    assert view is not None
    return view


MOMENT = "2026-01-01T00:01:30Z"
TRAINS = {"name": "trainer", "ready": True, "state": {"running": {"startedAt": MOMENT}}}


def conditions(**statuses: str) -> list[dict[str, str]]:
    return [{"type": type_, "status": status, "lastTransitionTime": MOMENT} for type_, status in statuses.items()]


class TestTheTrainerDecides:
    """What other containers of the pod do is no part of the training."""

    @pytest.mark.parametrize("phase", ["Running", "Pending"])
    def test_pod_whose_trainer_runs_is_ready_whatever_a_sidecar_does(self, phase: str) -> None:
        waits = {
            "name": "ship",
            "ready": False,
            "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no x"}},
        }
        not_ready = conditions(Ready="False", ContainersReady="False")
        view = seen(pod(5, phase=phase, conditions=not_ready, containerStatuses=[waits, TRAINS]))
        assert (view.phase, view.ready, view.silent_since) == (Phase.RUNNING, True, None)
        assert view.ready_since == datetime(2026, 1, 1, 0, 1, 30, tzinfo=UTC)
        assert view.trouble == Trouble(container="ship", words="ImagePullBackOff: no x")
        assert view.reason == ""

    def test_pod_behind_a_readiness_gate_is_ready_and_its_node_is_not_silent(self) -> None:
        closed = conditions(Ready="False", ContainersReady="True")
        body = pod(5, phase="Running", conditions=closed, containerStatuses=[TRAINS])
        body["spec"]["readinessGates"] = [{"conditionType": "example.org/routed"}]
        assert (seen(body).ready, seen(body).silent_since) == (True, None)

    def test_pod_whose_trainer_is_not_ready_is_not_ready(self) -> None:
        body = pod(5, phase="Running", containerStatuses=[{**TRAINS, "ready": False}])
        assert not seen(body).ready

    def test_pod_that_another_container_failed_has_succeeded_when_its_trainer_has(self) -> None:
        done = {"name": "trainer", "state": {"terminated": {"exitCode": 0, "finishedAt": MOMENT}}}
        failed = {"name": "proxy", "state": {"terminated": {"exitCode": 1}}}
        view = seen(pod(5, phase="Failed", containerStatuses=[done, failed]))
        assert (view.phase, view.exit_code) == (Phase.SUCCEEDED, 0)

    @pytest.mark.parametrize(
        "status",
        [
            {"reason": "Evicted"},
            {"reason": "Terminated"},
            {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}]},
        ],
    )
    def test_pod_that_the_kubelet_ended_has_failed_though_its_program_obeyed_with_exit_code_0(
        self, status: Any
    ) -> None:
        done = {"name": "trainer", "state": {"terminated": {"exitCode": 0, "finishedAt": MOMENT}}}
        assert seen(pod(5, phase="Failed", containerStatuses=[done], **status)).phase is Phase.FAILED

    def test_pod_that_another_container_keeps_running_tells_how_its_trainer_ended(self) -> None:
        done = {"name": "trainer", "state": {"terminated": {"exitCode": 3, "finishedAt": MOMENT}}}
        view = seen(pod(5, phase="Running", containerStatuses=[done, {**TRAINS, "name": "proxy"}]))
        assert (view.phase, view.ready, view.exit_code) == (Phase.RUNNING, False, 3)
        assert view.finished == datetime(2026, 1, 1, 0, 1, 30, tzinfo=UTC)


ENDED = {"terminated": {"exitCode": 137, "reason": "OOMKilled", "finishedAt": MOMENT}}


class TestTroubleOfASidecar:
    @pytest.mark.parametrize(
        ("status", "words"),
        [
            pytest.param({"state": ENDED}, "failed with exit code 137 (OOMKilled)", id="it was killed for memory"),
            pytest.param(
                {"state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}}, "lastState": ENDED},
                "failed with exit code 137 (OOMKilled)",
                id="it waits to be tried again",
            ),
            pytest.param(
                {"state": {"waiting": {"reason": "CrashLoopBackOff"}}}, "keeps ending", id="it is unknown how it ended"
            ),
            pytest.param(
                {"state": {"waiting": {"reason": "ErrImagePull", "message": "not found"}}},
                "ErrImagePull: not found",
                id="it has no image",
            ),
            pytest.param({"state": {"waiting": {"reason": "PodInitializing"}}}, None, id="it is on its way"),
            pytest.param({"ready": True, "state": {"running": {"startedAt": MOMENT}}}, None, id="it is well"),
            pytest.param({"state": {"terminated": {"exitCode": 0}}}, None, id="it was done"),
        ],
    )
    @pytest.mark.parametrize("kind", ["initContainerStatuses", "containerStatuses"])
    def test_it_is_named(self, status: dict[str, Any], words: str | None, kind: str) -> None:
        view = seen(pod(5, **{"phase": "Running", "containerStatuses": [TRAINS], kind: [{"name": "ship", **status}]}))
        assert (view.trouble.words if view.trouble else None) == words

    def test_one_that_runs_again_is_trouble_for_ten_minutes(self) -> None:
        runs = {"name": "ship", "ready": True, "state": {"running": {"startedAt": MOMENT}}, "lastState": ENDED}
        trouble = seen(pod(5, phase="Running", initContainerStatuses=[runs])).trouble
        assert trouble is not None
        assert trouble.until == datetime(2026, 1, 1, 0, 11, 30, tzinfo=UTC)

    def test_one_that_does_not_become_ready_is_trouble_after_a_minute(self) -> None:
        runs = {"name": "ship", "ready": False, "state": {"running": {"startedAt": MOMENT}}}
        trouble = seen(pod(5, phase="Running", initContainerStatuses=[runs])).trouble
        assert trouble is not None
        assert (trouble.words, trouble.since) == (
            "runs, but does not become ready",
            datetime(2026, 1, 1, 0, 2, 30, tzinfo=UTC),
        )

    def test_one_that_keeps_the_trainer_from_starting_is_what_the_pod_waits_for(self) -> None:
        crashes = {"name": "ship", "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}}}
        first = {"name": "first", "state": {"waiting": {"reason": "PodInitializing"}}}
        view = seen(pod(5, initContainerStatuses=[first, crashes], containerStatuses=[NEVER_RAN]))
        assert (view.reason, view.message) == ("CrashLoopBackOff", "container ship: back-off 5m0s")


class TestSilentNode:
    """In a pod whose containers are ready, only the node controller says that it is not."""

    def test_pod_that_is_not_ready_though_its_containers_are_is_on_a_silent_node(self) -> None:
        lost = conditions(Ready="False", ContainersReady="True")
        view = seen(pod(5, phase="Running", conditions=lost, containerStatuses=[TRAINS]))
        assert view.silent_since == datetime(2026, 1, 1, 0, 1, 30, tzinfo=UTC)
        assert not view.ready

    def test_so_it_is_with_readiness_gates_that_are_open(self) -> None:
        lost = conditions(Ready="False", ContainersReady="True", **{"example.org/routed": "True"})
        body = pod(5, phase="Running", conditions=lost, containerStatuses=[TRAINS])
        body["spec"]["readinessGates"] = [{"conditionType": "example.org/routed"}]
        assert seen(body).silent_since is not None

    @pytest.mark.parametrize(
        ("phase", "statuses"),
        [
            ("Running", {"Ready": "True", "ContainersReady": "True"}),
            ("Running", {"Ready": "False", "ContainersReady": "False"}),
            ("Running", {"Ready": "False"}),
            ("Running", {}),
            ("Pending", {"Ready": "False", "ContainersReady": "True"}),
            ("Succeeded", {"Ready": "False", "ContainersReady": "True"}),
        ],
    )
    def test_any_other_pod_is_not(self, phase: str, statuses: dict[str, str]) -> None:
        assert seen(pod(5, phase=phase, conditions=conditions(**statuses))).silent_since is None
