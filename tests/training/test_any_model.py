"""Models and losses as users have them train here to what a plain loop makes of them, or are refused in one line before the first step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from disttrain.api.names import MODEL_FILE, Role
from disttrain_trainer.data.schedule import Schedule
from training.job import Job, checkpoints, digits, final_parameters, held, served, state

STEPS = 12
SAMPLES, BATCH = 44, 32
ADAMW = {"name": "AdamW", "learningRate": 0.05, "weightDecay": 0.5}
USERS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Branches(nn.Module):
    # `odd` takes part only in batches whose first sample is odd, `never` in none.
    def __init__(self):
        super().__init__()
        self.body, self.odd, self.never = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.body(x) + (self.odd(x) if int(x[0, 0]) % 2 else 0)

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(50, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.table(x[:, 0].long()))

class Indexed(Words):
    # Another way to a sparse gradient, which shows in backward alone.
    def forward(self, x):
        return self.out(nn.functional.embedding(x[:, 0].long(), self.table.weight, sparse=True))

class Table(nn.Module):
    # A buffer that is state and grows, and one that is none and grows.
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.seen = torch.cat([self.seen, torch.ones(1)])
        self.cache = torch.zeros(len(self.cache) + 1)
        return self.body(x)

class Graph(Table):
    def __init__(self):
        super().__init__()
        self.register_buffer("adjacency", torch.eye(4).to_sparse())
        self.register_buffer("phases", torch.zeros(2, dtype=torch.complex128))

    def forward(self, x):
        grown = self.adjacency.to_dense()
        grown[0, 1:] += 1
        self.adjacency, self.phases = grown.to_sparse(), self.phases + 1j
        return self.body(x @ self.adjacency.to_dense().float())

def branches(config):
    torch.manual_seed(0)
    return Branches()

def words(config):
    torch.manual_seed(0)
    return Words()

def indexed(config):
    torch.manual_seed(0)
    return Indexed()

def table(config):
    torch.manual_seed(0)
    return Table()

def graph(config):
    return Graph()

def dataset(config, split="train"):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(44, 4, generator=generator)
    x[:, 0] = torch.arange(44)
    return TensorDataset(x, torch.randn(44, 3, generator=generator), torch.arange(44) % 5)

def loss(model, batch):
    x, y, _ = batch
    return nn.functional.mse_loss(model(x), y)

def counted(model, batch):
    # Samples of number 0 to 4 tokens; a part without any has the mean 0 / 0.
    x, y, tokens = batch
    tokens = torch.where(x[:, 0] < 20, tokens, 0)
    return ((model(x) - y).square().mean(1) * tokens).sum() / tokens.sum(), tokens.sum()

def masked(model, batch):
    # The mean alone.
    return counted(model, batch)[0]

def weightless(model, batch):
    return loss(model, batch), -1.0

def unfreezing(model, batch):
    model.calls = getattr(model, "calls", 0) + 1
    model.body.weight.requires_grad_(model.calls > 3)
    return loss(model, batch)

def replacing(model, batch):
    # In the last step.
    model.calls = getattr(model, "calls", 0) + 1
    if model.calls == 12:
        model.body = nn.Linear(4, 3)
    return loss(model, batch)

def backward(model, batch):
    found = loss(model, batch)
    found.backward(retain_graph=True)
    return found

def frozen(config):
    model = table(config)
    model.body.weight.requires_grad_(False)
    return model
"""


def job(folder: Path, *, strategy: str, workers: int, every: int = 1000, **trainer: Any) -> Job:
    folder.mkdir(exist_ok=True)
    (folder / "users.py").write_text(USERS)
    chosen = {
        "dataset": "users:dataset",
        "loss": "users:loss",
        "evaluate": None,
        "epochs": None,
        "maxSteps": STEPS,
        "batchSize": BATCH,
        "optimizer": ADAMW,
    } | trainer
    spec = digits(worker={"replicas": workers}, trainer=chosen, **checkpoints(every))
    sharded = {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}}
    return Job(folder=folder, spec=spec | {"Sync": served("Sync"), "FullyShard": sharded}.get(strategy, {}))


