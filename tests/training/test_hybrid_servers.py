"""Hybrid with parameter servers: groups of processes share a model, and the servers are their data axis."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from disttrain.api.names import MODEL_FILE, Role
from training import mesh_models, mesh_users
from training.job import MUTUAL, Job, Model, checkpoints, digits, held, same
from training.test_model_parallel_jobs import ADAMW, FILE, SGD, users_spec


def grouped(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 2,
    servers: int = 2,
    schedule: str | None = None,
    **served: Any,
) -> dict[str, Any]:
    """The fields of a spec that cut the model over groups, between which servers stand."""
    chosen = {"tensor": tensor, "pipeline": pipeline} | ({"schedule": schedule} if schedule else {})
    return {
        "strategy": {"type": "Hybrid", "modelParallel": chosen, "parameterServer": {"consistency": "Sync", **served}},
        "parameterServer": {"replicas": servers},
        "worker": {"replicas": tensor * pipeline * data},
    }


@pytest.mark.parametrize(
    ("mesh", "options", "optimizer", "tolerance"),
    [
        ({"tensor": 2}, {"tied": True, "frozen": True}, ADAMW, 1e-12),
        ({"tensor": 2}, {"dtype": "float32"}, SGD, 1e-6),
        ({"pipeline": 2, "schedule": "OneForwardOneBackward", "replication": 2}, {"frozen": True}, ADAMW, 1e-12),
        ({"tensor": 2, "pipeline": 2, "schedule": "Interleaved", "servers": 3}, {}, ADAMW, 1e-12),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_groups_learn_what_one_process_learns(
    tmp_path: Path, mesh: dict[str, Any], options: dict[str, Any], optimizer: dict[str, Any], tolerance: float
) -> None:
    shutil.copy(FILE, tmp_path)
    microbatch = mesh_models.BATCH // 2 // 4 if "pipeline" in mesh else None
    spec = users_spec(grouped(**mesh), options, optimizer)
    with Job(folder=tmp_path, spec=spec) as job:
        progress = job.train()
    expected = mesh_models.alone(options, name=optimizer["name"], microbatch=microbatch, count=2)
    found = load_file(tmp_path / "checkpoints" / MODEL_FILE)
    far = mesh_models.difference(expected, [found])
    print(f"{mesh} {options} {optimizer['name']}: {far:.1e}")
    assert far < tolerance
    whole = mesh_users.model(options)
    whole.load_state_dict(found)
    evaluation = mesh_users.evaluate(whole.eval(), mesh_users.dataset({}, "test"))
    assert {name: float(value) for name, value in (progress.evaluation or {}).items()} == pytest.approx(
        evaluation, rel=1e-5
    )


MODEL = """
from torch import nn

def model(config):
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 10))
"""
STEPS = 24


def lose(job: Job, role: Role, index: int, number: signal.Signals, *, until: int | None) -> None:
    """Ends or freezes a process while the training is held, lets it go until that step, and starts a replacement."""
    mate = index ^ 1
    before = job.log(Role.WORKER, mate).count("is over")
    job.kill(role, index, number)
    if until is None:
        job.let_go()
    else:
        job.hold(until)
    if number is signal.SIGSTOP:
        job.until(lambda _: job.log(Role.WORKER, mate).count("is over") > before, timeout=30)
        job.kill(role, index)
    job.processes[role, index].code(10)
    job.start_one(role, index)


@pytest.mark.parametrize("replication", [1, 2])
def test_the_loss_of_any_process_leaves_the_bits_of_the_calm_run(
    tmp_path: Path, calm: Callable[..., Model], replication: int
) -> None:
    trainer = held(model="one_model:model", evaluate=None, epochs=None, maxSteps=STEPS, deterministic=True)
    lost = [
        (6, Role.WORKER, 3, signal.SIGKILL),
        (9, Role.WORKER, 0, signal.SIGKILL),
        (12, Role.WORKER, 2, signal.SIGSTOP),
        (15, Role.MASTER, 0, signal.SIGKILL),
        (18, Role.PARAMETER_SERVER, 1, signal.SIGKILL),
    ]
    (tmp_path / "one_model.py").write_text(MODEL)
    spec, plain = (
        digits(**grouped(tensor=2, replication=copies), trainer=trainer, **checkpoints(5))
        for copies in (replication, 1)
    )
    with Job(folder=tmp_path, spec=spec, peer_timeout=3) as job:
        job.hold(lost[0][0])
        job.start()
        for (step, role, index, how), (following, *_) in zip(lost, [*lost[1:], (None,)], strict=True):
            job.until_held(step, checkpoint=step // 5 * 5)
            lose(job, role, index, how, until=following)
        progress = job.complete()
        assert progress.step == STEPS
        if replication == 1:
            assert progress.redone_steps == 3, "those since the checkpoint of step 15, for the lost server"
        else:
            assert progress.redone_steps == 0
        assert job.logs().count("group 0 is ranks") <= 2
    assert same(job.model, calm(plain, files={"one_model.py": MODEL}))


USERS = """
from torch import nn
from disttrain_trainer.examples import digits

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 30)
        self.second = nn.Linear(30, 12, bias=False)  # to Adam the gradient of a bias before BatchNorm is rounding
        self.norm = nn.BatchNorm1d(12)
        self.frozen = nn.Linear(12, 8)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(8, 10)
        self.double()

    def forward(self, x):
        return self.head(self.frozen(self.norm(self.second(self.first(x.double()).tanh())).relu()))

