"""trainer.learningRateSchedule and trainer.optimizer.groups: every strategy trains what a plain loop trains.

The plain loop has torch's own optimizers, groups of parameters and schedulers.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, SequentialLR, StepLR

from cluster.processes import wait_for
from disttrain.api.names import MODEL_FILE, Role
from training import mesh_models
from training.job import Job, checkpoints, digits, served

FILE = Path(__file__).with_name("mesh_users.py")
STEPS, WARMUP_STEPS, LATER, CLIP = 50, 9, 20, 1.0
DECAYING = STEPS - WARMUP_STEPS
GROUPS = [{"match": "(bias|norm)", "weightDecay": 0}, {"match": r"mlp\.0", "learningRate": 0.004}]
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"name": "SGD", "learningRate": 0.05, "momentum": 0.9, "weightDecay": 0.01, "groups": GROUPS},
    "AdamW": {"name": "AdamW", "learningRate": 0.01, "weightDecay": 0.05, "groups": GROUPS},
}
TOLERANCE = {"SGD": 1e-6, "AdamW": 1e-12}
SCHEDULES: dict[str, dict[str, Any]] = {
    "Cosine": {"type": "Cosine", "warmupSteps": WARMUP_STEPS, "minimumFactor": 0.1},
    "Linear": {"type": "Linear", "warmupSteps": WARMUP_STEPS},
    "Step": {"type": "Step", "warmupSteps": WARMUP_STEPS, "stepSize": 10, "gamma": 0.5},
}
SERVERS = {count: {**served("Sync", servers=count), "worker": {"replicas": 2}} for count in (1, 2, 3)}
ASYNC = {**served("Async", servers=1), "worker": {"replicas": 1}}
DDP = {"worker": {"replicas": 2}}
FULLY_SHARDED = {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}, **DDP}
TENSOR = {"strategy": {"type": "ModelParallel", "modelParallel": {"tensor": 2}}, **DDP}
PIPELINE = {"strategy": {"type": "ModelParallel", "modelParallel": {"pipeline": 2, "schedule": "GPipe"}}, **DDP}


SLOW = """
import time
from pathlib import Path
import mesh_users

CALLS = []

def loss(model, batch):
    CALLS.append(1)
    while len(CALLS) > 25 and not Path("go").exists():
        time.sleep(0.01)
    return mesh_users.loss(model, batch)
"""


class Plain:
    """torch's own optimizer and schedulers."""

    def __init__(self, model: nn.Module, name: str, schedule: str, *, later: float | None = None) -> None:
        """later: the learning rate from step LATER on."""
        self._model, self._name, self._schedule, self._later = model, name, schedule, later
        self._steps = 0
        rate = SETTINGS[name]["learningRate"]
        rest, still, slow = groups_of(model)
        groups = [{"params": rest}, {"params": still, "weight_decay": 0}, {"params": slow, "lr": 0.004}]
        self._optimizer = (
            SGD(groups, lr=rate, momentum=0.9, weight_decay=0.01)
            if name == "SGD"
            else AdamW(groups, lr=rate, weight_decay=0.05)
        )
        self._scheduler = scheduler_of(schedule, self._optimizer)

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        if self._later is not None and self._steps == LATER:
            for group, rate in zip(self._optimizer.param_groups, (self._later, self._later, 0.004), strict=True):
                group["lr"] = rate
            self._scheduler = scheduler_of(self._schedule, self._optimizer)
            for _ in range(LATER):
                self._scheduler.step()
        self._optimizer.step()
        self._scheduler.step()
        self._steps += 1


