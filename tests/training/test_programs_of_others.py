"""`disttrain run` with programs that know torchrun's conventions and nothing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from local_runs.command import run

ONE_SUM = r"""
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
# One write: the processes of a worker share its log.
os.write(1, f"rank {dist.get_rank()} of {dist.get_world_size()} sum {int(total)}\n".encode())
dist.destroy_process_group()
"""
ONCE_PER_MACHINE = r"""
import os, torch.distributed as dist
dist.init_process_group("gloo")
if os.environ["LOCAL_RANK"] == "0":
    os.mkdir("unpacked")
dist.barrier()
local, size = os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]
os.write(1, f"rank {dist.get_rank()} local {local} of {size} {os.path.isdir('unpacked')}\n".encode())
dist.destroy_process_group()
"""
APART = """
import torch.distributed as dist
from disttrain_trainer import session
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
session.report(step=1, total_steps=1)
"""


def write(folder: Path, program: str, trainer: dict[str, Any], **worker: Any) -> str:
    (folder / "train.py").write_text(program)
    spec = {"strategy": {"type": "DataParallel"}, "trainer": trainer, "worker": {"replicas": 2, **worker}}
    job = {"apiVersion": "disttrain.dev/v1alpha1", "kind": "DistTrainJob", "metadata": {"name": "others"}, "spec": spec}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return "job.yaml"


@pytest.mark.timeout(180)
def test_a_bare_torchrun_forms_one_world_also_in_a_shell_that_is_part_of_another(tmp_path: Path) -> None:
    file = write(tmp_path, ONE_SUM, {"command": ["torchrun", "train.py"]}, processesPerWorker=2)
    shell = {"PET_NNODES": "7", "LOCAL_RANK": "5", "WORLD_SIZE": "9", "MASTER_ADDR": "elsewhere", "SLURM_PROCID": "3"}
    done = run(tmp_path, file, environment=shell, seconds=150)
    assert done.code == 0, done
    for rank in range(4):
        assert f"rank {rank} of 4 sum 4" in done.out, done
    assert "Warning" not in done.out


@pytest.mark.timeout(180)
def test_what_a_script_does_once_per_machine_is_done_once_in_a_local_run(tmp_path: Path) -> None:
    file = write(tmp_path, ONCE_PER_MACHINE, {"script": {"file": "train.py"}}, processesPerWorker=2)
    done = run(tmp_path, file, seconds=150)
    assert done.code == 0, done
    for rank in range(4):
        assert f"rank {rank} local {rank} of 4 True" in done.out, done


@pytest.mark.timeout(180)
def test_a_script_whose_processes_train_apart_completes_with_a_warning(tmp_path: Path) -> None:
    done = run(tmp_path, write(tmp_path, APART, {"script": {"file": "train.py"}}), seconds=150)
    assert done.code == 0, done
    assert "no process of the script joined the others: 2 processes trained separate models" in done.out, done


@pytest.mark.timeout(180)
def test_a_command_whose_workers_train_apart_completes_with_a_warning(tmp_path: Path) -> None:
    done = run(tmp_path, write(tmp_path, APART, {"command": ["python", "train.py"]}), seconds=150)
    assert done.code == 0, done
    assert "the job has 2 workers, but no process reported a world of more than 1" in done.out, done
