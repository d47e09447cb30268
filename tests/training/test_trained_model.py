"""The model that a training leaves: any program with torch and safetensors loads it, and finds what the training said of it."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from disttrain.api.job import DistTrainJob
from disttrain.api.names import MODEL_FILE, Role
from disttrain_trainer.checkpoint import final
from local_runs.command import DISTTRAIN, run
from training.job import Job, checkpoints, digits, manifests, served

EXAMPLES = Path("examples").absolute()

LOADS = """
import importlib, json, sys
import torch
from safetensors.torch import load_file

path, trainer = sys.argv[1], json.loads(sys.argv[2])
factory = lambda name: getattr(importlib.import_module(trainer[name].split(":")[0]), trainer[name].split(":")[1])
model = factory("model")(trainer.get("config") or {})
model.load_state_dict(load_file(path), strict=True)
model.eval()
with torch.no_grad():
    print(json.dumps(factory("evaluate")(model, factory("dataset")(trainer.get("config") or {}, "test"))))
"""
"""Nothing of ours but the example's own module, which is the user's code."""


def evaluation_of(path: Path, trainer: dict[str, object], folder: Path) -> dict[str, float]:
    """What the user's own evaluation says of a model file, in a process of its own. folder: of the user's modules."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(path), json.dumps(trainer)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("example", "short"),
    [
        ("digits-ps", {"epochs": 1}),
        ("digits-ddp", {"epochs": 1}),
        ("mlp-sync", {"epochs": 1}),
        ("own-model", {"epochs": 1}),
        ("charlm-ddp", {"maxSteps": 3, "config": {"context": 16, "width": 16, "layers": 1}}),
        ("charlm-fully-shard", {"maxSteps": 3, "config": {"context": 16, "width": 16, "layers": 2}}),
        ("charlm-tensor", {"maxSteps": 3, "config": {"context": 16, "width": 16, "layers": 2}}),
        ("charlm-pipeline", {"maxSteps": 3, "config": {"context": 16, "width": 16, "layers": 2}}),
        ("charlm-data-tensor", {"maxSteps": 3, "config": {"context": 16, "width": 16, "layers": 2}}),
        ("charlm-hybrid-servers", {"maxSteps": 3, "config": {"context": 16, "width": 16, "layers": 2}}),
        ("charlm-data-pipeline", {"maxSteps": 3, "config": {"context": 16, "width": 16, "layers": 2}}),
        ("charlm-fully-shard-pipeline", {"maxSteps": 3, "config": {"context": 16, "width": 16, "layers": 2}}),
        ("charlm-tensor-pipeline", {"maxSteps": 3, "config": {"context": 16, "width": 16, "layers": 2}}),
    ],
)
def test_each_example_leaves_a_model_that_reaches_the_printed_evaluation(
    tmp_path: Path, example: str, short: dict[str, object]
) -> None:
    documents = list(yaml.safe_load_all((EXAMPLES / f"{example}.yaml").read_text()))
    trainer = documents[0]["spec"]["trainer"]
    trainer |= short
    (tmp_path / "job.yaml").write_text(yaml.safe_dump_all(documents))
    done = run(tmp_path, "job.yaml", "-o", "json", seconds=200)
    assert done.code == 0, done
    training = DistTrainJob.parse(done.job).status.training
    assert training is not None
    assert training.model is not None
    path = Path(training.model.path)
    kept_in = "claims" if "checkpoint" in documents[0]["spec"] else "runs"
    assert path.relative_to(tmp_path.resolve()).parts[:2] == (".disttrain", kept_in)
    assert training.model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "from safetensors.torch import load_file" in done.err
    assert f'model.load_state_dict(load_file("{path.relative_to(tmp_path.resolve())}"))' in done.err
    said = {name: float(value) for name, value in (training.evaluation or {}).items()}
    for document in documents[1:]:
        for name, text in document.get("data", {}).items():
            (tmp_path / name).write_text(text)
    assert evaluation_of(path, trainer, tmp_path) == pytest.approx(said, rel=1e-4)
    if kept_in == "claims":
        exported = tmp_path / "exported.safetensors"
        export(tmp_path, documents[0]["metadata"]["name"], "-o", str(exported))
        assert_equal(load_file(exported), load_file(path))


