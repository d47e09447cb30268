"""A job of a cluster in text: what a user reads when it waits, trains, and has failed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from disttrain.cli.status import events, table, tree, what_follows

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def job(name: str = "digits", *, created: str = "2026-01-01T11:50:00Z", **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "team", "uid": "u", "creationTimestamp": created},
        "spec": {
            "strategy": {"type": "ParameterServer"},
            "worker": {"replicas": 2},
            "checkpoint": {"volume": {"persistentVolumeClaim": "ckpt"}},
        },
        **({"status": status} if status else {}),
    }


def pod(role: str, index: int, phase: str = "Running", **status: Any) -> dict[str, Any]:
    short = {"parameter-server": "ps"}.get(role, role)
    return {
        "metadata": {
            "name": f"digits-{short}-{index}",
            "labels": {"disttrain.dev/role": role, "disttrain.dev/index": str(index)},
            "creationTimestamp": "2026-01-01T11:55:00Z",
        },
        "spec": {"nodeName": "node-1"} if phase != "Pending" else {},
        "status": {"phase": phase, "containerStatuses": [{"name": "trainer", "ready": phase == "Running"}], **status},
    }


TRAINING = {
    "step": 1250,
    "totalSteps": 4500,
    "progressPercent": 27,
    "epoch": 3,
    "loss": 0.1834,
    "samplesPerSecond": 5120.4,
    "etaSeconds": 41,
    "lastCheckpoint": {"step": 1200, "time": "2026-01-01T11:59:30Z"},
}


def test_the_table_has_the_columns_of_kubectl_and_a_line_a_job() -> None:
    trains = job(state="Training", training=TRAINING, worker={"readyReplicas": 2}, restarts={"total": 3})
    lines = table([trains, job("new", created="2026-01-01T11:59:55Z")], now=NOW).splitlines()
    assert lines[0].split()[:4] == ["NAME", "STATE", "STRATEGY", "WORKERS"]
    assert lines[1].split() == [
        "digits",
        "Training",
        "ParameterServer",
        "2/2",
        "1250/4500",
        "27%",
        "0.1834",
        "5120",
        "3",
        "0:41",
        "10m",
    ]
    assert lines[2].split() == ["new", "-", "ParameterServer", "0/2", "-", "-", "-", "-", "0", "-", "5s"]
    assert table([trains], with_namespace=True, now=NOW).splitlines()[1].startswith("team")


def test_a_job_that_trains_shows_where_it_is_and_what_it_lost() -> None:
    last = {"role": "Worker", "index": 1, "reason": "OOMKilled", "exitCode": 137, "time": "2026-01-01T11:58:00Z"}
    text = tree(
        job(state="Training", training=TRAINING, restarts={"total": 1, "last": last}),
        [pod("worker", 10), pod("worker", 2), pod("master", 0), pod("parameter-server", 0)],
        now=NOW,
    )
    assert "step        1250 of 4500 (27%), epoch 3, loss 0.1834, 5120 samples/s, ETA 0:41" in text
    assert "restarts    1; 2m ago Worker 1: OOMKilled, exit code 137" in text
    assert "checkpoint  step 1200, 30s ago" in text
    names = [line.split()[1] for line in text.splitlines() if "digits-" in line]
    assert names == ["digits-master-0", "digits-ps-0", "digits-worker-2", "digits-worker-10"]


def test_a_job_that_waits_says_why() -> None:
    conditions = [
        {"type": "Valid", "status": "True", "reason": "Accepted"},
        {"type": "Scheduled", "status": "False", "reason": "Unschedulable", "message": "digits-worker-1: 0/3 nodes"},
        {"type": "Ready", "status": "False", "reason": "Starting", "message": "Waiting for pod digits-worker-1"},
    ]
    unplaced = {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}]}
    text = tree(job(state="Scheduling", conditions=conditions), [pod("worker", 1, "Pending", **unplaced)], now=NOW)
    assert "waits       Unschedulable: digits-worker-1: 0/3 nodes" in text
    assert "0/3 nodes are available" in text.splitlines()[-1]
    assert "Starting" not in text


def test_a_job_that_has_failed_says_how_and_one_that_is_new_that_no_operator_saw_it() -> None:
    failed = {"type": "Failed", "status": "True", "reason": "NaNLoss", "message": "Pod digits-worker-0 failed"}
    assert "failed      NaNLoss: Pod digits-worker-0 failed" in tree(
        job(state="Failed", conditions=[failed]), [], now=NOW
    )
    assert "not seen by an operator yet" in tree(job(), [], now=NOW).splitlines()[0]


def test_where_the_model_is() -> None:
    training = {**TRAINING, "model": {"path": "/checkpoints/digits-u/model.safetensors"}}
    assert "/checkpoints/digits-u/model.safetensors on claim ckpt" in tree(job(training=training), [], now=NOW)


def test_control_characters_of_a_message_do_not_reach_the_terminal() -> None:
    found = [
        {
            "metadata": {},
            "type": "Warning",
            "reason": "Failed",
            "message": "red \x1b[31m\n\u202eand more",
            "count": 3,
            "lastTimestamp": "2026-01-01T11:00:00Z",
            "involvedObject": {"kind": "Pod", "name": "digits-worker-0"},
        }
    ]
    line = events(found, now=NOW).splitlines()[1]
    assert line.split() == ["60m", "Warning", "pod/digits-worker-0", "Failed", "red", "[31m", "and", "more", "(x3)"]
    assert line.isprintable()


FULL: dict[str, Any] = {
    "state": "Restarting",
    "training": {**TRAINING, "model": {"path": "m"}, "values": {"a": 1.0}, "evaluation": {"b": 2}},
    "worker": {"readyReplicas": 2, "targetReplicas": 3, "room": {"workers": 2, "probing": True}},
    "restarts": {"total": 1, "last": {"role": "Worker", "index": 1, "exitCode": 137, "time": "2026-01-01T11:58:00Z"}},
    "conditions": [{"type": "Scheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}],
}


def with_one_value_of_another_type(body: Any) -> Iterator[Any]:
    """Copies of a value in which one part, at any depth, is of another type than it should be."""
    yield from (None, "text", 7, True, ["x"], [None], {"k": "v"})
    for key in body if isinstance(body, dict) else range(len(body)) if isinstance(body, list) else ():
        for other in with_one_value_of_another_type(body[key]):
            changed = copy.copy(body)
            changed[key] = other
            yield changed


def test_a_stored_job_in_which_any_field_has_another_type_is_shown() -> None:
    stored = job(**FULL)
    for part in ("spec", "status"):
        for strange in with_one_value_of_another_type(stored[part]):
            body = {**stored, part: strange}
            assert tree(body, [], now=NOW).startswith("team/digits  ")
            assert table([body], now=NOW).splitlines()[1].startswith("digits ")


def test_control_characters_of_a_state_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in tree(job(state="\x1b[31m"), [], now=NOW)


def test_a_job_that_has_ended_is_neither_suspended_nor_resumed() -> None:
    assert what_follows(job(state="Complete"), suspended=True) == "it is Complete, and stays so"
    assert what_follows(job(state="Failed"), suspended=False) == "it is Failed, and stays so"
    assert what_follows(job(), suspended=True) == "it takes a checkpoint, and its pods end"
    assert what_follows(job(state="Suspended"), suspended=False) == "it goes on where it was"
