"""spec.health in a local run: the loss of a real training breaks a rule, and the job goes back to a checkpoint from before."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from disttrain.api import environment
from disttrain.api.job import DistTrainJob
from local_runs.command import left_behind, run
from training.job import Job, checkpoints, digits, manifests

USERS = """
import json, os, time
from pathlib import Path
from disttrain_trainer.examples import digits

model, dataset = digits.model, digits.dataset
folder = Path(os.environ["DISTTRAIN_CHECKPOINT_DIR"])
computed = 0

def has_checkpoint(step):
    return (folder / f"step-{step:08d}" / "manifest.json").exists()

def seen():  # the step that the operator has stored, by which it judges what was before the breach
    job = json.loads((folder.parents[2] / "runs" / folder.name / "job.json").read_text())
    return job["status"].get("training", {}).get("step", 0)

def loss(model, batch):
    global computed
    computed += 1
    diverged = os.environ["DISTTRAIN_ATTEMPT"] == "1" and computed > 25
    if os.environ["DISTTRAIN_ATTEMPT"] == "1" and not diverged:
        time.sleep(0.15)  # so that a report is due after step 20, and the master knows
    while diverged and not (has_checkpoint(20) and seen() >= 20):
        time.sleep(0.05)
    if diverged and has_checkpoint(30):  # so that the rule is judged before the last step
        time.sleep(1)
    return digits.loss(model, batch) + (1e6 if diverged else 0), len(batch[1])
"""

JOB = """
apiVersion: disttrain.dev/v1alpha1
kind: DistTrainJob
metadata: {name: rules}
spec:
  strategy: {type: DataParallel}
  trainer:
    model: users:model
    dataset: users:dataset
    loss: users:loss
    optimizer: {name: SGD, learningRate: 0.1}
    maxSteps: 120
    batchSize: 32
  checkpoint: {volume: {persistentVolumeClaim: c}, everySteps: 10, keep: 12}
  health:
    rules:
    - {name: diverged, metric: Loss, above: 100, forSeconds: 1, action: RollBack}
    - {name: explodes, metric: GradientNorm, above: 1000000, action: FailJob}
  observability: {statusIntervalSeconds: 1}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: c}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
"""


@pytest.mark.timeout(180)
def test_a_loss_that_stays_too_large_takes_the_job_back_to_a_checkpoint_from_before(tmp_path: Path) -> None:
    (tmp_path / "users.py").write_text(USERS)
    (tmp_path / "job.yaml").write_text(JOB)
    done = run(tmp_path, "job.yaml", "-o", "json", seconds=150)
    assert done.code == 0, done
    status = DistTrainJob.parse(done.job).status
    assert status.attempt == 2
    assert status.roll_back is not None
    assert status.training is not None
    assert status.training.resumed is not None
    assert status.training.resumed.startswith("Resumed at step 20")
    assert 20 <= status.roll_back.step < 30
    assert status.training.step == 120
    assert "Rule diverged of spec.health: Loss is " in done.err
    assert "step-00000030 is not taken any more, and is now called rolled-back-" in done.err
    (root,) = tmp_path.glob(".disttrain/claims/c/*")
    assert not list(root.glob("rolled-back-*"))  # the training has a checkpoint of each of these steps again
    assert left_behind(tmp_path) == []


LATE = """
import os
from pathlib import Path
from disttrain_trainer.examples import digits

def model(config):
    late = Path("late")
    if os.environ["DISTTRAIN_ATTEMPT"] == "2" and late.exists():
        late.rename("checkpoints/step-00000010")
    return digits.model(config)
"""


def test_a_checkpoint_that_the_attempt_before_completes_when_a_worker_has_begun_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "users.py").write_text(LATE)
    spec = digits(
        worker={"replicas": 1}, trainer={"model": "users:model", "epochs": None, "maxSteps": 12}, **checkpoints(5)
    )
    with Job(folder=tmp_path, spec=spec) as job:
        job.train()
    folder = tmp_path / "checkpoints"
    for each in folder.glob("step-*12"):
        shutil.rmtree(each)
    (folder / "step-00000010").rename(tmp_path / "late")
    with Job(folder=tmp_path, spec=spec, attempt=2, env={environment.ROLL_BACK: "2:5"}) as job:
        job.train()
    assert [(each["step"], each["attempt"]) for each in manifests(folder)] == [(5, 1), (10, 2), (12, 2)]