def trained(folder: Path, like: torch.nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    """The parameters by name after a job."""
    with job(folder, **options) as running:
        running.train()
    if options["strategy"] == "FullyShard":
        return load_file(folder / "checkpoints" / MODEL_FILE)
    if options["strategy"] != "Sync":
        return {name: state(folder, STEPS)[f"model.{name}"] for name, _ in like.named_parameters()}
    flat, found, at = final_parameters(folder, STEPS), {}, 0
    for name, parameter in like.named_parameters():
        found[name], at = flat[at : at + parameter.numel()].view(parameter.shape), at + parameter.numel()
    return found


def by_hand(users: dict[str, Any], model: str, loss: str, *, workers: int, weighted: bool) -> torch.nn.Module:
    """What a plain loop makes of the model on the same parts of the same batches."""
    module, data = users[model]({}), users["dataset"]({})
    if hasattr(module, "table"):
        module.table.sparse = False  # torch's own AdamW takes dense ones only
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.5)
    schedule = Schedule(samples=SAMPLES, batch_size=BATCH, parts_per_step=workers, seed=0, max_steps=STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = [schedule.part(step * workers + worker) for worker in range(workers)]
        found = []
        for part in parts:
            if part.samples:
                said = users[loss](module, data[torch.tensor(part.indices)])
                found.append((said[0], float(said[1])) if weighted else (said, part.samples))
        total = sum(weight for _, weight in found)
        for mean, weight in found:
            if weight:
                (mean * (weight / total)).backward()
        optimizer.step()
    return module


@pytest.mark.parametrize(
    ("strategy", "workers", "more"),
    [
        ("DataParallel", 1, {}),
        ("DataParallel", 3, {}),
        ("DataParallel", 2, {"findUnusedParameters": True}),
        ("Sync", 2, {}),
    ],
    ids=["one worker", "three", "two that search", "servers"],
)
@pytest.mark.parametrize(
    ("model", "loss"),
    [("branches", "loss"), ("words", "loss"), ("branches", "counted")],
    ids=["parts that take no part", "sparse gradients", "a mean over tokens"],
)
def test_a_job_trains_what_a_plain_loop_trains(
    model: str, loss: str, strategy: str, workers: int, more: dict[str, Any], tmp_path: Path
) -> None:
    users: dict[str, Any] = {}
    exec(USERS, users)
    expected = by_hand(users, model, loss, workers=workers, weighted=loss == "counted")
    found = trained(
        tmp_path, expected, strategy=strategy, workers=workers, model=f"users:{model}", loss=f"users:{loss}", **more
    )
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", ["branches", "words"])
def test_a_model_that_is_cut_over_its_workers_trains_so_too(model: str, tmp_path: Path) -> None:
    users: dict[str, Any] = {}
    exec(USERS, users)
    expected = by_hand(users, model, "loss", workers=2, weighted=False)
    found = trained(tmp_path, expected, strategy="FullyShard", workers=2, model=f"users:{model}", loss="users:loss")
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), atol=1e-5, rtol=0)


def test_a_sparse_gradient_that_shows_in_backward_alone_is_refused_where_the_model_is_cut(tmp_path: Path) -> None:
    with job(tmp_path, strategy="FullyShard", workers=2, model="users:indexed") as running:
        running.start()
        assert running.wait(Role.WORKER, 0) == 1
        assert "the gradient of parameter table.weight is sparse" in running.termination(Role.WORKER, 0).message


@pytest.mark.parametrize(("strategy", "workers"), [("DataParallel", 3), ("Sync", 2)])
def test_a_mean_over_tokens_without_its_weight_trains_what_one_process_trains(
    strategy: str, workers: int, tmp_path: Path
) -> None:
    users: dict[str, Any] = {}
    exec(USERS, users)
    expected = by_hand(users, "words", "masked", workers=1, weighted=False)
    found = trained(tmp_path, expected, strategy=strategy, workers=workers, model="users:words", loss="users:masked")
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), atol=1e-5, rtol=0)


def test_a_lost_worker_and_a_resume_take_buffers_over_as_they_have_grown(tmp_path: Path) -> None:
    trainer = held(model="users:table")
    with job(tmp_path, strategy="DataParallel", workers=2, every=4, **trainer) as running:
        with (tmp_path / "held_loss.py").open("a") as file:
            file.write("\nimport users\ndigits.loss = users.loss\n")
        running.hold(6)
        running.start()
        running.until_held(6, checkpoint=4)
        running.kill(Role.WORKER, 1)
        running.wait(Role.WORKER, 1)
        running.start_one(Role.WORKER, 1)
        running.let_go()
        running.complete()
    assert len(state(tmp_path, STEPS)["model.seen"]) >= 1 + STEPS
    assert "model.cache" not in state(tmp_path, STEPS)
    with job(tmp_path, strategy="DataParallel", workers=2, model="users:table", maxSteps=2 * STEPS) as running:
        running.config = running.config.model_copy(update={"attempt": 2})
        running.train()
    assert len(state(tmp_path, 2 * STEPS)["model.seen"]) >= 1 + 2 * STEPS


@pytest.mark.parametrize("strategy", ["DataParallel", "Sync"])
def test_sparse_and_complex_buffers_are_shared_saved_and_resumed_as_others_are(tmp_path: Path, strategy: str) -> None:
    for attempt, steps in enumerate((STEPS, 2 * STEPS), start=1):
        with job(tmp_path, strategy=strategy, workers=2, model="users:graph", maxSteps=steps) as running:
            running.config = running.config.model_copy(update={"attempt": attempt})
            running.train()
        (file,) = (tmp_path / "checkpoints" / f"step-{steps:08}").glob(
            "[bs][ut][fa]*.safetensors"
        )  # buffers- or state-
        saved = {name.removeprefix("model."): value for name, value in load_file(file).items()}
        assert saved["phases::complex128"].tolist() == [[0, steps]] * 2
        assert saved["adjacency::sparse_coo.values"].tolist() == [1, steps, steps, steps, 1, 1, 1]


@pytest.mark.parametrize("strategy", ["DataParallel", "Sync"])
@pytest.mark.parametrize(
    ("trainer", "code", "said"),
    [
        ({"model": "users:table", "loss": "users:weightless"}, 1, "trainer.loss returned the weight -1.0"),
        ({"model": "users:frozen", "loss": "users:unfreezing"}, 1, "parameter body.weight was frozen"),
        ({"model": "users:table", "loss": "users:replacing"}, 1, "parameter body.weight was added or replaced"),
        ({"model": "users:table", "loss": "users:backward"}, 1, "trainer.loss calls backward() itself"),
    ],
    ids=[
        "negative weight",
        "unfrozen later",
        "replaced in the last step",
        "backward of the loss's own",
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    tmp_path: Path, trainer: dict[str, str], code: int, said: str, strategy: str
) -> None:
    with job(tmp_path, strategy=strategy, workers=1, **trainer) as running:
        running.start()
        assert running.wait(Role.WORKER, 0) == code
        assert running.termination(Role.WORKER, 0).message.startswith(said)
