"""Workers on GPUs compute what plain PyTorch computes on the CPU."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain_trainer.data.loader import pinned
from disttrain_trainer.data.loader_processes import LoaderProcesses
from disttrain_trainer.examples import mlp
from training import test_loader_workers as loader_workers
from training.job import Job, digits, served, state
from training.test_data_parallel import STEPS, classic, expected

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

TOLERANCE = 1e-9
"""Of 64-bit numbers, whose sums a GPU orders otherwise."""


def on_gpus(folder: Path, spec: dict[str, Any], count: int) -> Job:
    """A job with one worker of so many GPUs. Real programs: CUDA does not survive a fork."""
    spec["worker"] = {"replicas": 1, "gpusPerWorker": count}
    job = Job(folder=folder, spec=spec, program=True, startup_timeout=120)
    job.config = job.config.model_copy(update={"gpus_per_worker": count})
    return job


def finish(job: Job) -> dict[str, float]:
    """Runs it to its end; what the evaluation found."""
    with job:
        progress = job.train(timeout=200)
    return progress.evaluation or {}


@pytest.mark.parametrize(("backend", "tls"), [("Auto", "Disabled"), ("Gloo", "Mutual")])
def test_data_parallel_on_the_gpus_of_a_pod_equals_one_process_on_the_cpu(
    tmp_path: Path, backend: str, tls: str
) -> None:
    # NCCL takes a GPU for one rank only: with a single one here, the job has one rank, without a group.
    count = min(2, torch.cuda.device_count())
    spec = classic(workers=1, float64=True, backend=backend)
    finish(on_gpus(tmp_path, spec | {"network": {"tls": tls}}, count))
    saved = state(tmp_path, STEPS)
    for name, parameter in expected(float64=True).items():
        torch.testing.assert_close(saved[f"model.{name}"], parameter, atol=TOLERANCE, rtol=0)


def test_a_worker_of_parameter_servers_on_a_gpu_equals_one_process_on_the_cpu(tmp_path: Path) -> None:
    spec = classic(workers=1, float64=True, evaluate="disttrain_trainer.examples.mlp:evaluate")
    found = finish(on_gpus(tmp_path, spec | served("Sync"), 1))
    config = {"samples": 100, "float64": True}
    model: nn.Module = mlp.model(config)
    model.load_state_dict(expected(float64=True))
    with torch.no_grad():
        assert found["mse"] == pytest.approx(mlp.evaluate(model, mlp.dataset(config, "test"))["mse"], abs=TOLERANCE)


def test_digits_are_learned_on_a_gpu(tmp_path: Path) -> None:
    assert finish(on_gpus(tmp_path, digits(), 1))["accuracy"] > 0.95


def test_batches_of_loader_processes_come_in_pinned_memory() -> None:
    loaders = LoaderProcesses(1, lambda key: [torch.ones(4)], dataset=None, around=nullcontext, receive=pinned)
    try:
        loaders.foresee([(0, 0)], ())
        assert loaders.take((0, 0))[0].is_pinned()
    finally:
        loaders.close()


def test_a_worker_on_a_gpu_trains_each_sample_once_on_batches_that_other_processes_load(tmp_path: Path) -> None:
    running = on_gpus(tmp_path, loader_workers.spec(tmp_path, {}, loaders=2), 1)
    finish(running)
    times = loader_workers.trained(running)["times"]
    assert times.min() == times.max() > 0
