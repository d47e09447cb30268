"""Jobs that clip by the norm of the whole gradient learn what a plain loop with torch's clip_grad_norm_ learns."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.processes import wait_for
from disttrain.api.names import MODEL_FILE, Role
from training import mesh_models
from training.job import Job, checkpoints, digits, final_parameters, served
from training.test_model_parallel_jobs import ADAMW, FILE, SGD, cut, users_spec

STEPS, CLIP = 50, 1.0
DATA = {"strategy": {"type": "DataParallel"}, "worker": {"replicas": 2}}
FULLY = {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}, "worker": {"replicas": 2}}
LEFT_OUT = {"tied": True, "frozen": True, "unused": True}


@pytest.mark.parametrize(
    ("shape", "options", "optimizer", "tolerance"),
    [
        (served("Sync", servers=3), LEFT_OUT, ADAMW, 1e-12),
        (cut(data=2, pipeline=2, sharding="FullyShard"), {"dtype": "float32"}, SGD, 1e-6),
    ],
    ids=["servers", "pipeline-sharded-fp32"],
)
def test_a_clipped_training_is_that_of_one_process(
    tmp_path: Path, shape: dict[str, Any], options: dict[str, Any], optimizer: dict[str, Any], tolerance: float
) -> None:
    """The other strategies are in test_gradient_accumulation.py."""
    shutil.copy(FILE, tmp_path)
    spec = users_spec(shape, options, optimizer)
    spec["trainer"] |= {"maxSteps": STEPS, "maxGradientNorm": CLIP, "partsPerStep": 2, "evaluate": None}
    with Job(folder=tmp_path, spec=spec) as job:
        job.train()
    norms: list[float] = []
    microbatch = 1 if "modelParallel" in spec["strategy"] else None
    expected = mesh_models.alone(
        options, name=optimizer["name"], microbatch=microbatch, count=2, steps=STEPS, clip=CLIP, norms=norms
    )
    assert max(norms) > 2 * CLIP
    far = mesh_models.difference(expected, [load_file(tmp_path / "checkpoints" / MODEL_FILE)])
    print(f"{far:.1e}")
    assert far < tolerance


FAULT = """
import os, signal
from pathlib import Path
from disttrain_trainer.parameter_server.server import ShardServer

take = ShardServer.take_norm

def take_or_fail(self, round_number, version, norm):
    if version == 20 and os.environ["DISTTRAIN_INDEX"] == "1" and not Path("failed").exists():
        Path("failed").touch()
        os.kill(os.getpid(), int(Path("signal").read_text()))
    take(self, round_number, version, norm)

ShardServer.take_norm = take_or_fail
"""
"""The server knows the norm of a step, and is lost before it makes the step; the other server may have made it."""


def digits_spec(replication: int) -> dict[str, Any]:
    clipped = {"maxGradientNorm": 0.5, "deterministic": True, "maxSteps": 40, "epochs": None, "evaluate": None}
    spec = digits(**served("Sync"), trainer=clipped, **checkpoints(15))
    spec["strategy"]["parameterServer"]["replication"] = replication
    return spec


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The parameters of an undisturbed training."""
    folder = tmp_path_factory.mktemp("calm")
    with Job(folder=folder, spec=digits_spec(1)) as job:
        job.train()
    return final_parameters(folder, 40)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
@pytest.mark.parametrize("replication", [1, 2])
def test_a_server_that_is_lost_between_the_norm_and_the_step_changes_no_bit(
    tmp_path: Path, calm: torch.Tensor, replication: int, number: signal.Signals
) -> None:
    (tmp_path / "fault.py").write_text(FAULT)
    (tmp_path / "signal").write_text(str(int(number)))
    with Job(folder=tmp_path, spec=digits_spec(replication), peer_timeout=2) as job:
        job.start()
        if number is signal.SIGSTOP and replication == 1:  # else the job ends without it
            wait_for("the fault", (tmp_path / "failed").exists, 30)
            job.until(lambda progress: "parameter-server-1" in (progress.waiting_for or ""))
            job.kill(Role.PARAMETER_SERVER, 1, signal.SIGCONT)
        job.complete()
    assert (tmp_path / "failed").exists()
    assert torch.equal(final_parameters(tmp_path, 40), calm)
