"""What a process can be handed: one string of its environment carries the configuration of the job."""

import os
import subprocess
import sys
from typing import Any

import pytest

from disttrain.api.names import Role
from disttrain.manifests import build_pod, cluster_addresses, too_large, training_environment
from unit.manifests.jobs import MODEL, PARAMETER_SERVER, job

CASES = [
    pytest.param({"trainer": {**MODEL, "config": {"a": "x" * 102_400}}}, "spec.trainer.config", id="config"),
    pytest.param(
        {"trainer": {**MODEL, "config": {"a": "ü" * 60_000}}}, "spec.trainer.config", id="bytes count, not characters"
    ),
    pytest.param({"trainer": {"command": ["x", *["\u20ac" * 4000] * 15]}}, "spec.trainer.command", id="command"),
    pytest.param(
        {"trainer": {"script": {"file": "a.py", "args": ["\u20ac" * 4000] * 15}}},
        "spec.trainer.script.args",
        id="script",
    ),
    pytest.param(
        {
            **PARAMETER_SERVER,
            "parameterServer": {"replicas": 1000},
            "trainer": {**MODEL, "config": {"a": "x" * 40_000}},
        },
        "spec.parameterServer.replicas",
        id="addresses of servers",
    ),
]


@pytest.mark.parametrize(("spec", "path"), CASES)
def test_the_largest_part_is_to_blame(spec: dict[str, Any], path: str) -> None:
    problem = too_large(job("a" * 40, **spec))
    assert problem is not None
    assert ".".join(problem.path) == path
    assert str(problem).startswith(f"{path}: the configuration of a training process has ")
    assert "at most 102400" in problem.message
    with pytest.raises(ValueError, match="the configuration of a training process has "):
        build_pod(job("a" * 40, **spec), Role.WORKER, 0, 1, trainer_image="t:1")


@pytest.mark.parametrize(
    "spec",
    [
        {"trainer": {**MODEL, "config": {"a": "x" * 100_000}}},
        {"trainer": {"command": ["x", *["y" * 4096] * 15]}},
        {**PARAMETER_SERVER, "parameterServer": {"replicas": 1000}},
    ],
)
def test_what_is_not_too_large_can_be_handed_over(spec: dict[str, Any]) -> None:
    each = job("a" * 40, **spec)
    assert too_large(each) is None
    environment = training_environment(
        each, Role.WORKER, 0, 2**31 - 1, cluster_addresses(each), metrics_port=1, termination_log="/t"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            "import os; print(len(os.environ['DISTTRAIN_JOB']))",
            *(each.spec.trainer.command or ()),
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == len(environment["DISTTRAIN_JOB"])
