"""Jobs whose model is cut: they learn what one process learns, and go on after the loss of any process."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from disttrain.api.names import MODEL_FILE, Role
from disttrain_trainer.checkpoint import by_name
from disttrain_trainer.checkpoint.by_name import NamedCheckpoint
from disttrain_trainer.examples import digits as examples
from training import mesh_models, mesh_users
from training.job import Job, Model, checkpoints, digits, held, same, served

FILE = Path(__file__).with_name("mesh_users.py")


def cut(
    *, tensor: int = 1, pipeline: int = 1, data: int = 1, schedule: str | None = None, sharding: str | None = None
) -> dict[str, Any]:
    """The fields of a spec that cut the model."""
    chosen: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline}
    if schedule is not None:
        chosen["schedule"] = schedule
    strategy: dict[str, Any] = {"type": "Hybrid" if data > 1 else "ModelParallel", "modelParallel": chosen}
    if sharding is not None:
        strategy["dataParallel"] = {"sharding": sharding}
    return {"strategy": strategy, "worker": {"replicas": tensor * pipeline * data}}


def users_spec(changes: dict[str, Any], options: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Any]:
    trainer = {name: f"mesh_users:{name}" for name in ("model", "dataset", "loss", "evaluate")}
    more = {"config": options, "optimizer": optimizer, "epochs": None, "maxSteps": mesh_models.STEPS, "seed": 3}
    return digits(**changes, **checkpoints(100), trainer=trainer | more | {"batchSize": mesh_models.BATCH})


FULLY_SHARDED = {"data": 2, "pipeline": 2, "sharding": "FullyShard"}
ADAMW = {"name": "AdamW", "learningRate": 0.01, "weightDecay": 0.01}
SGD = {"name": "SGD", "learningRate": 0.05, "momentum": 0.9}


@pytest.mark.parametrize(
    ("mesh", "options", "optimizer", "tolerance"),
    [
        ({"tensor": 2}, {"tied": True, "frozen": True}, ADAMW, 1e-12),
        ({"tensor": 2}, {"dtype": "float32"}, SGD, 1e-6),
        ({"pipeline": 2, "schedule": "ZeroBubble"}, {}, ADAMW, 1e-12),
        ({"data": 2, "tensor": 2}, {"tied": True}, ADAMW, 1e-12),
        ({"data": 2, "tensor": 2, "sharding": "FullyShard"}, {}, ADAMW, 1e-12),
        ({"data": 2, "pipeline": 2, "schedule": "OneForwardOneBackward"}, {"frozen": True}, ADAMW, 1e-12),
        ({"tensor": 2, "pipeline": 2, "schedule": "Interleaved"}, {}, ADAMW, 1e-12),
        (FULLY_SHARDED | {"schedule": "GPipe"}, {}, ADAMW, 1e-12),
        (FULLY_SHARDED | {"schedule": "OneForwardOneBackward"}, {"frozen": True}, ADAMW, 1e-12),
        (FULLY_SHARDED | {"schedule": "Interleaved", "parts": 1}, {}, ADAMW, 1e-12),
        (FULLY_SHARDED | {"schedule": "ZeroBubble"}, {}, ADAMW, 1e-12),
        (FULLY_SHARDED | {"schedule": "ZeroBubble", "sharding": "HybridShard"}, {"dtype": "float32"}, SGD, 1e-6),
        ({"pipeline": 2, "schedule": "GPipe"}, {"dtype": "float32"}, SGD, 1e-6),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_a_cut_model_learns_what_one_process_learns(
    tmp_path: Path, mesh: dict[str, Any], options: dict[str, Any], optimizer: dict[str, Any], tolerance: float
) -> None:
    """parts: of a step; with fewer than data-parallel members some of these have none."""
    shutil.copy(FILE, tmp_path)
    parts = mesh.get("parts", mesh.get("data", 1))
    microbatch = mesh_models.BATCH // parts // 4 if "pipeline" in mesh else None
    spec = users_spec(cut(**{name: value for name, value in mesh.items() if name != "parts"}), options, optimizer)
    spec["trainer"]["partsPerStep"] = parts
    with Job(folder=tmp_path, spec=spec) as job:
        progress = job.train()
    expected = mesh_models.alone(options, name=optimizer["name"], microbatch=microbatch, count=parts)
    found = load_file(tmp_path / "checkpoints" / MODEL_FILE)
    far = mesh_models.difference(expected, [found])
    print(f"{mesh} {options} {optimizer['name']}: {far:.1e}")
    assert far < tolerance
    whole = mesh_users.model(options)
    whole.load_state_dict(found)
    evaluation = mesh_users.evaluate(whole.eval(), mesh_users.dataset({}, "test"))
    assert {name: float(value) for name, value in (progress.evaluation or {}).items()} == pytest.approx(
        evaluation, rel=1e-5
    )


@pytest.mark.parametrize(
    "shape",
    [
        {"worker": {"replicas": 2}},
        served("Sync", servers=1),
        cut(data=2, pipeline=2, schedule="OneForwardOneBackward", sharding="FullyShard"),
    ],
    ids=["whole", "servers", "sharded pipeline"],
)
def test_blocks_that_backward_computes_again_learn_the_same(tmp_path: Path, shape: dict[str, Any]) -> None:
    shutil.copy(FILE, tmp_path)
    spec = users_spec(shape, {}, SGD)
    spec["trainer"] |= {"activationCheckpointing": True, "partsPerStep": 2, "evaluate": None}
    with Job(folder=tmp_path, spec=spec) as job:
        job.train()
    microbatch = 1 if "modelParallel" in spec["strategy"] else None
    expected = mesh_models.alone({}, name="SGD", microbatch=microbatch, count=2)
    assert mesh_models.difference(expected, [load_file(tmp_path / "checkpoints" / MODEL_FILE)]) < 1e-12


def test_the_users_own_cut_and_plan_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(FILE, tmp_path)
    spec = users_spec(cut(tensor=2, pipeline=2), {}, ADAMW)
    spec["trainer"] |= {"parallelize": "mesh_users:parallelize", "pipelineSplit": "mesh_users:split"}
    with Job(folder=tmp_path, spec=spec) as job:
        job.train()
    found = load_file(tmp_path / "checkpoints" / MODEL_FILE)
    assert mesh_models.difference(mesh_models.alone({}), [found]) < 1e-12
    manifest = (tmp_path / "checkpoints" / f"step-{mesh_models.STEPS:08d}" / "manifest.json").read_text()
    pieces = json.loads(manifest)["tensors"]
    assert len(pieces["layers.0.layer.mlp.0.weight"]["pieces"]) == 2
    assert len(pieces["layers.1.mlp.0.weight"]["pieces"]) == 1
    monkeypatch.setattr(by_name, "PIECE", 5)
    with NamedCheckpoint(tmp_path / "checkpoints" / f"step-{mesh_models.STEPS:08d}") as checkpoint:
        for name, source in checkpoint.sources().items():
            read = [piece.reshape(-1).clone() for piece in source.read()]
            assert max(map(len, read)) <= 5, name
            assert torch.equal(torch.cat(read).view(source.shape), found[name]), name


COUNTED = """
import os
from torch import nn
from disttrain_trainer.examples import digits

