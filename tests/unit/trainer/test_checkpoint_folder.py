"""A checkpoint counts when its manifest and every digest hold; which ones do not is said, and why."""

import logging
from pathlib import Path
from typing import Any

import pytest

from disttrain.api.runtime import Addresses, JobConfig
from disttrain.api.spec import Strategy, Trainer
from disttrain_trainer.checkpoint import folder as checkpoints


def make_config(**trainer: Any) -> JobConfig:
    return JobConfig(
        namespace="default",
        name="job",
        uid="u",
        attempt=1,
        strategy=Strategy.model_validate({"type": "DataParallel"}),
        trainer=Trainer.model_validate(
            {"model": "m:m", "dataset": "m:d", "optimizer": {"name": "SGD", "learningRate": "0.1"}, "maxSteps": 9}
            | trainer
        ),
        workers=1,
        addresses=Addresses(control="h:1", rendezvous="h:2"),
    )


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("disttrain_trainer"), "propagate", True)
    caplog.set_level(logging.INFO)


def write(root: Path, step: int, content: str = "state") -> Path:
    folder = checkpoints.prepare(root, step)
    (folder / "state").write_text(content)
    checkpoints.publish(
        folder, config=make_config(), step=step, slices=step, files={"state": checkpoints.sha256_of(folder / "state")}
    )
    return folder


def newest_step(root: Path, **trainer: Any) -> int | None:
    found = checkpoints.newest(root, make_config(**trainer))
    return found.manifest.step if found else None


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "nowhere") is None


def test_the_newest_is_taken(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        write(tmp_path, step)
    assert newest_step(tmp_path) == 100


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(
            lambda f: (f / "manifest.json").unlink(), "it has no manifest.json: it was not completed", id="no manifest"
        ),
        pytest.param(lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged", id="half a manifest"),
        pytest.param(lambda f: (f / "state").unlink(), "state is missing", id="missing file"),
        pytest.param(
            lambda f: (f / "state").write_text("stale"), "state is damaged: its sha256 is", id="other content"
        ),
    ],
)
def test_a_damaged_one_is_skipped_and_the_reason_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, said: str
) -> None:
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    assert newest_step(tmp_path) == 1
    assert "step-00000002 is skipped" in caplog.text
    assert said in caplog.text


def test_another_configuration_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1)
    assert newest_step(tmp_path, optimizer={"name": "SGD", "learningRate": "0.2"}) is None
    assert 'trainer.optimizer.learningRate: "0.1" then, "0.2" now' in caplog.text


def test_a_job_may_be_trained_for_longer(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert newest_step(tmp_path, maxSteps=90) == 1


def test_a_folder_that_is_written_again_is_no_checkpoint_meanwhile(tmp_path: Path) -> None:
    write(tmp_path, 1)
    checkpoints.prepare(tmp_path, 1)
    assert newest_step(tmp_path) is None


def test_pruning_keeps_the_newest_and_what_is_being_written(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    checkpoints.prepare(tmp_path, 2)
    checkpoints.prepare(tmp_path, 5)
    checkpoints.prune(tmp_path, keep=2)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["3", "4", "5"]


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
