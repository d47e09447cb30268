"""checkpoint.from: a job starts with the model of another one, or goes on as that one would have, in whatever strategy."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from disttrain.api.names import MODEL_FILE, Role
from local_runs.command import run
from training.job import Job, checkpoints, digits, held, same, served

USERS = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1))
        self.image.to(memory_format=torch.channels_last)
        self.first = nn.Linear(64, 30)
        self.middle, self.again = nn.Linear(30, 30), nn.Linear(30, 30)
        self.again.weight = self.middle.weight
        self.norm = nn.BatchNorm1d(30)
        self.head = nn.Linear(30, 10)
        self.first.requires_grad_(not config.get("frozen"))
        self.middle.requires_grad_(not config.get("frozen"))
        if config.get("other"):
            self.first = nn.Linear(64, 30, bias=False)
            self.head = nn.Linear(30, 12)
            self.extra = nn.Linear(1, 1)
        self.double()

    def forward(self, x):
        x = x.double() + self.image(x.double().view(-1, 1, 8, 8)).flatten(1)
        return self.head(self.norm(self.again(self.middle(self.first(x).tanh()).tanh()).tanh()))

def model(config):
    return Model(config)
"""
DATA_PARALLEL: dict[str, Any] = {}
SYNC = served("Sync")
UIDS = [f"{number:08x}-2222-3333-4444-555555555555" for number in range(10)]


