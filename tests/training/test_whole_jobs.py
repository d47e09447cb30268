"""Whole jobs on loopback, from the first hello to the last checkpoint, as their master tells them."""

from pathlib import Path
from typing import Any

import pytest

from disttrain.api.names import Role
from training.job import Job, checkpoints, digits, held, manifests, served

MOMENTUM = {"optimizer": {"name": "SGD", "learningRate": 0.1, "momentum": 0.9}, "epochs": 20}
ADAM = {"optimizer": {"name": "Adam", "learningRate": 0.002}, "epochs": 30}
"""Asynchrony is a momentum of its own (Mitliagkas et al., 2016): on top of 0.9 it is too much."""


@pytest.mark.parametrize(
    ("changes", "trainer"),
    [
        pytest.param({}, MOMENTUM, id="DataParallel"),
        pytest.param(served("Sync"), MOMENTUM, id="Sync"),
        pytest.param(served("Async"), ADAM, id="Async"),
        pytest.param(served("BoundedStaleness", staleness=4), ADAM, id="BoundedStaleness"),
    ],
)
def test_digits_are_learned(tmp_path: Path, changes: dict[str, Any], trainer: dict[str, Any]) -> None:
    with Job(folder=tmp_path, spec=digits(**changes, **checkpoints(100), trainer=trainer)) as job:
        progress = job.train()
        assert [job.wait(role, index, timeout=10) for role, index in job.keys] == [0] * len(job.keys)
    assert progress.finished
    assert progress.step == progress.total_steps == trainer["epochs"] * 23
    assert progress.epoch == trainer["epochs"]
    assert progress.loss is not None
    assert progress.loss < 0.5
    assert progress.evaluation is not None
    assert progress.evaluation["accuracy"] >= 0.97
    assert progress.last_checkpoint is not None
    assert progress.last_checkpoint.step == progress.step
    assert progress.redone_steps == 0
    assert progress.generation == 1
    assert manifests(tmp_path / "checkpoints")[-1]["finished"]


def test_the_program_itself_runs_a_job_with_one_server(tmp_path: Path) -> None:
    spec = digits(**served("Sync", servers=1), worker={"replicas": 1}, trainer=held())
    with Job(folder=tmp_path, spec=spec, program=True) as job:
        job.hold(5)
        job.start()
        assert job.until_held(5).world_size == 1
        assert "disttrain_step{" in job.metrics()
        job.let_go()
        job.complete()


def test_a_world_of_one_needs_no_process_group(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=digits(worker={"replicas": 1})) as job:
        job.train()
        assert job.termination(Role.MASTER).progress.step == 230  # type: ignore[union-attr]


def test_two_processes_of_one_pod_are_two_ranks(tmp_path: Path) -> None:
    job = Job(folder=tmp_path, spec=digits(worker={"replicas": 1}, trainer=held()))
    job.config = job.config.model_copy(update={"processes_per_worker": 2})
    with job:
        job.hold(5)
        job.start()
        assert job.until_held(5).world_size == 2
        job.let_go()
        job.complete()
        assert job.wait(Role.WORKER, 0, timeout=10) == 0


def test_a_master_waits_and_says_for_whom(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=digits(**served("Sync", servers=1), worker={"replicas": 1})) as job:
        job.start_one(Role.MASTER)
        job.start_one(Role.WORKER)
        waiting = job.until(lambda progress: progress.waiting_for is not None and "worker" not in progress.waiting_for)
        assert waiting.waiting_for is not None
        assert waiting.waiting_for.startswith("parameter-server-0 (")
        job.start_one(Role.PARAMETER_SERVER)
        job.complete()


def test_a_process_of_an_older_attempt_is_refused_and_says_so(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=digits(worker={"replicas": 1}), startup_timeout=1) as job:
        job.start_one(Role.MASTER)
        job.until(lambda _: True)
        job.config = job.config.model_copy(update={"attempt": 2})
        job.start_one(Role.WORKER)
        assert job.wait(Role.WORKER) == 75
        assert "this master belongs to attempt 1, not to 2" in job.termination(Role.WORKER).message
