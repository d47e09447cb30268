"""trainer.optimizer.factory in whole jobs: what a plain loop trains, also after a resume; and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from disttrain.api.names import MODEL_FILE, Role
from training import mesh_models
from training.job import Job, checkpoints, digits

FILE = Path(__file__).with_name("mesh_users.py")
STEPS, SAVE_STEPS = mesh_models.STEPS, 8
FACTORIES = """
import torch

def nadam(parameters, config):
    return torch.optim.NAdam(parameters, lr=config["rate"], weight_decay=0.1, momentum_decay=0.02)

class Trusting(torch.optim.SGD):
    # Its rate follows the norms of each parameter and its gradient, as that of LAMB: DTensors sum them over the workers.

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                trust = parameter.norm() / (parameter.grad.norm() + 1)
                self.state[parameter]["steps"] = self.state[parameter].get("steps", 0) + 1
                parameter.add_(parameter.grad * trust, alpha=-group["lr"] / self.state[parameter]["steps"] ** 0.5)

def trusting(parameters, config):
    return Trusting(parameters, lr=config["rate"])

class Clipping(torch.optim.SGD):
    def step(self, closure=None):
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.1)
        return super().step(closure)

def clipping(parameters, config):
    return Clipping(parameters, lr=config["rate"])

def fused(parameters, config):
    return torch.optim.AdamW(parameters, fused=True)

def adafactor(parameters, config):
    return torch.optim.Adafactor(parameters)

def nothing(parameters, config):
    return None
"""
DDP: dict[str, Any] = {}
FULLY_SHARDED = {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}}
TENSOR = {"strategy": {"type": "ModelParallel", "modelParallel": {"tensor": 2}}}
PIPELINE = {"strategy": {"type": "ModelParallel", "modelParallel": {"pipeline": 2, "schedule": "GPipe"}}}


class Plain:
    """The factory's optimizer with torch's own warm-up."""

    def __init__(self, model: nn.Module, factory: str) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found: dict[str, Any] = {}
        exec(FACTORIES, found)
        self._optimizer = found[factory](trained, {"rate": 0.01})
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: min(1, (step + 1) / 6))

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        self._optimizer.step()
        self._scheduler.step()


def spec_of(factory: str, shape: dict[str, Any] = DDP) -> dict[str, Any]:
    trainer = {call: f"mesh_users:{call}" for call in ("model", "dataset", "loss")}
    more = {
        "evaluate": None,
        "optimizer": {"factory": f"factories:{factory}"},
        "learningRateSchedule": {"warmupSteps": 5},
        "config": {"rate": 0.01},
        "epochs": None,
        "maxSteps": STEPS,
        "batchSize": mesh_models.BATCH,
        "seed": 3,
    }
    return digits(worker={"replicas": 2}, **shape, **checkpoints(SAVE_STEPS), trainer=trainer | more)


def start(folder: Path, factory: str, shape: dict[str, Any] = DDP, *, attempt: int = 1) -> Job:
    shutil.copy(FILE, folder)
    (folder / "factories.py").write_text(FACTORIES)
    return Job(folder=folder, spec=spec_of(factory, shape), attempt=attempt)


@pytest.mark.parametrize(
    ("factory", "shape", "resumed"),
    [
        ("nadam", DDP, FULLY_SHARDED),
        ("nadam", FULLY_SHARDED, DDP),
        ("trusting", FULLY_SHARDED, FULLY_SHARDED),
        ("trusting", TENSOR, TENSOR),
        ("nadam", PIPELINE, PIPELINE),
    ],
    ids=["ddp to fully sharded", "fully sharded to ddp", "norms", "norms of a tensor plan", "pipeline"],
)
def test_ranks_train_what_a_plain_loop_trains_also_from_a_checkpoint_in_the_middle(
    tmp_path: Path, factory: str, shape: dict[str, Any], resumed: dict[str, Any]
) -> None:
    expected = mesh_models.alone(
        {},
        microbatch=mesh_models.MICROBATCH if shape is PIPELINE else None,
        count=2 if shape in (DDP, FULLY_SHARDED) else 1,
        stepper_of=lambda model: Plain(model, factory),
    )
    for attempt in (1, 2):
        with start(tmp_path, factory, shape if attempt == 1 else resumed, attempt=attempt) as job:
            job.train()
        found = load_file(tmp_path / "checkpoints" / MODEL_FILE)
        assert mesh_models.difference(expected, [found]) < 1e-12
        for folder in (2 * SAVE_STEPS, STEPS):
            shutil.rmtree(tmp_path / "checkpoints" / f"step-{folder:08}")


@pytest.mark.parametrize(
    ("factory", "shape", "said"),
    [
        (
            "clipping",
            PIPELINE,
            "trainer.optimizer.factory: a step of Clipping on the parts of the model is another one than on",
        ),
        ("adafactor", FULLY_SHARDED, "trainer.optimizer.factory: the step of Adafactor fails on the parts"),
        ("adafactor", PIPELINE, "trainer.optimizer.factory: the state 'row_var' of parameter"),
        (
            "fused",
            TENSOR,
            "trainer.optimizer.factory: the step of AdamW takes parameters that are cut over the workers together",
        ),
    ],
)
def test_an_optimizer_that_a_cut_model_cannot_have_is_refused_before_the_first_step(
    tmp_path: Path, factory: str, shape: dict[str, Any], said: str
) -> None:
    with start(tmp_path, factory, shape) as job:
        job.start()
        assert job.wait(Role.WORKER, 0) == 2
        assert job.termination(Role.WORKER, 0).message.startswith(said)


def test_what_is_no_optimizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with start(tmp_path, "nothing") as job:
        job.start()
        assert job.wait(Role.WORKER, 0) == 2
        said = job.termination(Role.WORKER, 0).message
    assert said.startswith("trainer.optimizer.factory returned a NoneType; expected a torch.optim.Optimizer")


@pytest.mark.parametrize("factory", ["nadma"])
def test_a_function_that_is_not_there_is_refused_with_the_name_that_is_near(tmp_path: Path, factory: str) -> None:
    with start(tmp_path, factory) as job:
        job.start()
        assert job.wait(Role.WORKER, 0) == 2
        assert "did you mean 'nadam'?" in job.termination(Role.WORKER, 0).message
