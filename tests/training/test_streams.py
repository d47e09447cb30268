"""Whole jobs on iterable data sets: each rank's stream goes on where it was, whatever is killed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from disttrain.api.names import MODEL_FILE, Role
from training.job import Job, checkpoints, digits

SAMPLES, BATCH, PASSES = 96, 16, 2
STEPS = SAMPLES // BATCH * PASSES
USERS = f"""
import os
import torch
from torch import nn
import held_loss

class Ids(torch.utils.data.IterableDataset):
    def __init__(self):
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.at = 0

    def __iter__(self):
        while self.at < {SAMPLES} // self.ranks:
            self.at += 1
            yield (self.at - 1) * self.ranks + self.rank
        self.at = 0

class Stateful(Ids):
    def state_dict(self):
        return {{"at": self.at}}

    def load_state_dict(self, state):
        self.at = state["at"]

def stateful(config, split):
    return Stateful()

def forgetful(config, split):
    return Ids()

def model(config):
    return nn.Embedding({SAMPLES}, 1)

class Counting:
    @staticmethod
    def loss(model, batch):
        return -model(batch).mean()

held_loss.digits = Counting
loss = held_loss.loss
"""


def job(folder: Path, dataset: str) -> Job:
    (folder / "users.py").write_text(USERS)
    trainer = {
        "model": "users:model",
        "dataset": f"users:{dataset}",
        "loss": "users:loss",
        "evaluate": None,
        "optimizer": {"name": "SGD", "learningRate": BATCH},
        "batchSize": BATCH,
        "epochs": None,
        "maxSteps": STEPS,
    }
    return Job(folder=folder, spec=digits(**checkpoints(2), trainer=trainer))


def times_of(job: Job) -> torch.Tensor:
    """How often each sample was applied, over what its first weight was."""
    assert job.checkpoints is not None
    torch.manual_seed(0)
    first = torch.nn.Embedding(SAMPLES, 1).weight
    return (load_file(job.checkpoints / MODEL_FILE)["weight"] - first.detach()).round().flatten()


@pytest.mark.parametrize("killed", [(1,), (0, 1)], ids=["a rank", "every rank"])
def test_a_stream_with_a_state_is_trained_exactly_once_whoever_is_killed(
    tmp_path: Path, killed: tuple[int, ...]
) -> None:
    with job(tmp_path, "stateful") as running:
        running.hold(7)
        running.start()
        running.until_held(7, checkpoint=6)
        for index in killed:
            running.kill(Role.WORKER, index)
        running.let_go()
        progress = running.complete()
        assert times_of(running).tolist() == [PASSES] * SAMPLES
    assert progress.warning is None


def test_a_stream_without_a_state_is_trained_at_least_once_and_the_job_says_so(tmp_path: Path) -> None:
    with job(tmp_path, "forgetful") as running:
        running.hold(7)
        running.start()
        running.until_held(7)
        running.kill(Role.WORKER, 1)
        running.let_go()
        progress = running.complete()
        times = times_of(running)
    assert times.sum() == STEPS * BATCH
    assert times.min() >= 1
    assert "after a restart its samples are trained at least once" in str(progress.warning)
    assert "rank 1 reads its stream from the beginning again at step 7" in running.logs()
