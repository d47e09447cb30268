"""Where a run keeps things, and which run `--resume` goes on with."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from disttrain.api.job import DistTrainJob
from disttrain.api.names import Role
from disttrain.api.status import DistTrainJobStatus, HealthStatus, RollBack
from disttrain.local.addresses import Ports
from disttrain.local.documents import Documents
from disttrain.local.folders import NothingToResume, RunFolder
from disttrain.local.processes import Process
from disttrain.local.programs import Programs
from disttrain.local.runner import Observer, Run, admitted
from disttrain.local.runs import runs_of


def test_two_runs_of_a_job_share_a_claim_and_nothing_else(tmp_path: Path) -> None:
    first, second = RunFolder.new("digits", tmp_path), RunFolder.new("digits", tmp_path)
    assert first.claim("data") == second.claim("data")
    assert first.uid != second.uid
    assert first.path != second.path
    assert first.checkpoints("ckpt") != second.checkpoints("ckpt")
    first.close()
    second.close()


def test_resume_goes_on_with_the_newest_run_of_that_very_name(tmp_path: Path) -> None:
    for age, name in enumerate(("digits", "digits", "digits-ps"), 1):
        folder = RunFolder.new(name, tmp_path)
        folder.remember(attempt=age)
        os.utime(folder.path, (age, age))
        folder.close()
    resumed = RunFolder.resume("digits", tmp_path)
    assert resumed.attempt == 3
    assert resumed.path.name.startswith("digits-2")
    resumed.close()


def test_a_run_that_goes_on_remembers_its_roll_back(tmp_path: Path) -> None:
    folder = RunFolder.new("digits", tmp_path)
    spec = {"strategy": {"type": "DataParallel"}, "trainer": {"command": ["true"]}, "worker": {"replicas": 1}}
    job = DistTrainJob.model_validate({"metadata": {"name": "digits"}, "spec": spec})
    status = DistTrainJobStatus(
        roll_back=RollBack(attempt=2, step=120), health=(HealthStatus(name="diverged", roll_backs=1),)
    )
    folder.keep(admitted(job, folder).model_copy(update={"status": status}))
    folder.close()
    resumed = RunFolder.resume("digits", tmp_path)
    goes_on = admitted(job, resumed).status
    resumed.close()
    assert (goes_on.roll_back, goes_on.health) == (status.roll_back, status.health)


@pytest.mark.parametrize("given", ["/no/such/run", "a**", "*", "../runs/digits", "", "[", "a\0b"])
def test_what_is_no_name_of_a_job_has_no_runs(given: str, tmp_path: Path) -> None:
    RunFolder.new("digits", tmp_path).close()
    assert list(runs_of(given, tmp_path)) == []


def test_a_run_that_ends_by_a_fault_of_its_own_leaves_no_certificate_and_no_copies(tmp_path: Path) -> None:
    class Broken(Observer):
        def started(self, process: Process, text: str) -> None:
            raise RuntimeError("the screen is broken")

    folder = RunFolder.new("digits", tmp_path)
    folder.keep_secret(folder.tls(1), {"tls.key": b"secret"})
    folder.copies(0).mkdir(parents=True)
    spec = {"strategy": {"type": "DataParallel"}, "trainer": {"command": ["true"]}, "worker": {"replicas": 1}}
    job = admitted(DistTrainJob.model_validate({"metadata": {"name": "digits"}, "spec": spec}), folder)
    ports = Ports()
    run = Run(job, Programs(job, Documents([]), folder, ports), folder, ports, Broken())
    with pytest.raises(ExceptionGroup):
        asyncio.run(run.to_its_end())
    assert not folder.tls(1).parent.exists()
    assert not folder.copies(0).parent.exists()
    ports.close()
    folder.close()


def test_a_question_about_an_older_attempt_leaves_the_certificate_of_the_present_one(tmp_path: Path) -> None:
    """Its master may still run while the next attempt begins."""
    folder = RunFolder.new("digits", tmp_path)
    trainer = {
        "model": "disttrain_trainer.examples.digits:model",
        "dataset": "disttrain_trainer.examples.digits:dataset",
        "optimizer": {"name": "SGD", "learningRate": 0.1},
        "epochs": 1,
    }
    spec = {"strategy": {"type": "DataParallel"}, "trainer": trainer, "network": {"tls": "Mutual"}}
    job = admitted(DistTrainJob.model_validate({"metadata": {"name": "digits"}, "spec": spec}), folder)
    ports = Ports()
    programs = Programs(job, Documents([]), folder, ports)

    def started(attempt: int) -> set[str]:
        worker = Process(
            name="digits-worker-0",
            uid="u",
            role=Role.WORKER,
            index=0,
            attempt=attempt,
            metrics_port=0,
            log=tmp_path / "log",
            termination_log=tmp_path / "said",
        )
        programs.environment(worker)
        return {path.name for path in folder.tls(attempt).iterdir()}

    assert started(1) == {"ca.crt", "tls.crt", "tls.key", "join.key", "join-worker-0"}
    first = programs.public_key(1)
    assert first
    started(2)
    assert programs.public_key(2) not in ("", None, first)
    assert programs.public_key(1) == ""
    assert folder.tls(2).is_dir()
    ports.close()
    folder.close()


def test_a_run_that_goes_on_is_not_resumed(tmp_path: Path) -> None:
    folder = RunFolder.new("digits", tmp_path)
    folder.remember(1)
    with pytest.raises(NothingToResume, match="still runs"):
        RunFolder.resume("digits", tmp_path)
    folder.close()
    RunFolder.resume("digits", tmp_path).close()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"uid": "x", "attempt": 1}', '{"attempt": 1}'])
def test_a_run_whose_record_is_torn_is_not_resumed(tmp_path: Path, content: str) -> None:
    folder = RunFolder.new("digits", tmp_path)
    folder.close()
    (folder.path / "run.json").write_text(content)
    with pytest.raises(NothingToResume, match=r"run.json is damaged.*: leave --resume out"):
        RunFolder.resume("digits", tmp_path)


def test_nothing_to_resume_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NothingToResume, match="leave --resume out"):
        RunFolder.resume("digits", tmp_path)


def test_git_does_not_see_the_folder(tmp_path: Path) -> None:
    RunFolder.new("digits", tmp_path / ".disttrain").close()
    assert (tmp_path / ".disttrain" / ".gitignore").read_text() == "*\n"


def test_a_folder_that_cannot_be_made_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "remember", full)
    with pytest.raises(OSError, match="No space left"):
        RunFolder.new("digits", tmp_path)
    assert list((tmp_path / "runs").iterdir()) == []
