"""What is trained: model, data and loss of a job, made from its factories. The same for every strategy.

Not here: how gradients travel (parallel/, parameter_server/), and the order of the samples (data/slices.py).
"""

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from disttrain.api.runtime import JobConfig
from disttrain.api.spec import Backend
from disttrain_trainer.data.batches import Fetch, fetcher
from disttrain_trainer.data.slices import Schedule, Slice
from disttrain_trainer.errors import UserError, WrongInput
from disttrain_trainer.factories import add_current_folder, resolve

Loss = Callable[[nn.Module, Any], torch.Tensor]
Evaluation = dict[str, float]


@dataclass(slots=True, kw_only=True)
class Task:
    """The user's part of a training, ready to be stepped through."""

    model: nn.Module
    loss: Loss
    schedule: Schedule
    fetch: Fetch
    device: torch.device
    evaluate: Callable[[], Evaluation] | None

    deterministic: bool

    def seed(self, piece: Slice) -> None:
        """Sets torch's generator for a slice, so that dropout does not depend on who computes the slice, nor on restarts.

        Those of Python and numpy, which a dataset may use, cost more than a small model's step: only when the job asks for it.
        """
        seed = mix(self.schedule.seed, piece.index)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        if self.deterministic:
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)


def mix(seed: int, number: int) -> int:
    """A seed of 64 bits for each pair of numbers below 2^63: another one for each number, and seemingly unrelated (splitmix64)."""
    mask = (1 << 64) - 1
    seed = (seed * 0x9E3779B97F4A7C15 + number) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        seed = (seed ^ (seed >> shift)) * factor & mask
    return seed ^ (seed >> 31)


def seed_all(seed: int) -> None:
    """Before each call of a factory, so that every process makes the same, and a dataset draws the same split each time."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def build(config: JobConfig, *, local_rank: int) -> Task:
    """Makes the task. Raises WrongInput, or what the user's factories raise."""
    trainer = config.trainer
    assert trainer.model, "scripts and commands are run by others"
    assert trainer.dataset, "the schema demands it beside a model"
    add_current_folder()
    resolved = {
        "trainer.model": resolve("trainer.model", trainer.model, "config"),
        "trainer.dataset": resolve("trainer.dataset", trainer.dataset, "config", "split"),
    }
    loss = resolve("trainer.loss", trainer.loss, "model", "batch") if trainer.loss else cross_entropy
    evaluate = resolve("trainer.evaluate", trainer.evaluate, "model", "dataset") if trainer.evaluate else None
    if trainer.deterministic:
        _be_deterministic()
    device = choose_device(config, local_rank=local_rank)
    options = dict(trainer.config or {})
    seed_all(trainer.seed)
    model = resolved["trainer.model"](dict(options))
    if not isinstance(model, nn.Module):
        raise WrongInput(
            f"trainer.model: {trainer.model!r} returned a {type(model).__name__}; expected a torch.nn.Module"
        )
    seed_all(trainer.seed)
    dataset = resolved["trainer.dataset"](dict(options), "train")
    fetch = fetcher(dataset, device=device, field=f"trainer.dataset: {trainer.dataset!r}")
    model.to(device)
    schedule = Schedule(
        samples=len(dataset),
        batch_size=trainer.batch_size,
        world_size=config.world_size,
        seed=trainer.seed,
        epochs=trainer.epochs,
        max_steps=trainer.max_steps,
    )

    def evaluate_on_test() -> Evaluation:
        assert evaluate is not None
        seed_all(trainer.seed)
        test = resolved["trainer.dataset"](dict(options), "test")
        model.eval()
        with torch.no_grad():
            found = evaluate(model, test)
        model.train()
        try:
            return {str(name): float(value) for name, value in found.items()}
        except (AttributeError, TypeError, ValueError):
            raise WrongInput(
                f"trainer.evaluate: {trainer.evaluate!r} returned {found!r:.200}; expected a dict of names and numbers"
            ) from None

    return Task(
        model=model,
        loss=loss,
        schedule=schedule,
        fetch=fetch,
        device=device,
        evaluate=evaluate_on_test if evaluate else None,
        deterministic=trainer.deterministic,
    )


class Objective:
    """The user's loss of a batch, checked to be one."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self._model = model
        self._loss = loss

    def __call__(self, batch: Any) -> torch.Tensor:
        loss = self._loss(self._model, batch)
        if not isinstance(loss, torch.Tensor) or loss.dim():
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
            raise UserError(
                f"trainer.loss returned a {type(loss).__name__}{shape}; expected the batch's mean loss, a scalar tensor"
            )
        return loss


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss where the job names none: cross entropy of (input, target). Raises UserError for data that it does not fit."""
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        count = f" of {len(batch)}" if isinstance(batch, list | tuple | dict) else ""
        raise UserError(
            "trainer.loss is not set, which means cross entropy of (input, target), but a batch of trainer.dataset is a "
            f"{type(batch).__name__}{count}: set trainer.loss"
        )
    inputs, targets = batch
    outputs = model(inputs)
    try:
        return nn.functional.cross_entropy(outputs, targets)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        what = [
            f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            for x in (outputs, targets)
        ]
        raise UserError(
            f"trainer.loss is not set, and cross entropy of what the model gives ({what[0]}) and the targets ({what[1]}) "
            f"fails: {error}: set trainer.loss"
        ) from None


def choose_device(config: JobConfig, *, local_rank: int) -> torch.device:
    """The GPU of this process, or the CPU. Raises WrongInput when the job asks for GPUs and none is there."""
    if config.gpus_per_worker == 0:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise WrongInput(
            f"worker.gpusPerWorker is {config.gpus_per_worker}, but torch sees {torch.cuda.device_count()} GPUs here; "
            "use a node and an image with CUDA, or set it to 0"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_backend(config: JobConfig, device: torch.device) -> str:
    """nccl between GPUs, gloo elsewhere, unless the job says which."""
    if config.trainer.backend is not Backend.AUTO:
        return str(config.trainer.backend.value)
    return "nccl" if device.type == "cuda" else "gloo"


def _be_deterministic() -> None:
    """torch.use_deterministic_algorithms, but torch._inductor, seconds of a start, is imported only by who uses it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(True)
    else:
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # read by torch._inductor, should it ever be imported
        torch.set_deterministic_debug_mode("error")
