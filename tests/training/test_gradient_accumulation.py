"""Jobs whose parts are computed in portions learn what one process learns, with the memory of a portion."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from disttrain.api.names import MODEL_FILE
from training import mesh_models, mesh_users
from training.job import Job, final_parameters, served
from training.test_data_parallel import classic, expected
from training.test_gradient_clipping import CLIP, DATA, FULLY, LEFT_OUT, STEPS
from training.test_hybrid_servers import grouped
from training.test_model_parallel_jobs import ADAMW, FILE, SGD, cut, users_spec

PORTIONS = 4
PIPELINE = cut(pipeline=2)
GROUPS = grouped(pipeline=2, data=1, servers=1)
for pipeline in (PIPELINE, GROUPS):
    pipeline["strategy"]["modelParallel"]["microbatches"] = 2
ALONE = {"worker": {"replicas": 1}}


@pytest.mark.parametrize(
    ("shape", "parts", "options", "optimizer", "tolerance"),
    [
        (DATA, 2, LEFT_OUT, ADAMW, 1e-12),
        (DATA | ALONE, 3, {"dtype": "float32", "unused": True}, SGD, 1e-6),
        (FULLY, 2, LEFT_OUT, ADAMW, 1e-12),
        (cut(tensor=2), 1, {"tied": True, "frozen": True}, ADAMW, 1e-12),
        (PIPELINE, 1, {}, ADAMW, 1e-12),
        (served("Sync", servers=2), 2, LEFT_OUT, ADAMW, 1e-12),
        (served("Async", servers=2) | ALONE, 1, {"unused": True}, ADAMW, 1e-12),
        (grouped(tensor=2, data=1, servers=1), 2, LEFT_OUT | {"dtype": "float32"}, SGD, 1e-6),
        (GROUPS, 1, {}, ADAMW, 1e-12),
    ],
    ids=[
        "whole",
        "alone-fp32",
        "fully-sharded",
        "tensor",
        "pipeline",
        "servers",
        "async",
        "groups-fp32",
        "piped groups",
    ],
)
def test_portions_with_a_clip_are_those_of_one_process(
    tmp_path: Path,
    shape: dict[str, Any],
    parts: int,
    options: dict[str, Any],
    optimizer: dict[str, Any],
    tolerance: float,
) -> None:
    """A model with BatchNorm, dropout and a mean over tokens; the last batch of an epoch has fewer samples than portions."""
    shutil.copy(FILE, tmp_path)
    spec = users_spec(shape, options, optimizer)
    spec["trainer"] |= {"maxSteps": STEPS, "maxGradientNorm": CLIP, "partsPerStep": parts, "evaluate": None}
    spec["trainer"]["gradientAccumulationSteps"] = portions = PORTIONS if parts < 3 else 2
    with Job(folder=tmp_path, spec=spec) as job:
        job.train()
    microbatch = 1 if shape in (PIPELINE, GROUPS) else None
    wanted = mesh_models.alone(
        options, name=optimizer["name"], microbatch=microbatch, count=parts, steps=STEPS, clip=CLIP, portions=portions
    )
    far = mesh_models.difference(wanted, [load_file(tmp_path / "checkpoints" / MODEL_FILE)])
    print(f"{far:.1e}")
    assert far < tolerance


def test_without_batch_norm_and_dropout_portions_are_the_whole_batch_also_when_loader_processes_make_them(
    tmp_path: Path,
) -> None:
    spec = classic(workers=2, float64=True, gradientAccumulationSteps=4, loaderWorkers=1) | served("Sync", servers=2)
    with Job(folder=tmp_path, spec=spec) as job:
        job.train()
    alone = torch.cat([parameter.flatten() for parameter in expected(float64=True).values()])
    torch.testing.assert_close(final_parameters(tmp_path, 50), alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [ALONE, cut(tensor=2)], ids=["alone", "tensor"])
def test_portions_of_one_part_count_by_the_tokens_that_the_graph_of_their_loss_shows(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    def weighed(model: torch.nn.Module, batch: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
        return mesh_users.token_mean(model, batch), float((batch[1] != 0).sum())

    shutil.copy(FILE, tmp_path)
    spec = users_spec(shape, {}, ADAMW)
    spec["trainer"] |= {"gradientAccumulationSteps": PORTIONS, "loss": "mesh_users:token_mean", "evaluate": None}
    with Job(folder=tmp_path, spec=spec) as job:
        job.train()
    wanted = mesh_models.alone({}, microbatch=None, of=weighed, portions=PORTIONS)
    assert mesh_models.difference(wanted, [load_file(tmp_path / "checkpoints" / MODEL_FILE)]) < 1e-12
