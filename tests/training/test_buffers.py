"""BatchNorm's running statistics and extra state, which parameter servers know nothing of, are in the checkpoints and survive as the rest
does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from disttrain.api.names import Role
from training.job import Job, checkpoints, digits, held, manifests, served

SAVE_STEPS, EPOCHS = 40, 12
STEPS = EPOCHS * 23
MIDDLE = 2 * SAVE_STEPS + 10

MODEL = """
from torch import nn

def model(config):
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
"""


def job_in(folder: Path, consistency: str, *, workers: int = 2, **options: Any) -> Job:
    folder.mkdir(exist_ok=True)
    (folder / "users_code.py").write_text(MODEL)
    # Adam, as a momentum on top of the staleness of Async is too much now and then.
    trainer = held(model="users_code:model", epochs=EPOCHS, optimizer={"name": "Adam", "learningRate": 0.003})
    spec = digits(**served(consistency), **checkpoints(SAVE_STEPS), trainer=trainer, worker={"replicas": workers})
    return Job(folder=folder, spec=spec, **options)


def finish(job: Job) -> dict[str, float]:
    """Runs it to its end; what the evaluation found."""
    progress = job.complete() if job.processes else job.train()
    assert progress.evaluation is not None
    return progress.evaluation


def buffers(folder: Path, step: int) -> dict[str, torch.Tensor]:
    (file,) = (folder / "checkpoints" / f"step-{step:08d}").glob("buffers-*.safetensors")
    return load_file(file)


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints that have buffers."""
    return [m["step"] for m in manifests(folder / "checkpoints") if any(f.startswith("buffers-") for f in m["files"])]


def test_a_resumed_model_has_the_statistics_of_the_uninterrupted_one_bit_by_bit(tmp_path: Path) -> None:
    # Two workers: whichever computes what, the statistics are those of part 0 of each step.
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with job_in(whole, "Sync") as job:
        evaluation = finish(job)
    with job_in(broken, "Sync") as job:
        job.hold(MIDDLE)
        job.start()
        job.until_held(MIDDLE, checkpoint=2 * SAVE_STEPS)
        for role, index in job.keys:
            job.kill(role, index)
            job.wait(role, index)
        job.let_go()
    assert 0 < saved_steps(broken)[-1] < STEPS
    with job_in(broken, "Sync", attempt=2) as job:
        assert finish(job) == evaluation
    assert evaluation["accuracy"] > 0.9
    expected, found = buffers(whole, STEPS), buffers(broken, STEPS)
    assert set(found) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert found["1.num_batches_tracked"] == STEPS
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("lost", [Role.WORKER, Role.PARAMETER_SERVER, Role.MASTER])
def test_every_checkpoint_has_them_also_when_a_worker_was_lost(tmp_path: Path, lost: Role) -> None:
    with job_in(tmp_path, "Async") as job:
        job.hold(MIDDLE)
        job.start()
        job.until_held(MIDDLE)
        job.kill(lost)
        job.let_go()
        assert finish(job)["accuracy"] > 0.9
    assert saved_steps(tmp_path) == [m["step"] for m in manifests(tmp_path / "checkpoints")]
    assert buffers(tmp_path, STEPS)["1.num_batches_tracked"] > 0


COUNTS = """
from torch import nn

class Counts(nn.Module):
    calls = {"training": 0}

    def forward(self, x):
        if self.training:
            self.calls = {"training": self.calls["training"] + 1}
        return x

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state):
        self.calls = state

class Keeps(Counts):
    def get_extra_state(self):
        return {"calls": (1, 2)}

def model(config):
    return nn.Sequential(nn.Linear(64, 10), Counts() if config.get("json") else Keeps())

def evaluate(model, dataset):
    return {"calls": model[1].calls["training"]}
"""


@pytest.mark.parametrize("how", [{}, served("Sync")], ids=["DataParallel", "servers"])
def test_extra_state_that_is_json_goes_on_with_a_resume_and_any_other_is_refused(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    (tmp_path / "users_code.py").write_text(COUNTS)
    trainer = {"model": "users_code:model", "evaluate": "users_code:evaluate", "epochs": None}

    def run(steps: int, attempt: int, **config: Any) -> Job:
        spec = digits(
            **how, **checkpoints(2), worker={"replicas": 1}, trainer=trainer | {"maxSteps": steps, "config": config}
        )
        with Job(folder=tmp_path, spec=spec, attempt=attempt) as job:
            job.start()
            job.supervise()
        return job

    refused = run(4, 1)
    assert "the extra state of module 1 holds a tuple, which is no JSON" in refused.termination(Role.WORKER).message
    assert manifests(tmp_path / "checkpoints") == []
    run(4, 1, json=True)
    progress = run(7, 2, json=True).termination(Role.MASTER).progress
    assert progress is not None
    assert progress.evaluation == {"calls": 7}