def model(config):
    with open("made", "a") as made:
        made.write(f"{os.getpid()}\\n")
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

def evaluate(model, dataset):
    return {**digits.evaluate(model, dataset), "training": model.training}

def size(model, dataset):
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}
"""


@pytest.mark.parametrize(
    ("evaluate", "made", "finds"),
    [("evaluate", 2, {"training": 0.0}), ("size", 3, {"parameters": 64 * 32 + 32 + 32 * 10 + 10})],
)
def test_no_process_makes_the_whole_model_to_evaluate_unless_the_evaluation_asks_for_it(
    tmp_path: Path, evaluate: str, made: int, finds: dict[str, float]
) -> None:
    (tmp_path / "counted.py").write_text(COUNTED)
    trainer = {"model": "counted:model", "evaluate": f"counted:{evaluate}", "epochs": None, "maxSteps": 30}
    with Job(folder=tmp_path, spec=digits(**cut(pipeline=2), trainer=trainer, **checkpoints(100))) as job:
        progress = job.train()
        logs = job.logs()
    assert (progress.evaluation or {}).items() >= finds.items()
    assert len((tmp_path / "made").read_text().split()) == made
    whole = "trainer.evaluate uses model.parameters(), which the stages of a pipeline do not have together: worker-0 puts the whole"
    assert (whole in logs) == (made == 3)
    if evaluate == "evaluate":
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        model.load_state_dict(load_file(tmp_path / "checkpoints" / MODEL_FILE))
        expected = examples.evaluate(model.eval(), examples.dataset({}, "test"))
        assert {name: (progress.evaluation or {})[name] for name in expected} == pytest.approx(expected)


MODEL = """
from torch import nn

