"""Small jobs for the simulations: every kind of training, limits that are soon reached."""

from typing import Any

from hypothesis import strategies as st

_MODEL = {"model": "a:b", "dataset": "a:c", "optimizer": {"name": "SGD", "learningRate": 0.1}, "epochs": 1}


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    """The body of a job."""
    kind = draw(st.sampled_from(("model", "server", "script", "command")))
    trainer = {
        "model": _MODEL,
        "server": _MODEL,
        "script": {"script": {"file": "t.py"}},
        "command": {"command": ["x"]},
    }[kind]
    spec: dict[str, Any] = {
        "strategy": {"type": "DataParallel"},
        "trainer": trainer,
        "worker": {"replicas": draw(st.integers(1, 3))},
        "runPolicy": {
            "backoffLimit": draw(st.integers(0, 3)),
            "backoffLimitReset": draw(st.sampled_from(("OnCheckpoint", "Never"))),
            "cleanPodPolicy": draw(st.sampled_from(("Running", "All", "None"))),
            "progressDeadlineSeconds": 60,
            "startupDeadlineSeconds": draw(st.sampled_from((120, 3600))),
        },
        "successPolicy": draw(st.sampled_from(("AllWorkers", "AnyWorker"))),
    }
    if kind == "server":
        spec["strategy"] = {"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}}
        spec["parameterServer"] = {"replicas": draw(st.integers(1, 2))}
    if kind in ("model", "server") and draw(st.booleans()):
        spec["network"] = {"tls": "Mutual"}
    if draw(st.booleans()):
        rules = [
            {
                "name": "gone",
                "onPodConditions": ["DisruptionTarget"],
                "action": "RestartReplica",
                "countTowardsLimit": False,
            }
        ]
        spec["failurePolicy"] = {
            "rules": rules,
            "defaultAction": draw(st.sampled_from(("RestartReplica", "RestartJob"))),
        }
    if draw(st.booleans()):
        action = draw(st.sampled_from(("Event", "RestartJob", "RollBack", "FailJob")))
        rule = {"name": "diverged", "metric": "Loss", "above": 20, "forSeconds": draw(st.sampled_from((0, 20)))}
        spec["health"] = {"rules": [rule | {"action": action if kind in ("model", "server") else "Event"}]}
        if action == "RollBack":
            spec["checkpoint"] = {"volume": {"persistentVolumeClaim": "c"}, "everySteps": 5}
    return {"metadata": {"name": "job", "namespace": "n", "uid": "u", "generation": 1}, "spec": spec}
