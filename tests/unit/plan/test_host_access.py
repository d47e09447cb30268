"""What reaches into a node gets no pods, unless the operator may grant it."""

from dataclasses import replace
from typing import Any

import pytest

from disttrain.plan import decide
from disttrain.plan.host_access import asked_for
from disttrain.plan.model import CreatePod
from unit.plan.builders import Scene, make_job


def template(owner: str, **pod: Any) -> Scene:
    scene = make_job().servers(1)
    return scene.spec(**{owner: {**scene.body["spec"].get(owner, {}), "template": {"spec": pod}}})


HOST_PATH = {"volumes": [{"name": "a", "emptyDir": {}}, {"name": "b", "hostPath": {"path": "/"}}]}
HOST_PORT = {"initContainers": [{"name": "a", "image": "a:1", "ports": [{"containerPort": 1, "hostPort": 1}]}]}


@pytest.mark.parametrize(
    ("owner", "pod", "field"),
    [
        ("worker", {"hostNetwork": True}, "hostNetwork"),
        ("worker", {"hostPID": True}, "hostPID"),
        ("master", {"hostIPC": True}, "hostIPC"),
        ("parameterServer", {"hostUsers": True}, "hostUsers"),
        ("worker", {"nodeName": "control-plane-1"}, "nodeName"),
        ("worker", HOST_PATH, "volumes[1].hostPath"),
        ("worker", HOST_PORT, "initContainers[0].ports"),
    ],
)
def test_a_template_that_reaches_into_the_node_gets_no_pods(owner: str, pod: dict[str, Any], field: str) -> None:
    scene = template(owner, **pod)
    plan = scene.step()
    assert plan.actions == ()
    assert scene.says("Valid") == ("False", "TemplateNotAllowed")
    message = scene.condition("Valid").message
    assert f"{owner}.template.spec.{field};" in message
    assert "--allow-host-access" in message
    assert [event.reason for event in plan.events] == ["TemplateNotAllowed"]
    granted = decide(replace(template(owner, **pod).snapshot, allows_host_access=True))
    assert any(isinstance(action, CreatePod) for action in granted.actions)


@pytest.mark.parametrize(
    "pod",
    [
        {},
        {"hostNetwork": False, "hostUsers": False, "nodeName": ""},  # user namespaces shut a pod off from its node
        {"volumes": [{"name": "a", "secret": {"secretName": "a"}}, {"name": "b", "hostPath": None}]},
        {"initContainers": [{"name": "a", "image": "a:1", "ports": [{"containerPort": 1}]}]},
    ],
)
def test_a_template_that_does_not_is_granted(pod: dict[str, Any]) -> None:
    assert asked_for(template("worker", **pod).job.spec) == ()


def test_pods_that_run_are_left_alone_and_those_that_end_get_no_successors() -> None:
    """Such as those that an operator of an earlier release has made."""
    scene = template("worker", hostNetwork=True)
    for action in decide(replace(scene.snapshot, allows_host_access=True)).actions:
        scene.carry_out(action)
    before = dict(scene.pods)
    plan = scene.step()
    assert (plan.actions, scene.pods) == ((), before)