class Claim:
    """Jobs one after the other that share a claim."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = folder / "claim"
        (folder / "users_model.py").write_text(USERS)
        self.count = 0

    def job(
        self,
        name: str,
        steps: int,
        *,
        how: dict[str, Any] = DATA_PARALLEL,
        origin: Any = None,
        every: int = 2,
        workers: int = 1,
        **trainer: Any,
    ) -> Job:
        """A job that is not started yet. origin: its checkpoint.from."""
        names = {"model": "users_model:model", "evaluate": None, "epochs": None, "deterministic": True}
        optimizer = {"name": "Adam", "learningRate": 0.01}
        checkpoint = checkpoints(every, keep=10)
        if origin is not None:
            checkpoint["checkpoint"]["from"] = origin
        spec = digits(
            **how,
            **checkpoint,
            worker={"replicas": workers},
            trainer=names | {"optimizer": optimizer, "maxSteps": steps} | trainer,
        )
        job = Job(folder=self._folder, spec=spec, claim=self.path, name=name, uid=UIDS[self.count])
        self.count += 1
        return job

    def run(self, *arguments: Any, **options: Any) -> tuple[int, Job]:
        """A job, to its end; with its exit code."""
        with self.job(*arguments, **options) as job:
            job.start()
            return job.supervise(), job

    def trained(self, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        """The model of such a job."""
        code, job = self.run(*arguments, **options)
        assert code == 0, job.logs()
        assert job.checkpoints is not None
        return load_file(job.checkpoints / MODEL_FILE)


def resumed(job: Job) -> str:
    progress = job.termination(Role.MASTER).progress
    assert progress is not None
    return progress.resumed or ""


@pytest.mark.parametrize("first", [DATA_PARALLEL, SYNC], ids=["DataParallel", "servers"])
@pytest.mark.parametrize("second", [DATA_PARALLEL, SYNC], ids=["to DataParallel", "to servers"])
def test_a_job_starts_with_the_model_of_another_one(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    claim = Claim(tmp_path)
    before = claim.trained("pretrained", 4, how=first)
    # No step can be seen from outside: with a rate of 0 the parameters stay as they were taken over.
    code, job = claim.run("tuned", 1, how=second, origin="pretrained", optimizer={"name": "SGD", "learningRate": 0})
    assert code == 0, job.logs()
    assert job.checkpoints is not None
    after = load_file(job.checkpoints / MODEL_FILE)
    moved = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert same({k: v for k, v in before.items() if k not in moved}, {k: v for k, v in after.items() if k not in moved})
    assert (before["norm.num_batches_tracked"], after["norm.num_batches_tracked"]) == (4, 5)
    assert resumed(job) == "Begins with the model of job pretrained (00000000), step 4"


@pytest.mark.parametrize("first", [DATA_PARALLEL, SYNC], ids=["DataParallel", "servers"])
@pytest.mark.parametrize("second", [DATA_PARALLEL, SYNC], ids=["to DataParallel", "to servers"])
def test_a_job_goes_on_as_another_one_would_have(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    claim = Claim(tmp_path)
    calm = claim.trained("calm", 9, how=first)
    code, job = claim.run("other", 9, how=second, origin={"job": "calm", "step": 4, "include": "All"})
    assert code == 0, job.logs()
    assert job.checkpoints is not None
    after = load_file(job.checkpoints / MODEL_FILE)
    if first is second:
        assert same(calm, after)
    assert all(torch.allclose(calm[name], after[name], rtol=1e-12, atol=1e-12) for name in calm)
    assert resumed(job).startswith("Goes on at step 4 of job calm (00000000)")
    steps = sorted(path.name for path in job.checkpoints.glob("step-*"))
    assert steps == ["step-00000004", "step-00000006", "step-00000008", "step-00000009"]


def test_jobs_that_go_on_from_one_another_with_other_workers_and_servers_end_with_the_same_bits(tmp_path: Path) -> None:
    claim = Claim(tmp_path)
    parts = {"partsPerStep": 6}
    calm = claim.trained("calm", 9, how=served("Sync", servers=2), workers=2, **parts)
    claim.trained("one", 3, how=served("Sync", servers=2), workers=2, **parts)
    two = {"job": "one", "include": "All"}
    claim.trained("two", 6, how=served("Sync", servers=3), workers=3, origin=two, **parts)
    three = {"job": "two", "include": "All"}
    last = claim.trained("three", 9, how=served("Sync", servers=3), workers=1, origin=three, **parts)
    # BatchNorm's statistics are those of one of several workers.
    assert same(*({k: v for k, v in one.items() if not k.startswith("norm.")} for one in (calm, last)))
    assert same(*({k: v for k, v in one.items() if k in ("norm.weight", "norm.bias")} for one in (calm, last)))


def test_a_new_optimizer_a_frozen_part_and_another_order(tmp_path: Path) -> None:
    claim = Claim(tmp_path)
    before = claim.trained("pretrained", 4, how=served("Async"), seed=1, deterministic=False)
    for name, how in (("served", SYNC), ("collective", DATA_PARALLEL)):
        after = claim.trained(name, 3, how=how, origin="pretrained", seed=2, config={"frozen": True}, batchSize=32)
        assert same(
            *(
                {k: v for k, v in one.items() if k.startswith(("first.", "middle.", "again.weight"))}
                for one in (before, after)
            )
        )
        assert not torch.equal(before["head.weight"], after["head.weight"])


@pytest.mark.parametrize("how", [DATA_PARALLEL, SYNC], ids=["DataParallel", "servers"])
def test_a_model_that_fits_only_in_part_is_refused_by_the_names(tmp_path: Path, how: dict[str, Any]) -> None:
    claim = Claim(tmp_path)
    claim.trained("pretrained", 2)
    code, job = claim.run("tuned", 1, how=how, origin="pretrained", config={"other": True})
    assert code == 2 or job.wait(Role.WORKER) == 2
    assert job.termination(Role.WORKER).message == (
        "trainer.model: the model of job pretrained, step 2, fits only in part: not there: extra.weight, extra.bias; "
        "not in trainer.model: first.bias; of another form: head.weight (F64 [10, 30] there, F64 [12, 30] here), "
        "head.bias (F64 [10] there, F64 [12] here). Make names, shapes and types the same, or leave checkpoint.from out"
    )


@pytest.mark.parametrize("how", [DATA_PARALLEL, SYNC], ids=["DataParallel", "servers"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path: Path, how: dict[str, Any]) -> None:
    claim = Claim(tmp_path)
    claim.trained("pretrained", 6)
    newest = claim.path / "pretrained-00000000" / "step-00000006"
    (file,) = newest.glob("state-*")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, job = claim.run("tuned", 1, how=how, origin="pretrained")
    assert code == 0, job.logs()
    said = resumed(job)
    assert said.startswith(
        "Begins with the model of job pretrained (00000000), step 4; skipped: step-00000006 (state-"
    ), said
    assert "is damaged" in said


@pytest.mark.parametrize("how", [DATA_PARALLEL, SYNC], ids=["DataParallel", "servers"])
def test_no_job_to_start_from_ends_the_job_and_starts_nothing(tmp_path: Path, how: dict[str, Any]) -> None:
    claim = Claim(tmp_path)
    claim.trained("pretrained", 2)
    code, job = claim.run("tuned", 1, how=how, origin="pretraned")
    assert code == 2
    # Each process looks for it, and the first one to end says so: then the others are ended, the master perhaps, too.
    said = {job.termination(*key).message for key in job.keys}
    expected = (
        'checkpoint.from: there is no checkpoint of job pretraned on claim "claim" in namespace default; jobs that have one there: '
        "pretrained. Name one of the same claim, or leave checkpoint.from out to start with a new model"
    )
    assert expected in said
    assert job.checkpoints is not None
    assert [path.name for path in job.checkpoints.iterdir()] == ["history.jsonl"]


def test_a_server_that_is_lost_before_the_first_checkpoint_takes_the_training_back_to_the_other_jobs_model(
    tmp_path: Path,
) -> None:
    claim = Claim(tmp_path)
    claim.trained("pretrained", 4)
    calm = claim.trained("calm", 6, how=SYNC, origin="pretrained", every=100, **held())
    lost = claim.job("lost", 6, how=SYNC, origin="pretrained", every=100, **held())
    with lost:
        lost.hold(3)
        lost.start()
        lost.until_held(3)
        lost.kill(Role.PARAMETER_SERVER, 1)
        lost.let_go()
        lost.complete()
    assert lost.checkpoints is not None
    assert same(calm, load_file(lost.checkpoints / MODEL_FILE))


def test_what_was_taken_stays_although_the_other_job_is_gone(tmp_path: Path) -> None:
    claim = Claim(tmp_path)
    before = claim.trained("pretrained", 4)
    tuned = claim.trained("tuned", 4, origin="pretrained")
    shutil.rmtree(claim.path / "pretrained-00000000")
    folder = claim.path / "tuned-00000001"
    for step in folder.glob("step-*"):
        shutil.rmtree(step)  # as a job that is lost before its first checkpoint
    spec = json.loads((next(folder.glob("origin-*")) / "manifest.json").read_text())
    assert spec["job"] == "pretrained"
    claim.count = 1
    assert same(claim.trained("tuned", 4, origin="pretrained"), tuned)
    assert not same(before, tuned)


EXAMPLES = Path("examples").absolute()


@pytest.mark.timeout(240)
def test_the_example_starts_from_the_run_of_another_file(tmp_path: Path) -> None:
    alone = run(tmp_path, str(EXAMPLES / "digits-tuned.yaml"))
    assert alone.code == 1, alone
    assert 'there is no checkpoint of job digits-ps on claim "digits-checkpoints"' in alone.out, alone
    assert run(tmp_path, str(EXAMPLES / "digits-ps.yaml"), "-q", seconds=150).code == 0
    tuned = run(tmp_path, str(EXAMPLES / "digits-tuned.yaml"), "-o", "json", seconds=150)
    assert tuned.code == 0, tuned
    training = tuned.job["status"]["training"]
    assert training["resumed"].startswith("Begins with the model of job digits-ps (")
    assert training["resumed"].endswith("), step 345")
    assert training["step"] == 46
    assert training["evaluation"]["accuracy"] > 0.96
