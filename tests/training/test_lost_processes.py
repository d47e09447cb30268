"""Every process of a job is killed in turn; it is replaced, the job completes, and little is done again."""

import signal
from pathlib import Path
from typing import Any

import pytest

from disttrain.api.names import Role
from training.job import Job, checkpoints, digits, served

EVERY = 40
LONG = {"epochs": 40}
"""920 steps: a second of work, so that the kill comes in the middle."""
SERVED = [
    pytest.param(served("Sync"), id="Sync"),
    pytest.param(served("Async"), id="Async"),
    pytest.param(served("BoundedStaleness", staleness=2), id="BoundedStaleness"),
]


def run_and_kill(tmp_path: Path, changes: dict[str, Any], role: Role, index: int = 0) -> tuple[Job, Any]:
    """A job in which one process is killed after two checkpoints; the job when it is over, and its last progress."""
    with Job(folder=tmp_path, spec=digits(**changes, **checkpoints(EVERY), trainer=LONG)) as job:
        job.start()
        job.until(lambda progress: progress.last_checkpoint is not None and progress.last_checkpoint.step >= 2 * EVERY)
        job.kill(role, index)
        assert job.supervise() == 0, job.logs()
        progress = job.termination(Role.MASTER).progress
    assert progress is not None
    assert progress.finished
    assert progress.step == 920
    assert job.restarts.get((role, index)) == 1
    return job, progress


@pytest.mark.parametrize("changes", SERVED)
@pytest.mark.parametrize("role", [Role.WORKER, Role.MASTER])
def test_a_lost_worker_or_master_costs_no_step(tmp_path: Path, changes: dict[str, Any], role: Role) -> None:
    job, progress = run_and_kill(tmp_path, changes, role)
    assert progress.redone_steps == 0
    assert progress.generation == 1
    assert sum(job.restarts.values()) == 1


@pytest.mark.parametrize("changes", SERVED)
def test_a_lost_server_costs_at_most_the_steps_since_the_last_checkpoint(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    job, progress = run_and_kill(tmp_path, changes, Role.PARAMETER_SERVER, 1)
    assert progress.redone_steps <= EVERY
    assert progress.generation == 2
    assert sum(job.restarts.values()) == 1


@pytest.mark.parametrize("index", [0, 1])
def test_a_lost_rank_gets_the_survivors_state(tmp_path: Path, index: int) -> None:
    job, progress = run_and_kill(tmp_path, {}, Role.WORKER, index)
    assert progress.redone_steps == 0
    assert progress.generation == 2
    assert sum(job.restarts.values()) == 1


def test_ranks_go_on_without_the_master(tmp_path: Path) -> None:
    job, progress = run_and_kill(tmp_path, {}, Role.MASTER)
    assert progress.redone_steps == 0
    assert sum(job.restarts.values()) == 1


def test_the_last_worker_of_all_is_replaced(tmp_path: Path) -> None:
    run_and_kill(tmp_path, {**served("Sync", servers=1), "worker": {"replicas": 1}}, Role.WORKER)


def test_a_server_without_a_checkpoint_volume_begins_anew(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=digits(**served("Async"), trainer=LONG)) as job:
        job.start()
        job.until(lambda progress: progress.step > 50)
        job.kill(Role.PARAMETER_SERVER, 0)
        assert job.supervise() == 0, job.logs()
        progress = job.termination(Role.MASTER).progress
        assert progress is not None
        assert progress.redone_steps > 50
        assert "there is no checkpoint volume" in job.logs()


@pytest.mark.parametrize(
    ("changes", "frozen", "witness"),
    [
        pytest.param({}, Role.WORKER, Role.WORKER, id="a rank of DataParallel"),
        pytest.param(served("Sync"), Role.PARAMETER_SERVER, Role.WORKER, id="a server"),
        pytest.param(served("Async"), Role.MASTER, Role.PARAMETER_SERVER, id="the master"),
    ],
)
def test_a_frozen_peer_is_noticed_within_seconds(
    tmp_path: Path, changes: dict[str, Any], frozen: Role, witness: Role
) -> None:
    spec = digits(**changes, trainer={"epochs": 100_000})
    with Job(folder=tmp_path, spec=spec, peer_timeout=1, startup_timeout=2) as job:
        job.start()
        job.until(lambda progress: progress.step > 10)
        job.kill(frozen, 1 if frozen is witness else 0, signal.SIGSTOP)
        assert job.wait(witness, 0, timeout=20) == 75
        said = job.termination(witness).message
        assert "waited" in said, said


def test_a_frozen_worker_does_not_hold_up_the_others(tmp_path: Path) -> None:
    spec = digits(**served("BoundedStaleness", staleness=1), trainer=LONG)
    with Job(folder=tmp_path, spec=spec, peer_timeout=1) as job:
        job.start()
        job.until(lambda progress: progress.step > 10)
        job.kill(Role.WORKER, 1, signal.SIGSTOP)
        assert job.supervise() == 0, job.logs()
