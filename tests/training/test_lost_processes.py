"""Every process of a job is killed in turn; it is replaced, the job completes, and little is done again."""

import signal
from pathlib import Path
from typing import Any

import pytest

from disttrain.api.names import Role
from training.job import MUTUAL, Job, checkpoints, digits, held, manifests, served

SAVE_STEPS = 40
MIDDLE = 2 * SAVE_STEPS + 10
STEPS = 8 * 23
HELD = held(epochs=8)
SERVED = [
    pytest.param(served("Sync"), id="Sync"),
    pytest.param(served("Async"), id="Async"),
    pytest.param(served("BoundedStaleness", staleness=2), id="BoundedStaleness"),
]


def run_and_kill(tmp_path: Path, changes: dict[str, Any], role: Role, index: int = 0) -> tuple[Job, Any]:
    """A job in which one process is killed after a checkpoint; the job when it is over, and its last progress.

    No worker gets a part of step MIDDLE, at which it is held, before there is a checkpoint of the interval before: it comes for certain.
    """
    with Job(folder=tmp_path, spec=digits(**changes, **checkpoints(SAVE_STEPS), trainer=HELD)) as job:
        job.hold(MIDDLE)
        job.start()
        job.until(lambda p: p.last_checkpoint is not None and p.last_checkpoint.step >= MIDDLE - SAVE_STEPS)
        job.kill(role, index)
        job.let_go()
        progress = job.complete()
    assert progress.finished
    assert progress.step == STEPS
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
    assert progress.redone_steps <= SAVE_STEPS
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


def test_a_server_without_a_checkpoint_volume_starts_from_scratch(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=digits(**served("Async"), trainer=HELD)) as job:
        job.hold(MIDDLE)
        job.start()
        job.until_held(MIDDLE)
        job.kill(Role.PARAMETER_SERVER, 0)
        job.let_go()
        progress = job.complete()
        assert progress.redone_steps >= MIDDLE
        assert "there is no checkpoint volume" in job.logs()


@pytest.mark.parametrize(
    ("changes", "frozen", "witness"),
    [
        pytest.param({}, Role.WORKER, Role.WORKER, id="a rank of DataParallel"),
        pytest.param(served("Sync"), Role.PARAMETER_SERVER, Role.WORKER, id="a server"),
        pytest.param(served("Async"), Role.MASTER, Role.PARAMETER_SERVER, id="the master"),
        pytest.param(served("Sync") | MUTUAL, Role.PARAMETER_SERVER, Role.WORKER, id="a server, under TLS"),
        pytest.param(served("Async") | MUTUAL, Role.MASTER, Role.PARAMETER_SERVER, id="the master, under TLS"),
    ],
)
def test_a_frozen_peer_is_noticed_within_seconds(
    tmp_path: Path, changes: dict[str, Any], frozen: Role, witness: Role
) -> None:
    spec = digits(**changes, trainer={"epochs": 100_000})
    with Job(folder=tmp_path, spec=spec, peer_timeout=3, startup_timeout=8) as job:
        job.start()
        job.until(lambda progress: progress.step > 10)
        job.kill(frozen, 1 if frozen is witness else 0, signal.SIGSTOP)
        assert job.wait(witness, 0, timeout=90) == 75
        said = job.termination(witness).message
        assert "waited" in said or "tried to connect" in said, said


@pytest.mark.parametrize("network", [{}, MUTUAL], ids=["plain", "TLS"])
@pytest.mark.parametrize("master_is_lost", [False, True])
def test_a_frozen_worker_does_not_hold_up_the_others(
    tmp_path: Path, master_is_lost: bool, network: dict[str, Any]
) -> None:
    spec = digits(**served("BoundedStaleness", staleness=1), **network, trainer=HELD)
    with Job(folder=tmp_path, spec=spec, peer_timeout=3) as job:
        job.hold(10)
        job.start()
        job.until(lambda progress: progress.step >= 1)  # the one that is held first may keep the others at the gate
        job.kill(Role.WORKER, 1, signal.SIGSTOP)
        if master_is_lost:
            job.kill(Role.MASTER)  # the new one never sees it, and its connections to the servers stay
        job.let_go()
        progress = job.complete()
        assert progress.generation == 1


SLOW_DISK = """
import os, time
from pathlib import Path
from disttrain.api import environment

if os.environ[environment.ROLE] == "parameter-server" and os.environ[environment.INDEX] == "1":
    from disttrain_trainer.parameter_server.shard_file import ShardFile

    save = ShardFile.save

    def slow(self, path):
        if path.parent.name == "step-{step:08d}" and not Path("writing").exists():
            Path("writing").touch()
            while True:
                time.sleep(1)
        return save(self, path)

    ShardFile.save = slow
"""


def test_a_server_that_is_lost_while_it_writes_a_checkpoint_costs_the_steps_since_the_one_before(
    tmp_path: Path,
) -> None:
    spec = digits(**served("Sync"), **checkpoints(SAVE_STEPS, keep=9), trainer=HELD)
    (tmp_path / "fault.py").write_text(SLOW_DISK.format(step=2 * SAVE_STEPS))
    with Job(folder=tmp_path, spec=spec) as job:
        job.hold(2 * SAVE_STEPS + 3)
        job.start()
        stopped = job.until_held(2 * SAVE_STEPS + 3)
        assert (tmp_path / "writing").exists(), "steps go on while the file is written"
        assert stopped.last_checkpoint is not None
        assert stopped.last_checkpoint.step == SAVE_STEPS
        job.kill(Role.PARAMETER_SERVER, 1)
        job.let_go()
        progress = job.complete()
        assert progress.step == STEPS
        assert progress.redone_steps == SAVE_STEPS + 3
    assert [m["step"] for m in manifests(tmp_path / "checkpoints")] == [
        SAVE_STEPS,
        2 * SAVE_STEPS,
        3 * SAVE_STEPS,
        4 * SAVE_STEPS,
        STEPS,
    ]
    left = {path.name.split(".")[0] for path in (tmp_path / "checkpoints" / f"step-{2 * SAVE_STEPS:08d}").iterdir()}
    assert len(left) == 4, (
        "the manifest, a file of each server and one of a worker: nothing of the save that was abandoned"
    )
