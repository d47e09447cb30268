"""A Secret that a run has leaves nothing in what it writes: output, logs, history, status, metrics, checkpoints, command lines."""

from __future__ import annotations

import base64
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cluster.processes import wait_for
from local_runs.command import Started, children, environment_of

CANARY = "canary-7f3a9c51d2"
CODE = f"""
import os
import threading
from pathlib import Path

from disttrain_trainer.examples import digits


def model(config):
    assert os.environ["NAMED"] == "{CANARY[:6]}" + "{CANARY[6:]}"
    return digits.model(config)


def dataset(config, split):
    Path(f"here-{{os.getpid()}}").touch()
    while not Path("go").exists():
        threading.Event().wait(0.01)
    return digits.dataset(config, split)
"""
JOB = f"""
apiVersion: disttrain.dev/v1alpha1
kind: DistTrainJob
metadata: {{name: kept}}
spec:
  strategy: {{type: ParameterServer, parameterServer: {{consistency: Sync}}}}
  trainer:
    model: mine:model
    dataset: mine:dataset
    optimizer: {{name: SGD, learningRate: 0.1}}
    epochs: 1
  network: {{tls: Mutual}}
  parameterServer: {{replicas: 1}}
  checkpoint: {{volume: {{persistentVolumeClaim: claim}}}}
  worker:
    replicas: 1
    template:
      spec:
        containers:
        - name: trainer
          env:
          - {{name: NAMED, valueFrom: {{secretKeyRef: {{name: token, key: key}}}}}}
---
apiVersion: v1
kind: Secret
metadata: {{name: token}}
stringData: {{key: {CANARY}}}
"""


@pytest.mark.timeout(120)
def test_no_secret_of_a_run_is_in_anything_that_it_writes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "kept.yaml").write_text(JOB)
    run = Started(tmp_path, "kept.yaml")
    wait_for("the code of the worker", lambda: list(tmp_path.glob("here-*")), 60)
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in [run.process.pid, *children(run.process.pid)]}
    ports = {environment_of(run.pid(name))["DISTTRAIN_METRICS_PORT"] for name in ("master-0", "worker-0")}
    pages = ("metrics", "progress", "history")
    read = {f"{port}/{page}": answer(f"http://127.0.0.1:{port}/{page}") for port in ports for page in pages}
    (tmp_path / "go").touch()
    done = run.finish()
    assert done.code == 0, done
    written = {
        str(path.relative_to(tmp_path)): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name != "kept.yaml"
    }
    sinks = {**written, **read, **lines, "out": done.out.encode(), "err": done.err.encode()}
    secrets = [CANARY.encode(), base64.b64encode(CANARY.encode()), b"PRIVATE KEY"]
    assert [(where, secret) for where, content in sinks.items() for secret in secrets if secret in content] == []
    assert any(b"disttrain_" in page for page in read.values())
    for name in ("history.jsonl", "manifest.json", "run.json", ".log"):
        assert any(where.endswith(name) for where in written), name


def answer(url: str) -> bytes:
    """What is read there; b"" where the role has no such page."""
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            return bytes(page.read())
    except urllib.error.HTTPError:
        return b""
