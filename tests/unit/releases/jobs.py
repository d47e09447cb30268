"""Jobs as this release stores them: `python -m unit.releases.jobs` (from tests/) writes them into the folder of its version.

Run it once for each release, and keep the folders of all releases: test_versions.py reads them with the operator of today.
"""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from disttrain import __version__
from disttrain.api import Termination
from disttrain.api.names import API_VERSION, KIND
from disttrain.api.runtime import TimeSpent
from disttrain.plan.model import DISRUPTED, Phase
from unit.plan.builders import MASTER, SERVER, Scene, make_job

FOLDER = Path(__file__).parent


def _body(scene: Scene) -> dict[str, Any]:
    """What the API server stores: the spec with every default, and the status as it is written."""
    parsed = scene.job
    metadata = {**scene.body["metadata"], "creationTimestamp": "2026-01-01T11:59:58Z", "resourceVersion": "4711"}
    return copy.deepcopy(
        {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": metadata,
            "spec": parsed.spec.to_dict(),
            "status": scene.status.to_dict() if scene.status.conditions else {},
        }
    )


def _rich() -> Scene:
    """A job of parameter servers that sets whatever can be set."""
    container = {"name": "trainer", "resources": {"limits": {"memory": "4Gi"}}, "env": [{"name": "A", "value": "b"}]}
    return (
        make_job()
        .servers(2, consistency="BoundedStaleness", maxStaleness=4)
        .spec(
            image="example.org/trainer:1",
            data={"volume": {"persistentVolumeClaim": "data", "path": "/data"}},
            checkpoint={"volume": {"persistentVolumeClaim": "ckpt"}, "everySteps": 50, "keep": 2},
            worker={"replicas": 2, "processesPerWorker": 2, "template": {"spec": {"containers": [container]}}},
            trainer={"config": {"layers": [1, 2]}, "seed": 7, "lastBatch": "Spread", "collate": "digits:collate"},
            observability={"statusIntervalSeconds": 2},
        )
        .run_policy(backoffLimit=3, ttlSecondsAfterFinished=864_000, activeDeadlineSeconds=8_640_000)
        .run_policy(recoveryDeadlineSeconds=86_400)
        .rules({"name": "again", "onExitCodes": [3], "action": "RestartReplica", "countTowardsLimit": False})
    )


def _trained() -> Scene:
    """It has trained, lost a server once, and trains again."""
    scene = _rich().training(step=40)
    checkpoint = {"step": 50, "time": scene.now + timedelta(seconds=30)}
    spent = TimeSpent(began=scene.now, starting_seconds=4.2, productive_seconds=50.5, stalled_seconds=3.1)
    numbers = {"goodput": spent, "loss": 0.1834, "samples_per_second": 5120.4, "epoch": 2, "max_staleness_seen": 3}
    scene.after(60).reports(60, last_checkpoint=checkpoint, **numbers).seen()
    scene.failed(1, SERVER, termination=Termination(message="no memory")).seen()
    scene.after(5).seen().all_run().seen()
    return scene.after(60).reports(80, last_checkpoint=checkpoint, evaluation={"accuracy": 0.9}, **numbers).seen()


def stored() -> dict[str, dict[str, Any]]:
    """The jobs by name."""
    running = _trained()
    finished = _trained().succeeded(0, 1).succeeded(0, role=MASTER).seen()
    failed = make_job().command().training().failed(0, code=1).seen()
    suspended = _trained().spec(suspend=True).seen()
    for name in list(suspended.pods):
        del suspended.pods[name]
    suspended.seen()
    waiting = make_job().training().node_falls_silent(1).seen().after(90).gone(1).seen()
    full = {"phase": Phase.PENDING, "reason": "Unschedulable", "message": "0/3 nodes are available"}
    waiting.change(1, **full).reports(10).seen()
    script = make_job().script().started()
    evicted = make_job().training()
    evicted.failed(1, code=143, conditions=frozenset({DISRUPTED}), disruption="EvictionByEvictionAPI").seen()
    evicted.after(30).seen()
    rule = {"name": "diverged", "metric": "Loss", "above": 20, "forSeconds": 0, "action": "RollBack"}
    rolled_back = _rich().spec(health={"rules": [rule]}).training(step=40)
    rolled_back.after(5).reports(41, loss=30.0).step()
    jobs = {
        "finished": finished,
        "failed": failed,
        "running": running,
        "suspended": suspended,
        "evicted": evicted,
        "waiting": waiting,
        "rolled-back": rolled_back,
        "script": script,
        "encrypted": make_job().spec(network={"tls": "Mutual"}).started().seen().all_run().seen(),
        "fresh": make_job(),
    }
    return {name: _body(scene) for name, scene in jobs.items()}


def load() -> dict[str, dict[str, Any]]:
    """The stored jobs of every release, by release and name."""
    files = sorted(FOLDER.glob("*/*.yaml"))
    return {f"{file.parent.name}/{file.stem}": yaml.safe_load(file.read_text()) for file in files}


if __name__ == "__main__":
    folder = FOLDER / __version__
    folder.mkdir(exist_ok=True)
    for name, body in stored().items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(body, sort_keys=False, width=120))
