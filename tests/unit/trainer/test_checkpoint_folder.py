"""A checkpoint counts when its manifest and every digest hold; which ones do not is said, and why."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from disttrain.api.runtime import Addresses, JobConfig
from disttrain.api.spec import Strategy, Trainer
from disttrain_trainer.checkpoint import folder as checkpoints
from disttrain_trainer.checkpoint.manifest import Manifest


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


def write(root: Path, step: int, content: str = "state", *, keep: int | None = None, **trainer: Any) -> Path:
    """A checkpoint of one file, `state`, or `state.<content>` of another content. keep: prune afterwards, as a job does."""
    folder = checkpoints.prepare(root, step)
    file = folder / ("state" if content == "state" else f"state.{content}")
    file.write_text(content)
    manifest = publish(folder, step, {file.name: checkpoints.sha256_of(file)}, **trainer)
    if keep is not None:
        checkpoints.prune(folder, manifest, keep=keep)
    return folder


def publish(
    folder: Path,
    step: int,
    files: dict[str, str],
    *,
    finished: bool = False,
    evaluation: dict[str, float] | None = None,
    **trainer: Any,
) -> Manifest:
    return checkpoints.publish(
        folder,
        config=make_config(**trainer),
        step=step,
        slices=step,
        steps_per_epoch=3,
        files=files,
        finished=finished,
        evaluation=evaluation,
    )


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in root.iterdir())


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


@pytest.mark.parametrize(
    ("length", "finished"),
    [
        pytest.param({"maxSteps": 9}, True, id="as long"),
        pytest.param({"maxSteps": 8}, True, id="shorter"),
        pytest.param({"maxSteps": 10}, False, id="longer"),
        pytest.param({"maxSteps": None, "epochs": 3}, True, id="as long in epochs"),
        pytest.param({"maxSteps": None, "epochs": 4}, False, id="longer in epochs"),
    ],
)
def test_a_finished_checkpoint_ends_no_job_that_shall_be_trained_for_longer_by_now(
    tmp_path: Path, length: dict[str, Any], finished: bool
) -> None:
    folder = checkpoints.prepare(tmp_path, 9)
    publish(folder, 9, {}, finished=True, evaluation={"accuracy": 0.5})
    found = checkpoints.newest(tmp_path, make_config(**length))
    assert found is not None
    assert found.manifest.step == 9
    assert found.manifest.finished is finished
    assert found.manifest.evaluation == ({"accuracy": 0.5} if finished else None)


def test_an_evaluation_that_is_not_finite_leaves_the_checkpoint_readable(tmp_path: Path) -> None:
    folder = checkpoints.prepare(tmp_path, 9)
    publish(folder, 9, {}, finished=True, evaluation={"perplexity": math.inf, "loss": math.nan})
    found = checkpoints.newest(tmp_path, make_config())
    assert found is not None
    assert found.manifest.evaluation is not None
    assert found.manifest.evaluation["perplexity"] == math.inf
    assert math.isnan(found.manifest.evaluation["loss"])


def test_a_checkpoint_that_is_written_again_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    write(tmp_path, 1, "first")
    folder = checkpoints.prepare(tmp_path, 1)
    (folder / "state.second").write_text("half")
    assert newest_step(tmp_path) == 1


def test_a_new_folder_is_on_the_disk_before_anything_is_written_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(checkpoints, "sync_folder", synced.append)
    checkpoints.prepare(tmp_path, 1)
    assert synced == [tmp_path]


def test_pruning_keeps_the_newest_and_what_is_being_written(tmp_path: Path) -> None:
    for step in (1, 3):
        write(tmp_path, step)
    for step in (2, 5):
        checkpoints.prepare(tmp_path, step)
    write(tmp_path, 4, keep=2)
    assert steps_in(tmp_path) == [3, 4, 5]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_just_written_stays_though_a_damaged_one_of_a_later_step_is_there(tmp_path: Path, keep: int) -> None:
    write(tmp_path, 100)
    (write(tmp_path, 200) / "state").write_text("damaged")
    for step in (140, 180):
        write(tmp_path, step, keep=keep)
        assert newest_step(tmp_path) == step
    assert steps_in(tmp_path) == ([180, 200] if keep == 1 else [140, 180, 200])
    write(tmp_path, 220, keep=keep)
    assert 220 in steps_in(tmp_path)


def test_checkpoints_of_another_configuration_neither_count_nor_go(tmp_path: Path) -> None:
    for step in (700, 800):
        write(tmp_path, step)
    for step in (100, 200, 300):
        write(tmp_path, step, keep=1, batchSize=32)
        assert newest_step(tmp_path, batchSize=32) == step
    assert steps_in(tmp_path) == [300, 700, 800]
    write(tmp_path, 900, keep=1, batchSize=32)
    assert newest_step(tmp_path) == 800


def test_a_checkpoint_that_takes_the_place_of_another_configurations_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    write(tmp_path, 1)
    assert "takes its place" not in caplog.text
    write(tmp_path, 1, batchSize=32)
    assert "step-00000001 was a checkpoint of another configuration; this job's takes its place" in caplog.text


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    late = 10**8
    for step in (late - 2, late - 1, late):
        write(tmp_path, step, keep=2)
        assert newest_step(tmp_path) == step
    assert steps_in(tmp_path) == [late - 1, late]


def test_what_older_saves_left_behind_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    older = write(tmp_path, 1)
    (older / "state.of-a-save-that-was-given-up").write_text("late")
    again = write(tmp_path, 2, "first")
    (again / ".state.tmp").write_text("half")
    write(tmp_path, 2, "second", keep=2)
    assert sorted(path.name for path in older.iterdir()) == ["manifest.json", "state"]
    assert sorted(path.name for path in again.iterdir()) == ["manifest.json", "state.second"]


def test_what_cannot_be_removed_does_not_undo_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "step-00000001").write_text("no folder")
    write(tmp_path, 2, keep=1)
    assert newest_step(tmp_path) == 2
    assert "what is left of step-00000001 stays" in caplog.text


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