def export(folder: Path, *arguments: str) -> None:
    """`disttrain export`, which must do."""
    done = subprocess.run(
        [str(DISTTRAIN), "export", *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, types and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


USERS = """
import torch
from torch import nn
from disttrain_trainer.examples import digits

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = x.reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1)
        x = self.norm(self.conv(x)).mean((2, 3))
        return self.head(self.second(self.first(self.frozen(x))))

def model(config):
    return Model()
"""


@pytest.mark.parametrize(
    "changes", [pytest.param({}, id="DataParallel"), pytest.param(served("Sync", servers=3), id="Sync")]
)
def test_an_export_of_the_last_checkpoint_is_the_model_that_the_training_wrote(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    (tmp_path / "users_model.py").write_text(USERS)
    optimizer = {"name": "Adam", "learningRate": 0.01}
    trainer = {"model": "users_model:model", "epochs": None, "maxSteps": 3, "evaluate": None, "optimizer": optimizer}
    with Job(folder=tmp_path, spec=digits(**changes, **checkpoints(50), trainer=trainer)) as job:
        job.train()
    export(tmp_path, "checkpoints", "-o", "exported.safetensors")
    expected = load_file(tmp_path / "checkpoints" / MODEL_FILE)
    assert {"norm.running_mean", "frozen.weight", "first.weight", "second.weight"} < expected.keys()
    if changes:  # each worker has its own buffers, and the checkpoint those of another
        found = load_file(tmp_path / "exported.safetensors")
        assert found.keys() == expected.keys()
        expected |= {name: found[name] for name in found if "running" in name}
    assert_equal(load_file(tmp_path / "exported.safetensors"), expected)
    named = manifests(tmp_path / "checkpoints")[-1]["tensors"]
    assert {"mean", "square"} <= named["conv.weight"]["slots"].keys()


DATA_PARALLEL = pytest.param({}, id="DataParallel")
SYNC = pytest.param(served("Sync"), id="Sync")


@pytest.mark.parametrize("changes", [DATA_PARALLEL, SYNC])
def test_a_job_waits_for_room_for_its_model_and_a_later_master_of_the_finished_job_names_it(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    in_the_way = tmp_path / "checkpoints" / MODEL_FILE
    in_the_way.mkdir(parents=True)
    (tmp_path / "fault.py").write_text("from disttrain_trainer.checkpoint import final\nfinal.RETRY_SECONDS = 0.05\n")
    spec = digits(**changes, **checkpoints(50), trainer={"epochs": 1, "evaluate": None})
    for attempt in (1, 2):
        with Job(folder=tmp_path, spec=spec, attempt=attempt) as job:
            job.start()
            if attempt == 1:
                job.until(lambda _: "the model was not written: " in job.logs())
                assert not job.until(lambda _: True).finished
                in_the_way.rmdir()
            progress = job.complete()
        assert progress.model is not None
        assert progress.model.sha256 == hashlib.sha256(in_the_way.read_bytes()).hexdigest()


@pytest.mark.parametrize("changes", [DATA_PARALLEL, SYNC])
def test_a_worker_that_cannot_write_the_model_ends_with_what_is_wrong_to_be_started_again(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    (tmp_path / "checkpoints" / MODEL_FILE).mkdir(parents=True)
    fault = "from disttrain_trainer.checkpoint import final\nfinal.RETRY_SECONDS, final.GIVE_UP_SECONDS = 0.05, 0.2\n"
    (tmp_path / "fault.py").write_text(fault)
    spec = digits(**changes, **checkpoints(50), worker={"replicas": 1}, trainer={"epochs": 1})
    with Job(folder=tmp_path, spec=spec) as job:
        job.start()
        assert job.wait(Role.WORKER) == final.Unsaved.exit_code, job.logs()
        said = job.termination(Role.WORKER).message
        assert said.startswith("the model, of step 23, cannot be written: "), said
        assert "Is a directory" in said
