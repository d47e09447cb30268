"""A job that is ended and started again goes on from its newest valid checkpoint, and ends as if it had not been interrupted."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from disttrain.api.history import FILE
from disttrain.api.names import Role
from training.job import Job, checkpoints, digits, held, manifests, served

SAVE_STEPS, EPOCHS = 40, 8
STEPS = EPOCHS * 23
MIDDLE = 2 * SAVE_STEPS + 10
FULLY_SHARD = {"strategy": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}}
SYNC = served("Sync")
SLOW_VOLUME = """
import os, threading
from pathlib import Path

if os.environ.get("DISTTRAIN_ROLE") == "master":
    from disttrain_trainer.checkpoint import store

    newest = folder.newest

    def slow(*arguments):
        while not Path("read").exists():
            threading.Event().wait(0.01)
        return newest(*arguments)

    folder.newest = slow
"""
"""A sitecustomize, which Python imports at its start: the master has read the checkpoint folder when there is a file `read`."""


GROWN = """
import torch
from disttrain_trainer.examples import digits

def dataset(config, split):
    made = digits.dataset(config, split)
    return torch.utils.data.ConcatDataset([made, torch.utils.data.Subset(made, [0])]) if split == "train" else made
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder of checkpoints, but the history, which each attempt appends to."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != FILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def spec(changes: dict[str, Any], **trainer: Any) -> dict[str, Any]:
    return digits(**changes, **checkpoints(SAVE_STEPS), trainer=held(epochs=EPOCHS, **trainer))


def finish(job: Job) -> None:
    job.train()


