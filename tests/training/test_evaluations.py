"""Evaluations between two steps: at the version of their step, the same after a kill, and what they decide."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from disttrain.api.names import MODEL_FILE, Role
from training.job import Job, checkpoints, digits, manifests, served
from training.test_hybrid_servers import grouped

USERS = """
import json, os, time
from pathlib import Path
import torch
from disttrain_trainer.examples import digits

def found_before():
    path = Path("evaluations")
    return path.read_text().splitlines() if path.exists() else []

def speaks(model):
    mesh = getattr(next(model.parameters(), None), "device_mesh", None)
    return mesh is None or mesh.mesh_dim_names != ("tensor",) or not mesh.get_local_rank()

def evaluate(model, dataset):
    if len(dataset) == 2:  # before the first step
        return {"accuracy": 0.0, "loss": 0.0}
    hold = Path("hold-evaluation")
    if hold.exists() and speaks(model) and len(found_before()) == int(hold.read_text()):
        Path("evaluating.new").write_text(os.environ["DISTTRAIN_INDEX"])
        Path("evaluating.new").rename("evaluating")
        while hold.exists():
            time.sleep(0.01)
    images, labels = (torch.stack([torch.as_tensor(sample[part]) for sample in dataset]) for part in (0, 1))
    outputs = model(images)
    found = {
        "accuracy": (outputs.argmax(1) == labels).double().mean().item(),
        "loss": torch.nn.functional.cross_entropy(outputs.double(), labels).item(),
    }
    if speaks(model):
        with open("evaluations", "a") as file:
            file.write(json.dumps([len(dataset), found["loss"]]) + "\\n")
    return found

def evaluate_means(model, dataset):
    return {name: (value, len(dataset)) for name, value in evaluate(model, dataset).items()}

class Hooks:
    def say(self, *words):
        with open(f"hooks-{os.environ['DISTTRAIN_INDEX']}", "a") as file:
            print(*words, file=file)

    def on_start(self, task):
        self.say("start", task.rank, task.world_size, task.total_steps)

    def on_step(self, step, loss, metrics):
        self.say("step", step, loss > 0)

    def on_evaluate(self, metrics):
        self.say("evaluate")
        return len(found_before()) == 2

def evaluate_state(model, dataset):
    model.state_dict()
    return evaluate(model, dataset)

def evaluate_worse(model, dataset):
    found = evaluate(model, dataset)
    if len(dataset) == 2:
        return found
    return {**found, "accuracy": 1 / len(set(found_before()))}

def model(config):
    return torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