def groups_of(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of no match, and of each one of GROUPS."""
    rest, still, slow = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (still if "bias" in name or "norm" in name else slow if "mlp.0" in name else rest).append(parameter)
    return rest, still, slow


def scheduler_of(schedule: str, optimizer: Optimizer) -> LRScheduler:
    """Of the rates that the groups have now."""
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)
    rise = LinearLR(optimizer, start_factor=1 / (WARMUP_STEPS + 1), total_iters=WARMUP_STEPS)
    decay: LRScheduler
    match schedule:
        case "Cosine":
            decay = LambdaLR(
                optimizer, lambda step: 0.1 + 0.9 * (1 + math.cos(math.pi * step / DECAYING)) / 2
            )  # CosineAnnealingLR has one eta_min for all groups
        case "Linear":
            decay = LinearLR(optimizer, start_factor=1, end_factor=0, total_iters=DECAYING)
        case _:
            decay = StepLR(optimizer, step_size=10, gamma=0.5)
    return SequentialLR(optimizer, [rise, decay], milestones=[WARMUP_STEPS])


def spec_of(
    shape: dict[str, Any], name: str, schedule: str, options: dict[str, Any], **optimizer: Any
) -> dict[str, Any]:
    trainer = {call: f"mesh_users:{call}" for call in ("model", "dataset", "loss")}
    more = {
        "evaluate": None,
        "optimizer": SETTINGS[name] | optimizer,
        "learningRateSchedule": SCHEDULES[schedule],
        "maxGradientNorm": CLIP,
        "config": options,
        "epochs": None,
        "maxSteps": STEPS,
        "batchSize": mesh_models.BATCH,
        "seed": 3,
    }
    return digits(**shape, **checkpoints(LATER), trainer=trainer | more)


def train(folder: Path, spec: dict[str, Any], *, attempt: int = 1) -> dict[str, Any]:
    """The trained model."""
    shutil.copy(FILE, folder)
    with Job(folder=folder, spec=spec, attempt=attempt) as job:
        job.train()
    return load_file(folder / "checkpoints" / MODEL_FILE)


@pytest.mark.parametrize(
    ("shape", "name", "schedule", "options"),
    [
        (SERVERS[1], "SGD", "Cosine", {}),
        (SERVERS[2], "AdamW", "Step", {"tied": True}),
        (SERVERS[3], "AdamW", "Cosine", {"tied": True, "frozen": True}),
        (ASYNC, "AdamW", "Linear", {"frozen": True}),
        (DDP, "AdamW", "Cosine", {"tied": True, "frozen": True}),
        (FULLY_SHARDED, "AdamW", "Cosine", {"tied": True}),
        (TENSOR, "AdamW", "Linear", {"tied": True}),
        (PIPELINE, "SGD", "Cosine", {}),
    ],
    ids=["1 server", "2 servers", "3 servers", "async", "ddp", "fully sharded", "tensor", "pipeline"],
)
def test_a_job_trains_what_a_plain_loop_trains_with_torchs_own_schedulers(
    tmp_path: Path, shape: dict[str, Any], name: str, schedule: str, options: dict[str, Any]
) -> None:
    options = options | {"dtype": "float32" if name == "SGD" else "float64"}
    parts = 2 if shape in (*SERVERS.values(), DDP, FULLY_SHARDED) else 1
    found = train(tmp_path, spec_of(shape, name, schedule, options))
    expected = mesh_models.alone(
        options,
        microbatch=mesh_models.BATCH // 4 if shape is PIPELINE else None,
        count=parts,
        steps=STEPS,
        clip=CLIP,
        stepper_of=lambda model: Plain(model, name, schedule),
    )
    assert mesh_models.difference(expected, [found]) < TOLERANCE[name]


@pytest.mark.parametrize("shape", [SERVERS[2], DDP], ids=["servers", "ddp"])
def test_a_job_that_is_resumed_with_a_lower_rate_goes_on_at_its_step(tmp_path: Path, shape: dict[str, Any]) -> None:
    train(tmp_path, spec_of(shape, "AdamW", "Cosine", {}))
    for step in (2 * LATER, STEPS):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:08}")
    found = train(tmp_path, spec_of(shape, "AdamW", "Cosine", {}, learningRate=0.002), attempt=2)
    expected = mesh_models.alone(
        {},
        microbatch=None,
        count=2,
        steps=STEPS,
        clip=CLIP,
        stepper_of=lambda model: Plain(model, "AdamW", "Cosine", later=0.002),
    )
    assert mesh_models.difference(expected, [found]) < TOLERANCE["AdamW"]


def test_a_server_that_begins_from_its_copy_goes_on_with_the_rates_and_groups(tmp_path: Path) -> None:
    shutil.copy(FILE, tmp_path)
    (tmp_path / "slow_users.py").write_text(SLOW)
    spec = spec_of(SERVERS[2], "AdamW", "Cosine", {})
    spec["strategy"]["parameterServer"] = {"consistency": "Sync", "replication": 2}
    spec["trainer"]["loss"] = "slow_users:loss"
    with Job(folder=tmp_path, spec=spec) as job:
        job.start()
        wait_for("a copy of each shard", lambda: job.logs().count("has a copy on") == 2 or None, 60)
        job.kill(Role.PARAMETER_SERVER, 0)
        job.wait(Role.PARAMETER_SERVER, 0)
        job.start_one(Role.PARAMETER_SERVER, 0)
        (tmp_path / "go").touch()
        job.complete()
        assert "the copies of its shards take their places" in job.log(Role.MASTER)
    found = load_file(tmp_path / "checkpoints" / MODEL_FILE)
    expected = mesh_models.alone(
        {}, microbatch=None, count=2, steps=STEPS, clip=CLIP, stepper_of=lambda model: Plain(model, "AdamW", "Cosine")
    )
    assert mesh_models.difference(expected, [found]) < TOLERANCE["AdamW"]
