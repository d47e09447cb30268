"""A model whose parameters are cut over the workers learns what one process learns that computes the same parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from disttrain.api.names import MODEL_FILE
from disttrain_trainer.data.schedule import Schedule
from training.job import Job, checkpoints, digits

STEPS = 20
SAMPLES, BATCH = 100, 32
"""The fourth batch has 4 samples, fewer than some workers have parts."""

USERS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 30), nn.Linear(30, 12)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x + self.scale * self.down(self.up(self.norm(x)).tanh())

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 12)
        self.frozen = nn.Linear(12, 12)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.register_buffer("mean", torch.zeros(12))
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        x = self.frozen(self.words(x))
        for block in self.blocks:
            x = block(x)
        centred = x - self.mean
        if self.training:
            self.mean = self.mean.lerp(x.detach().mean(0), 0.1)
        return self.head(centred)

def model(config):
    return Model().to(getattr(torch, config["dtype"]))

def dataset(config, split):
    torch.manual_seed(1)
    return TensorDataset(torch.randint(11, (config["samples"],)), torch.randint(11, (config["samples"],)))

def loss(model, batch):
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets)

def evaluate(model, dataset):
    return {"loss": loss(model, dataset.tensors).item()}
"""
NAMES = {name: f"users_model:{name}" for name in ("model", "dataset", "loss", "evaluate")}
SGD = {"name": "SGD", "learningRate": 0.05, "momentum": 0.5}
ADAMW = {"name": "AdamW", "learningRate": 0.01}
FULLY = {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}}


def hybrid(size: int) -> dict[str, Any]:
    return {
        "strategy": {"type": "DataParallel", "dataParallel": {"sharding": "HybridShard", "shardSize": size}},
    }


def spec_of(
    strategy: dict[str, Any], *, workers: int, optimizer: dict[str, Any], dtype: str, **trainer: Any
) -> dict[str, Any]:
    chosen = {
        **NAMES,
        "optimizer": optimizer,
        "batchSize": BATCH,
        "epochs": None,
        "maxSteps": STEPS,
        "config": {"dtype": dtype, "samples": SAMPLES},
    }
    return digits(**strategy, worker={"replicas": workers}, trainer=chosen | trainer, **checkpoints(100))


def expected(users: Any, *, parts: int, optimizer: dict[str, Any], dtype: str) -> dict[str, torch.Tensor]:
    """One process that computes the same parts one after the other, by plain PyTorch."""
    config = {"dtype": dtype, "samples": SAMPLES}
    torch.manual_seed(0)
    model: nn.Module = users.model(config)
    inputs, targets = users.dataset(config, "train").tensors
    schedule = Schedule(samples=SAMPLES, batch_size=BATCH, parts_per_step=parts, seed=0, max_steps=STEPS)
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = (
        torch.optim.SGD(trained, lr=0.05, momentum=0.5)
        if optimizer is SGD
        else torch.optim.AdamW(trained, lr=0.01, weight_decay=0)
    )
    for step in range(STEPS):
        kind.zero_grad()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        left = before
        for number in range(parts):
            part = schedule.part(step * parts + number)
            if not part.samples:
                continue
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
            indices = torch.tensor(part.indices)
            (users.loss(model, [inputs[indices], targets[indices]]) * (part.samples / part.batch_samples)).backward()
            if not number:
                left = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for name, buffer in model.named_buffers():
            buffer.copy_(left[name])
        kind.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def users_module(folder: Path) -> Any:
    (folder / "users_model.py").write_text(USERS)
    names: dict[str, Any] = {}
    exec(USERS, names)
    return type("Users", (), {name: staticmethod(value) for name, value in names.items() if callable(value)})


@pytest.mark.parametrize(
    ("strategy", "workers", "optimizer", "dtype", "tolerance"),
    [
        (FULLY, 3, SGD, "float32", 1e-6),
        (FULLY, 2, ADAMW, "float64", 1e-12),
        (hybrid(2), 4, ADAMW, "float64", 1e-12),
    ],
    ids=["full-3-sgd", "full-2-adamw", "hybrid-2x2-adamw"],
)
def test_a_sharded_model_learns_what_one_process_learns(
    tmp_path: Path, strategy: dict[str, Any], workers: int, optimizer: dict[str, Any], dtype: str, tolerance: float
) -> None:
    users = users_module(tmp_path)
    with Job(folder=tmp_path, spec=spec_of(strategy, workers=workers, optimizer=optimizer, dtype=dtype)) as job:
        progress = job.train()
    assert progress.evaluation is not None
    trained = load_file(tmp_path / "checkpoints" / MODEL_FILE)
    wanted = expected(users, parts=workers, optimizer=optimizer, dtype=dtype)
    assert trained.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            trained[name], value, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


WEIGHED = """
from users_model import *

class Choosing(Block):
    '''Some parts take a way of their own, and so have parameters to themselves.'''
    def __init__(self):
        super().__init__()
        self.seldom = nn.Linear(12, 12)

    def forward(self, x):
        x = super().forward(x)
        return self.seldom(x) if x[0, 0] > 0.3 else x

def chooser(config):
    model = Model()
    model.blocks[1] = Choosing()
    return model.to(getattr(torch, config["dtype"]))

def weighed(model, batch):
    inputs, targets = batch
    kept = targets > 7
    losses = nn.functional.cross_entropy(model(inputs), targets, reduction="none")
    return (losses * kept).sum() / kept.sum(), kept.sum()
"""


def test_own_weights_and_parameters_that_only_some_parts_use_count_as_in_one_process(tmp_path: Path) -> None:
    users_module(tmp_path)
    (tmp_path / "weighed_model.py").write_text(WEIGHED)
    names: dict[str, Any] = {}
    exec(USERS + WEIGHED.replace("from users_model import *", ""), names)
    parts, chosen = 5, {"model": "weighed_model:chooser", "loss": "weighed_model:weighed", "partsPerStep": 5}
    spec = spec_of(FULLY, workers=2, optimizer=SGD, dtype="float64", **chosen)
    with Job(folder=tmp_path, spec=spec) as job:
        job.train()
    trained = load_file(tmp_path / "checkpoints" / MODEL_FILE)
    config = {"dtype": "float64", "samples": SAMPLES}
    torch.manual_seed(0)
    model = names["chooser"](config)
    inputs, targets = names["dataset"](config, "train").tensors
    schedule = Schedule(samples=SAMPLES, batch_size=BATCH, parts_per_step=parts, seed=0, max_steps=STEPS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.5)
    used = []
    for step in range(STEPS):
        optimizer.zero_grad()
        cut = [schedule.part(step * parts + number) for number in range(parts)]
        batches = [[inputs[torch.tensor(p.indices)], targets[torch.tensor(p.indices)]] for p in cut if p.samples]
        total = sum(int((batch[1] > 7).sum()) for batch in batches)
        mean, left = model.mean.clone(), model.mean
        for number, batch in enumerate(batches):
            model.mean = mean.clone()
            loss, weight = names["weighed"](model, batch)
            left = left if number else model.mean.clone()
            if weight:
                (loss * (float(weight) / total)).backward()
        model.mean = left
        used.append(model.blocks[1].seldom.weight.grad is not None)
        optimizer.step()
    assert len(set(used)) == 2, "some steps use it, some do not"
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=1e-12, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