"""

PIPELINE = {"strategy": {"type": "ModelParallel", "modelParallel": {"pipeline": 2}}, "worker": {"replicas": 2}}
SHARDED = {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}}
STRATEGIES: dict[str, dict[str, Any]] = {
    "DataParallel": {},
    "Sync": served("Sync"),
}
GROUPS = grouped(tensor=2, servers=1)


def users(folder: Path, fields: dict[str, Any], *, every: int = 10, **trainer: Any) -> dict[str, Any]:
    """A digits job of 20 steps that is evaluated each 5 of them."""
    (folder / "users.py").write_text(USERS)
    chosen = {
        "evaluate": "users:evaluate",
        "evaluateEverySteps": 5,
        "epochs": None,
        "maxSteps": 20,
        "deterministic": True,
    }
    return digits(trainer={**chosen, **trainer}, **checkpoints(every) | fields)


def evaluations(folder: Path) -> list[tuple[int, float]]:
    """Samples and loss of each evaluation, without repetitions."""
    return list(dict.fromkeys(tuple(json.loads(line)) for line in (folder / "evaluations").read_text().splitlines()))


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
    return path.read_text()


@pytest.mark.parametrize("strategy", [*STRATEGIES, "groups"])
def test_a_worker_killed_in_an_evaluation_changes_no_figure(tmp_path: Path, strategy: str) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for folder in (calm, killed):
        folder.mkdir()
    fields = (STRATEGIES | {"groups": GROUPS})[strategy]
    cut = {"model": "users:model"} if strategy == "groups" else {}
    with Job(folder=calm, spec=users(calm, fields, **cut)) as job:
        progress = job.train()
    assert progress.evaluation_step == 20
    assert len(evaluations(calm)) == 4
    assert [manifest["step"] for manifest in manifests(calm / "checkpoints") if manifest["evaluation"]] == [10, 20]
    (killed / "hold-evaluation").write_text("1")
    with Job(folder=killed, spec=users(killed, fields, **cut)) as job:
        job.start()
        rank = int(wait_for(killed / "evaluating"))
        # With servers the other worker, or group, trains on meanwhile.
        reached = 10 if strategy == "DataParallel" else 12
        job.until(lambda p: p.step >= reached and p.last_checkpoint is not None and p.last_checkpoint.step == 10)
        job.kill(Role.WORKER, rank)
        (killed / "hold-evaluation").unlink()
        after = job.complete()
    assert evaluations(killed) == evaluations(calm)
    assert (after.evaluation, after.evaluation_step) == (progress.evaluation, 20)
    then, now = ([m["evaluation"] for m in manifests(folder / "checkpoints")] for folder in (calm, killed))
    assert then == now


@pytest.mark.parametrize("strategy", [*STRATEGIES, "FullyShard", "pipeline", "piped groups"])
def test_a_training_that_gets_worse_ends_early_and_keeps_its_best_checkpoint(tmp_path: Path, strategy: str) -> None:
    piped = grouped(pipeline=2, data=1, servers=1)
    others: dict[str, Any] = {"FullyShard": SHARDED, "pipeline": PIPELINE, "piped groups": piped}
    fields: dict[str, Any] = (STRATEGIES | others)[strategy] | checkpoints(5, keep=1)
    fields["checkpoint"]["keepBest"] = {"metric": "accuracy", "mode": "Max"}
    stopping = {"metric": "accuracy", "mode": "Max", "patience": 2}
    spec = users(tmp_path, fields, evaluate="users:evaluate_worse", earlyStopping=stopping)
    with Job(folder=tmp_path, spec=spec) as job:
        progress = job.train()
    assert (progress.step, progress.total_steps, progress.evaluation_step) == (15, 20, 15)
    assert progress.stopped == "earlyStopping: accuracy is not better than 1 for 2 evaluations"
    assert progress.best is not None
    assert (progress.best.step, progress.best.value) == (5, 1.0)
    assert [(m["step"], m["finished"]) for m in manifests(tmp_path / "checkpoints")] == [(5, False), (15, True)]
    assert len(evaluations(tmp_path)) == 3
    with Job(folder=tmp_path, spec=spec, attempt=2) as again:
        assert again.train().step == 15
    assert len(evaluations(tmp_path)) == 3


def test_ranks_evaluate_slices_where_numbers_are_means_with_weights(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=users(tmp_path, {}, evaluate="users:evaluate_means")) as job:
        assert job.train().evaluation_step == 20
        said = [re.findall(r" (\d+) evaluation: ", job.log(Role.WORKER, rank)) for rank in range(2)]
    assert said == [["5", "10", "15", "20"], []]
    # The first one is of the whole: it shows that all numbers have weights. So is that of the end.
    assert sorted(samples for samples, _ in evaluations(tmp_path)) == [180, 180, 180, 180, 360, 360]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_hook_sees_each_step_and_ends_the_training(tmp_path: Path, strategy: str) -> None:
    with Job(folder=tmp_path, spec=users(tmp_path, STRATEGIES[strategy], hooks="users:Hooks")) as job:
        progress = job.train()
    assert (progress.step, progress.evaluation_step) == (10, 10)
    assert progress.stopped == "trainer.hooks: on_evaluate asked for the end"
    said = [(tmp_path / f"hooks-{rank}").read_text().splitlines() for rank in range(2)]
    assert [lines[0] for lines in said] == ["start 0 2 20", "start 1 2 20"]
    assert {line for lines in said for line in lines if "step" in line} == {
        f"step {step} True" for step in range(1, 11)
    }
    assert sum(line == "evaluate" for lines in said for line in lines) == (4 if strategy == "DataParallel" else 2)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "FullyShard"])
def test_a_metric_that_is_never_returned_is_refused_before_the_first_step(tmp_path: Path, strategy: str) -> None:
    stopping = {"metric": "acuracy", "mode": "Max", "patience": 2}
    spec = users(tmp_path, STRATEGIES.get(strategy, SHARDED), earlyStopping=stopping)
    with Job(folder=tmp_path, spec=spec) as job:
        job.start()
        assert job.wait(Role.WORKER, 0) == 2
        said = job.termination(Role.WORKER, 0).message
    assert said == ("trainer.earlyStopping.metric: trainer.evaluate returned no 'acuracy'; it returned accuracy, loss")
    if strategy != "Sync":  # with parameter servers the other worker trains on meanwhile
        assert len(evaluations(tmp_path)) == 1
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_pipeline_trains_the_same_whether_it_is_evaluated_or_not(tmp_path: Path) -> None:
    models = []
    for every in (0, 5):
        folder = tmp_path / str(every)
        folder.mkdir()
        with Job(folder=folder, spec=users(folder, PIPELINE, evaluateEverySteps=every)) as job:
            assert (job.train().evaluation or {}).keys() == {"accuracy", "loss"}
        models.append(load_file(folder / "checkpoints" / MODEL_FILE))
    once, often = models
    assert all(torch.equal(once[name], often[name]) for name in once)


def test_an_evaluation_that_needs_the_whole_model_is_refused_between_two_steps_of_a_pipeline(tmp_path: Path) -> None:
    spec = users(tmp_path, PIPELINE, evaluate="users:evaluate_state")
    with Job(folder=tmp_path, spec=spec) as job:
        job.start()
        assert job.wait(Role.WORKER, 0) == 2
        said = job.termination(Role.WORKER, 0).message
    assert said.startswith("trainer.evaluateEverySteps: trainer.evaluate uses model.state_dict(), which the stages")