def interrupt(job: Job) -> int:
    """Kills every process in the middle; the step of the newest checkpoint."""
    job.hold(MIDDLE)
    job.start()
    stopped = job.until_held(MIDDLE, checkpoint=2 * SAVE_STEPS)
    for role, index in job.keys:
        job.kill(role, index)
        job.wait(role, index)
    job.let_go()
    assert stopped.last_checkpoint is not None
    return stopped.last_checkpoint.step


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint holds; the names of its files end with an id of the save."""
    found = {}
    for path in sorted((folder / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")):
        part = path.name.rpartition("-")[0]
        found |= {f"{part}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


@pytest.mark.parametrize("changes", [pytest.param({}, id="DataParallel"), pytest.param(SYNC, id="Sync")])
def test_a_resumed_training_equals_the_uninterrupted_one_bit_by_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    with Job(folder=tmp_path / "whole", spec=spec(changes)) as job:
        finish(job)
    with Job(folder=tmp_path / "broken", spec=spec(changes)) as job:
        saved = interrupt(job)
    with Job(folder=tmp_path / "broken", spec=spec(changes), attempt=2) as job:
        finish(job)
        assert f"begins at step {saved}" in job.logs()
    whole, broken = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "broken")
    assert whole.keys() == broken.keys() != set()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_servers_that_are_there_before_a_slow_volume_is_read_begin_from_the_checkpoint_on_it(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=spec(SYNC)) as job:
        saved = interrupt(job)
    (tmp_path / "sitecustomize.py").write_text(SLOW_VOLUME)
    with Job(folder=tmp_path, spec=spec(SYNC), attempt=2, program=True, env={"PYTHONPATH": str(tmp_path)}) as job:
        for role, index in job.keys[:3]:
            job.start_one(role, index)
        job.until(lambda progress: (progress.waiting_for or "").startswith("worker-0, worker-1 ("))
        (tmp_path / "read").touch()
        for role, index in job.keys[3:]:
            job.start_one(role, index)
        job.complete()
        assert f"round 1 begins at step {saved}" in job.log(Role.MASTER)


@pytest.mark.parametrize("changes", [pytest.param({}, id="DataParallel"), pytest.param(SYNC, id="Sync")])
def test_a_damaged_checkpoint_is_skipped_and_said(tmp_path: Path, changes: dict[str, Any]) -> None:
    with Job(folder=tmp_path, spec=spec(changes)) as job:
        newest = interrupt(job)
    older = int(manifests(tmp_path / "checkpoints")[-2]["step"])
    file = next((tmp_path / "checkpoints" / f"step-{newest:08d}").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with Job(folder=tmp_path, spec=spec(changes), attempt=2) as job:
        finish(job)
        logs = job.logs()
    assert f"checkpoint step-{newest:08d} is skipped: {file.name} is damaged" in logs
    assert f"begins at step {older}" in logs


@pytest.mark.parametrize("changes", [pytest.param({}, id="DataParallel"), pytest.param(SYNC, id="Sync")])
def test_a_checkpoint_of_another_training_is_refused_by_name_and_stays_as_it_was(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with Job(folder=tmp_path, spec=spec(changes)) as job:
        interrupt(job)
    before = contents(tmp_path / "checkpoints")
    with Job(folder=tmp_path, spec=spec(changes, batchSize=32), attempt=2) as job:
        job.start()
        assert job.supervise() == 2
        assert "is of another training: trainer.batchSize: 64 then, 32 now" in job.logs()
    assert contents(tmp_path / "checkpoints") == before


@pytest.mark.parametrize("changes", [pytest.param({}, id="DataParallel"), pytest.param(SYNC, id="Sync")])
def test_a_data_set_that_grew_between_two_attempts_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "grown.py").write_text(GROWN)
    with Job(folder=tmp_path, spec=spec(changes)) as job:
        saved = interrupt(job)
    before = contents(tmp_path / "checkpoints")
    with Job(folder=tmp_path, spec=spec(changes, dataset="grown:dataset"), attempt=2) as job:
        job.start()
        assert job.supervise() == 2
        message = f"checkpoint step-{saved:08d} is of another training: samples of trainer.dataset: 1437 then, 1438 now"
        assert message in job.logs()
    assert contents(tmp_path / "checkpoints") == before


@pytest.mark.parametrize("changes", [pytest.param({}, id="DataParallel"), pytest.param(SYNC, id="Sync")])
def test_a_training_goes_on_with_a_lower_rate_and_another_worker_and_says_so(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with Job(folder=tmp_path, spec=spec(changes)) as job:
        saved = interrupt(job)
    lower = {"name": "SGD", "learningRate": 0.01, "momentum": 0.9}
    changed = spec({**changes, "worker": {"replicas": 3}}, optimizer=lower, partsPerStep=2)
    with Job(folder=tmp_path, spec=changed, attempt=2) as job:
        finish(job)
        assert f"begins at step {saved}" in job.logs()
        progress = job.termination(Role.MASTER).progress
    assert progress is not None
    rate = "trainer.optimizer.learningRate: 0.1 -> 0.01"
    assert progress.resumed == f"Resumed at step {saved}; changed: {rate}, worker.replicas: 2 -> 3"
    assert progress.step == STEPS


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="DataParallel"),
        pytest.param(FULLY_SHARD, id="FullyShard"),
        pytest.param(SYNC, id="Sync"),
        pytest.param(served("Async"), id="Async"),
    ],
)
def test_sigterm_saves_before_anybody_ends(tmp_path: Path, changes: dict[str, Any]) -> None:
    endless = digits(**changes, **checkpoints(1_000_000), trainer={"epochs": 100_000})
    with Job(folder=tmp_path, spec=endless) as job:
        job.start()
        job.until(lambda progress: progress.step > 50)
        for role, index in job.keys:
            job.kill(role, index, signal.SIGTERM)
        assert [job.wait(role, index, timeout=10) for role, index in job.keys] == [143] * len(job.keys), job.logs()
    written = manifests(tmp_path / "checkpoints")
    whole = "a suspended job can go on with another number of workers"
    assert all(manifest["slices"] == 2 * manifest["step"] for manifest in written), whole
    steps = [manifest["step"] for manifest in written]
    assert steps, "a second one is of processes that got SIGTERM after the first was saved"
    assert min(steps) > 50


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        pytest.param(SYNC, (Role.WORKER, 1), id="worker"),
        pytest.param(SYNC, (Role.PARAMETER_SERVER, 0), id="server"),
        pytest.param(SYNC, (Role.MASTER, 0), id="master"),
        pytest.param({}, (Role.WORKER, 1), id="worker of DataParallel"),
    ],
)
def test_one_process_that_is_told_to_go_saves_once_and_the_others_go_on(
    tmp_path: Path, changes: dict[str, Any], gone: tuple[Role, int]
) -> None:
    """Such as that of a pod that is preempted: whichever it is, it saves one step before it ends, and nothing is lost."""
    with Job(folder=tmp_path, spec=digits(**changes, **checkpoints(1_000_000), trainer=held(epochs=40))) as job:
        job.hold(60)
        job.start()
        job.until_held(60)
        job.until(lambda p: p.world_size == 2)  # the first may take all steps before the second is there
        job.kill(*gone, signal.SIGTERM)
        job.let_go()  # 860 steps are left: it is heard long before the last one
        job.complete()
        assert job.restarts[gone] == 1
        end = job.termination(Role.MASTER).progress
    assert end is not None
    saved, last = sorted(manifest["step"] for manifest in manifests(tmp_path / "checkpoints"))
    assert 60 <= saved < last == end.step
    assert all(manifest["slices"] == 2 * manifest["step"] for manifest in manifests(tmp_path / "checkpoints"))


def test_a_job_that_was_finished_is_finished_at_once(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=spec(SYNC)) as job:
        finish(job)
        job.start_one(Role.MASTER)
        assert job.wait(Role.MASTER) == 0
        progress = job.termination(Role.MASTER).progress
    assert progress is not None
    assert progress.finished
    assert progress.step == STEPS
    assert progress.evaluation is not None


def test_only_so_many_checkpoints_are_kept(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=digits(**SYNC, **checkpoints(50, keep=2), trainer={"epochs": 10})) as job:
        finish(job)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "history.jsonl",
        "model.safetensors",
        "step-00000200",
        "step-00000230",
    ]
