"""Any two processes are killed at the same moment; the job completes all the same."""

import random
from pathlib import Path

import pytest

from training.job import Job, checkpoints, digits, served
from width import WIDE

STRATEGIES = [
    {},
    served("Sync"),
    served("Sync", servers=1),
    served("Async"),
    served("BoundedStaleness", staleness=1),
    {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}},
    {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "HybridShard", "shardSize": 1}}},
]


@pytest.mark.parametrize("seed", range(50) if WIDE else [1, 3, 4, 6])
def test_any_two_processes_may_be_lost_at_once(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    strategy = STRATEGIES[seed % len(STRATEGIES)]
    epochs = (
        10 if "dataParallel" in strategy.get("strategy", {}) else 30
    )  # FSDP2 takes milliseconds for a step of any model
    spec = digits(**strategy, **checkpoints(chance.choice([20, 50])), trainer={"epochs": epochs})
    with Job(folder=tmp_path, spec=spec) as job:
        job.start()
        moment = chance.randint(5, 200)
        job.until(lambda progress: progress.step >= moment)
        for role, index in chance.sample(job.keys, 2):
            job.kill(role, index)
        progress = job.complete()
    assert progress.finished
    assert progress.step == 23 * epochs
