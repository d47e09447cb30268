"""Workers of parameter servers, the real ones with their assignments and prefetched parameters, compute what one process computes."""

from pathlib import Path

import torch

from training.job import Job, final_parameters, served
from training.test_data_parallel import STEPS, classic, expected


def test_two_workers_of_three_servers_equal_one_process(tmp_path: Path) -> None:
    spec = classic(workers=2, float64=True) | served("Sync", servers=3)
    with Job(folder=tmp_path, spec=spec) as job:
        job.train()
    alone = torch.cat([parameter.flatten() for parameter in expected(float64=True).values()])
    torch.testing.assert_close(final_parameters(tmp_path, STEPS), alone, atol=1e-12, rtol=0)
