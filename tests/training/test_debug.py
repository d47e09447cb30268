"""`disttrain debug`: where each process of a run is, while it goes on, and an archive that holds no secret."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from pathlib import Path

import pytest

from cluster.processes import wait_for
from disttrain.cli.main import main
from local_runs.command import Started, left_behind

JOB = {
    "apiVersion": "disttrain.dev/v1alpha1",
    "kind": "DistTrainJob",
    "metadata": {"name": "stuck"},
    "spec": {
        "strategy": {"type": "DataParallel"},
        "trainer": {"script": {"file": "train.py"}},
        "worker": {
            "replicas": 1,
            "template": {
                "spec": {"containers": [{"name": "trainer", "env": [{"name": "HF_TOKEN", "value": "s3cret-one"}]}]}
            },
        },
    },
}
PROGRAM = """\
import time

def waits_for_what_never_comes():
    print("here, with password=s3cret-two", flush=True)
    while True:
        time.sleep(0.05)

waits_for_what_never_comes()
"""


def test_a_run_that_hangs_says_where_and_leaves_its_secrets_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.json").write_text(json.dumps(JOB))
    Path("train.py").write_text(PROGRAM)
    started = Started(tmp_path, "job.json")
    try:
        wait_for("the program", lambda: "here" in started.log("stuck-worker-0"), 60)
        assert main(["debug", "stuck"]) == 0
        assert main(["debug", "stuck", "-o", "stuck.tar.gz"]) == 0
    finally:
        os.killpg(started.process.pid, signal.SIGINT)
        started.finish(60)
    assert left_behind(tmp_path) == []
    shown = capsys.readouterr().out
    assert "in waits_for_what_never_comes" in shown
    assert {line.split()[1] for line in shown.splitlines() if line.startswith("==")} == {
        "stuck-master-0",
        "stuck-worker-0",
    }
    with tarfile.open("stuck.tar.gz") as archive:
        texts = {one.name: (archive.extractfile(one) or pytest.fail(one.name)).read().decode() for one in archive}
    assert {"stuck/stacks.txt", "stuck/job.json", "stuck/logs/stuck-worker-0.log"} <= set(texts)
    assert "in waits_for_what_never_comes" in texts["stuck/stacks.txt"]
    assert "password=[redacted]" in texts["stuck/logs/stuck-worker-0.log"]
    assert not [name for name, text in texts.items() if "s3cret" in text]
    assert main(["debug", "stuck"]) == 2
    assert "is over and has no stacks" in capsys.readouterr().err
