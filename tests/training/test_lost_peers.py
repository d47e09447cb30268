"""Ranks wait for one another: a lost one is noticed at once, a frozen one when the master misses it, a slow one is no lost one."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from disttrain.api.names import Role
from training.job import Job, digits

ENDLESS = {"epochs": 100_000, "evaluate": None}

SLOW = """
import os, time
from disttrain_trainer.examples import digits

calls = 0

def loss(model, batch):
    global calls
    calls += 1
    if calls == 5 and os.environ["DISTTRAIN_INDEX"] == "1":
        time.sleep(3)
    return digits.loss(model, batch)
"""


BOTH = pytest.mark.parametrize("tls", ["Disabled", "Mutual"])


def spec(workers: int, tls: str = "Disabled", **trainer: Any) -> dict[str, Any]:
    return digits(worker={"replicas": workers}, trainer=ENDLESS | trainer, network={"tls": tls})


def replace(job: Job, index: int) -> float:
    """Seconds until the others train again with a replacement of a worker that is gone."""
    before = job.until(lambda _: True, tolerate=True).generation
    began = time.monotonic()
    job.start_one(Role.WORKER, index)
    job.until(lambda progress: progress.generation > before and progress.step > 0, tolerate=True)
    return time.monotonic() - began


@pytest.mark.parametrize(("workers", "tls"), [(3, "Disabled"), (4, "Disabled"), (3, "Mutual")])
def test_a_lost_rank_is_not_waited_for_by_the_neighbours_of_its_neighbours(
    tmp_path: Path, workers: int, tls: str
) -> None:
    with Job(folder=tmp_path, spec=spec(workers, tls), peer_timeout=30) as job:
        job.start()
        job.until(lambda progress: progress.step > 20)
        job.kill(Role.WORKER, workers - 1)
        job.wait(Role.WORKER, workers - 1)
        assert replace(job, workers - 1) < 15, job.logs()


@BOTH
def test_a_frozen_rank_is_waited_for_as_long_as_the_master_misses_it(tmp_path: Path, tls: str) -> None:
    with Job(folder=tmp_path, spec=spec(3, tls), peer_timeout=2, startup_timeout=120) as job:
        job.start()
        job.until(lambda progress: progress.step > 20)
        job.kill(Role.WORKER, 1, signal.SIGSTOP)
        for index in (0, 2):
            job.until(lambda _, index=index: "round 1 ended" in job.log(Role.WORKER, index), timeout=15)
        job.kill(Role.WORKER, 1)
        job.wait(Role.WORKER, 1)
        assert replace(job, 1) < 15, job.logs()


@BOTH
def test_a_rank_that_is_slow_for_longer_than_the_peer_timeout_is_not_lost(tmp_path: Path, tls: str) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    chosen = spec(2, tls, loss="slow:loss", epochs=None, maxSteps=10)
    with Job(folder=tmp_path, spec=chosen, peer_timeout=1.5) as job:
        progress = job.train()
    assert (progress.step, progress.generation) == (10, 1)
