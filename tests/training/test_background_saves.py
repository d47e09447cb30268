"""Steps go on while a checkpoint is written, and whatever happens meanwhile, a checkpoint is whole or is none."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.api.names import Role
from training.job import Job, checkpoints, digits, held, manifests, served, state

SAVE_STEPS = 10
SLOW = """
import time
from pathlib import Path
from disttrain_trainer.checkpoint import atomic

write = atomic.write

def slow(path, *how):
    if path.name != "manifest.json" and path.parent.name == Path("slow").read_text():
        Path("writing").touch()
        while Path("slow").read_text() == path.parent.name:
            time.sleep(0.005)
    return write(path, *how)

atomic.write = slow
"""


BOTH = pytest.mark.parametrize(
    "changes", [pytest.param({}, id="DataParallel"), pytest.param(served("Sync"), id="Sync")]
)


def saving(
    folder: Path, changes: dict[str, Any] | None = None, *, workers: int = 2, slow: int = SAVE_STEPS, **trainer: Any
) -> dict[str, Any]:
    """A spec whose checkpoint of step `slow` is not written before `release`."""
    (folder / "fault.py").write_text(SLOW)
    (folder / "slow").write_text(f"step-{slow:08d}")
    return digits(
        **(changes or {}),
        **checkpoints(SAVE_STEPS, keep=9),
        worker={"replicas": workers},
        trainer=held(epochs=None, maxSteps=45, **trainer),
    )


def release(folder: Path) -> None:
    (folder / "slow").write_text("")


def steps(folder: Path) -> list[int]:
    return [manifest["step"] for manifest in manifests(folder / "checkpoints")]


@BOTH
def test_steps_go_on_while_a_checkpoint_is_written_and_the_next_one_waits_for_it(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with Job(folder=tmp_path, spec=saving(tmp_path, changes)) as job:
        job.hold(SAVE_STEPS + 5)
        job.start()
        stopped = job.until_held(SAVE_STEPS + 5)
        assert (tmp_path / "writing").exists()
        assert stopped.last_checkpoint is None, "it is not committed"
        job.hold(2 * SAVE_STEPS + 5)
        job.until(lambda progress: progress.step >= 2 * SAVE_STEPS - 1)
        with pytest.raises(TimeoutError):
            job.until(lambda progress: progress.step > 2 * SAVE_STEPS, timeout=1)
        assert steps(tmp_path) == []
        release(tmp_path)
        job.until_held(2 * SAVE_STEPS + 5, checkpoint=2 * SAVE_STEPS)
        job.let_go()
        job.complete()
    assert steps(tmp_path) == [10, 20, 30, 40, 45]


def test_a_round_that_ends_meanwhile_leaves_the_copy_as_it_was(tmp_path: Path) -> None:
    calm, hit = tmp_path / "calm", tmp_path / "hit"
    for folder in (calm, hit):
        folder.mkdir()
        with Job(folder=folder, spec=saving(folder)) as job:
            if folder is hit:
                job.hold(SAVE_STEPS + 5)
                job.start()
                job.until_held(SAVE_STEPS + 5)
                job.kill(Role.WORKER, 1)
                job.let_go()
                job.wait(Role.WORKER, 1)
                job.start_one(Role.WORKER, 1)
                job.until(lambda progress: progress.step > SAVE_STEPS + 5 and progress.generation == 2)
            else:
                job.start()
            release(folder)
            job.complete()
        assert steps(folder) == [10, 20, 30, 40, 45]
    saved, expected = state(hit, SAVE_STEPS), state(calm, SAVE_STEPS)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_a_rank_that_is_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=saving(tmp_path, workers=1, slow=2 * SAVE_STEPS)) as job:
        job.hold(2 * SAVE_STEPS + 5)
        job.start()
        stopped = job.until_held(2 * SAVE_STEPS + 5, checkpoint=SAVE_STEPS)
        assert (tmp_path / "writing").exists()
        assert stopped.last_checkpoint is not None
        assert stopped.last_checkpoint.step == SAVE_STEPS
        job.kill(Role.WORKER)
        release(tmp_path)
        job.let_go()
        progress = job.complete()
        assert progress.redone_steps == SAVE_STEPS + 5
    assert steps(tmp_path) == [10, 20, 30, 40, 45]
    left = list((tmp_path / "checkpoints" / "step-00000020").iterdir())
    assert len(left) == 2, f"the manifest and the file, and nothing of the save that was cut off: {left}"


@BOTH
def test_sigterm_while_a_checkpoint_is_written_saves_that_one_and_a_newer_one(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with Job(folder=tmp_path, spec=saving(tmp_path, changes)) as job:
        job.hold(SAVE_STEPS + 5)
        job.start()
        job.until_held(SAVE_STEPS + 5)
        for role, index in job.keys:
            job.kill(role, index, signal.SIGTERM)
        job.let_go()
        with pytest.raises(TimeoutError):
            job.wait(Role.WORKER, 0, timeout=1)
        release(tmp_path)
        assert [job.wait(role, index) for role, index in job.keys] == [143] * len(job.keys), job.logs()
    first, second = steps(tmp_path)
    assert first == SAVE_STEPS
    assert SAVE_STEPS + 5 <= second <= 2 * SAVE_STEPS


def test_sigterm_without_a_master_does_not_tear_what_is_being_written(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=saving(tmp_path, workers=1)) as job:
        job.hold(SAVE_STEPS + 5)
        job.start()
        job.until_held(SAVE_STEPS + 5)
        job.kill(Role.MASTER)
        job.wait(Role.MASTER)
        job.kill(Role.WORKER, 0, signal.SIGTERM)
        with pytest.raises(TimeoutError):
            job.wait(Role.WORKER, 0, timeout=1)
        release(tmp_path)
        assert job.wait(Role.WORKER, 0) == 143
    assert steps(tmp_path) == [SAVE_STEPS]


def test_code_that_fails_while_a_checkpoint_is_written_does_not_tear_it(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(
        "import held_loss\nfrom pathlib import Path\n\n"
        "def loss(model, batch):\n    assert not Path('fail').exists(), 'of the user'\n    return held_loss.loss(model, batch)\n"
    )
    with Job(folder=tmp_path, spec=saving(tmp_path, workers=1, loss="failing:loss")) as job:
        job.hold(SAVE_STEPS + 5)
        job.start()
        job.until_held(SAVE_STEPS + 5)
        (tmp_path / "fail").touch()
        job.let_go()
        with pytest.raises(TimeoutError):
            job.wait(Role.WORKER, 0, timeout=1)
        release(tmp_path)
        assert job.wait(Role.WORKER, 0) == 1
    assert steps(tmp_path) == [SAVE_STEPS]


def test_a_full_volume_costs_one_checkpoint_and_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / f"step-{SAVE_STEPS:08d}").write_text("as a full disk would be")
    spec = saving(tmp_path)
    release(tmp_path)
    with Job(folder=tmp_path, spec=spec) as job:
        job.train()
        assert "checkpoint 10 was not written: [Errno 17] File exists" in job.logs()
    assert steps(tmp_path) == [20, 30, 40, 45]