def model(config):
    return Model()
"""


def test_a_checkpoint_goes_from_groups_to_any_other_strategy_and_back(tmp_path: Path) -> None:
    servers: dict[str, Any] = {
        "strategy": {"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}},
        "parameterServer": {"replicas": 1},
    }
    sharded = {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}}
    groups = grouped(tensor=2)
    stages = [(groups, 3), ({}, 5), (groups, 7), (sharded, 9), (groups, 11), (servers, 13)]
    found = []
    for name, ways in (("calm", [(servers, 13)]), ("changed", stages)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "users_model.py").write_text(USERS)
        trainer = {"model": "users_model:model", "optimizer": {"name": "Adam", "learningRate": 0.01}, "partsPerStep": 2}
        for attempt, (changes, steps) in enumerate(ways, start=1):
            more = {"evaluate": None, "epochs": None, "maxSteps": steps}
            spec = digits(**changes, **checkpoints(100), trainer=trainer | more)
            with Job(folder=folder, spec=spec, attempt=attempt) as job:
                job.train()
                if attempt > 1:
                    assert f"begins at step {ways[attempt - 2][1]}" in job.logs()
        found.append(load_file(folder / "checkpoints" / MODEL_FILE))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.allclose(found[1][name], tensor, rtol=1e-10, atol=1e-10), name


@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"pipeline": 2}], ids=["tensor", "pipeline"])
def test_groups_with_bounded_staleness_learn_and_go_on_without_a_lost_one(tmp_path: Path, mesh: dict[str, Any]) -> None:
    trainer = held(model="one_model:model", epochs=None, maxSteps=60, optimizer={"name": "Adam", "learningRate": 0.01})
    served = grouped(**mesh, consistency="BoundedStaleness", maxStaleness=1)
    (tmp_path / "one_model.py").write_text(MODEL)
    with Job(folder=tmp_path, spec=digits(**served, trainer=trainer, **checkpoints(20))) as job:
        job.hold(30)
        job.start()
        job.until(lambda p: p.step >= 28)  # a group that is ahead of the other may have no report due before it is held
        lose(job, Role.WORKER, 1, signal.SIGKILL, until=None)
        progress = job.complete()
    assert progress.step == 60
    assert (progress.max_staleness_seen or 0) <= 1
    assert (progress.evaluation or {})["accuracy"] > 0.6


def test_groups_that_are_ended_by_a_signal_save_and_go_on_from_there(tmp_path: Path) -> None:
    (tmp_path / "one_model.py").write_text(MODEL)
    trainer = held(model="one_model:model", evaluate=None, epochs=None, maxSteps=20)
    spec = digits(**grouped(tensor=2), **MUTUAL, trainer=trainer, **checkpoints(100))
    with Job(folder=tmp_path, spec=spec) as job:
        job.hold(11)
        job.start()
        job.until_held(11)
        for role, index in job.keys:
            job.kill(role, index, signal.SIGTERM)
        job.let_go()
        assert {job.processes[key].code(30) for key in job.keys} == {128 + signal.SIGTERM}
    with Job(folder=tmp_path, spec=spec, attempt=2) as job:
        progress = job.train()
        resumed = job.log(Role.MASTER)
    assert progress.step == 20
    assert "Resumed at step" in resumed