def model(config):
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10), nn.Dropout(0.1))
"""
HELD, STEPS = 12, 16


@pytest.mark.parametrize(
    ("mesh", "lost", "goes_on_at", "number"),
    [
        ({"tensor": 2}, 1, 10, signal.SIGKILL),
        ({"pipeline": 2}, 0, 10, signal.SIGKILL),
        ({"pipeline": 2}, 1, 10, signal.SIGSTOP),
        ({"data": 2, "tensor": 2}, 3, HELD, signal.SIGKILL),
        (FULLY_SHARDED, 2, 10, signal.SIGKILL),
        ({"tensor": 2}, 0, 10, signal.SIGSTOP),
        ({"data": 2, "tensor": 2}, 1, HELD, signal.SIGSTOP),
        ({"tensor": 2, "pipeline": 2}, 2, 10, signal.SIGSTOP),
    ],
    ids=[
        "tensor-killed",
        "pipeline-killed",
        "pipeline-frozen",
        "hybrid-killed",
        "sharded-pipeline-killed",
        "tensor-frozen",
        "hybrid-frozen",
        "tensor-pipeline-frozen",
    ],
)
def test_a_lost_process_costs_what_no_other_holds(
    tmp_path: Path,
    calm: Callable[..., Model],
    mesh: dict[str, Any],
    lost: int,
    goes_on_at: int,
    number: signal.Signals,
) -> None:
    trainer = held(model="one_model:model", evaluate=None, epochs=None, maxSteps=STEPS, deterministic=True)
    spec = digits(**cut(**mesh), trainer=trainer, **checkpoints(10))
    (tmp_path / "one_model.py").write_text(MODEL)
    with Job(folder=tmp_path, spec=spec, peer_timeout=2) as job:
        job.hold(HELD)
        job.start()
        job.until_held(HELD, checkpoint=10)
        job.kill(Role.WORKER, lost, number)
        job.let_go()
        if number is signal.SIGSTOP:
            for other in {*range(job.config.workers)} - {lost}:
                job.until(lambda _, other=other: "round 1 ended" in job.log(Role.WORKER, other), timeout=30)
            job.kill(Role.WORKER, lost)
        progress = job.complete()
        assert f"round 2 begins at step {goes_on_at}" in job.logs()
        assert (progress.step, progress.redone_steps) == (STEPS, HELD - goes_on_at)
    assert same(job.model, calm(spec, files={"one_model.py": MODEL}))


MISTAKES = """
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from disttrain_trainer.examples import digits

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 4, 1), nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.conv(x[:, None]).flatten(1))

def plain(config):
    return Plain()

def layers(config):
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

def with_dropout(config):
    return nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 10))

def plan(model, mesh, config):
    return parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "3": RowwiseParallel()})

def regularized(model, batch):
    return digits.loss(model, batch) + model.weight_decay

def failing(model, batch):
    model(batch[0])
    raise ValueError("no such label")
"""


@pytest.mark.parametrize(
    ("mesh", "trainer", "code", "says"),
    [
        ({"tensor": 2}, {"model": "mistakes:plain"}, 2, "no plan for the model of trainer.model"),
        (
            {"tensor": 2},
            {"model": "mistakes:with_dropout", "parallelize": "mistakes:plan"},
            2,
            "trainer.parallelize: 1 draws dropout for a part of an activation",
        ),
        ({"pipeline": 2}, {"model": "mistakes:plain"}, 2, "a Plain cannot be cut into the stages of a pipeline"),
        (
            {"pipeline": 2},
            {"model": "mistakes:layers", "loss": "mistakes:regularized"},
            1,
            "trainer.loss reads model.weight_decay: in a pipeline the loss may only call",
        ),
        ({"pipeline": 2}, {"model": "mistakes:layers", "loss": "mistakes:failing"}, 1, "ValueError: no such label"),
    ],
    ids=["no plan", "another mask", "no stages", "a loss that reads the model", "a loss that fails"],
)
def test_a_mistake_in_a_cut_model_is_said_in_one_line(
    tmp_path: Path, mesh: dict[str, Any], trainer: dict[str, Any], code: int, says: str
) -> None:
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    with Job(folder=tmp_path, spec=digits(**cut(**mesh), trainer=trainer | {"evaluate": None})) as job:
        job.start()
        assert job.supervise() == code, job.logs()
        found = [job.termination(Role.WORKER, index).message for index in range(2)]
    assert any(says in message and "\n" not in message for message in found), found
