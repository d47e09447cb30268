"""Whole jobs with strategy.parameterServer.replication 2: a lost server costs no step."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.api.names import Role
from training.job import MUTUAL, Job, checkpoints, digits, final_parameters, held, served

MIDDLE = 30
STEPS = 3 * 23


def spec(consistency: str, **trainer: Any) -> dict[str, Any]:
    fields = served(consistency)
    fields["strategy"]["parameterServer"]["replication"] = 2
    return digits(**fields, **checkpoints(1000), trainer=held(epochs=3, evaluate=None, **trainer))


def until_copied(job: Job, onto: int, times: dict[int, int]) -> None:
    """These shards have got a complete copy on this server so many times, as their primary says."""

    def copied(_: object) -> bool:
        said = job.log(Role.PARAMETER_SERVER, 1 - onto)
        return all(
            said.count(f"shard {shard} has a copy on parameter-server-{onto}") == n for shard, n in times.items()
        )

    job.until(copied)


def test_server_that_freezes_is_replaced_by_its_copy_and_each_part_counts_once(tmp_path: Path) -> None:
    """The master is lost in the promotion, too; and the traffic is encrypted."""
    with Job(folder=tmp_path, spec=spec("Async") | MUTUAL, peer_timeout=3) as job:
        job.hold(MIDDLE)
        job.start()
        job.until_held(MIDDLE)
        until_copied(job, 0, {1: 1})
        until_copied(job, 1, {0: 1})
        job.kill(Role.PARAMETER_SERVER, 1, signal.SIGSTOP)
        job.until(lambda _: "the copies of its shards take their places" in job.log(Role.MASTER))
        job.kill(Role.MASTER)
        job.wait(Role.MASTER)
        job.start_one(Role.MASTER)
        job.let_go()
        job.until(lambda progress: progress.step >= MIDDLE + 5)
        job.kill(Role.PARAMETER_SERVER, 1, signal.SIGCONT)
        progress = job.complete()
    assert progress.step == STEPS
    assert progress.redone_steps == 0
    assert progress.generation == 1


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The parameters of a run in which nothing is lost."""
    folder = tmp_path_factory.mktemp("calm")
    with Job(folder=folder, spec=spec("Sync", deterministic=True)) as job:
        assert job.train().step == STEPS
    return final_parameters(folder, STEPS)


def test_servers_are_killed_one_after_the_other_and_a_synchronous_training_has_the_bits_of_a_calm_one(
    tmp_path: Path, calm: torch.Tensor
) -> None:
    with Job(folder=tmp_path, spec=spec("Sync", deterministic=True)) as job:
        job.hold(MIDDLE)
        job.start()
        job.until_held(MIDDLE)
        until_copied(job, 0, {1: 1})
        until_copied(job, 1, {0: 1})
        job.kill(Role.PARAMETER_SERVER, 0)
        job.wait(Role.PARAMETER_SERVER, 0)
        job.hold(MIDDLE + 10)
        job.until(lambda progress: progress.step == MIDDLE + 10, tolerate=True)  # with one server
        assert "is the primary of shard 0 now" in job.log(Role.PARAMETER_SERVER, 1)
        job.start_one(Role.PARAMETER_SERVER, 0)
        until_copied(job, 0, {0: 1, 1: 2})
        job.kill(Role.PARAMETER_SERVER, 1)
        job.let_go()
        progress = job.complete()
    assert progress.step == STEPS
    assert progress.redone_steps == 0
    assert progress.generation == 1
    assert torch.equal(final_parameters(tmp_path, STEPS), calm)
