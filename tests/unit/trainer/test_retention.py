"""Which checkpoints stay for a roll-back, and which ones a roll-back sets aside."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from configs import config_of
from disttrain.api import digests
from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import retention, store
from disttrain_trainer.checkpoint.manifest import NAME, Manifest
from disttrain_trainer.data.schedule import DataSet

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def config(*, attempt: int = 2, every: int = 10) -> JobConfig:
    spec = {
        "strategy": {"type": "DataParallel"},
        "trainer": {
            "model": "m:m",
            "dataset": "m:d",
            "optimizer": {"name": "SGD", "learningRate": 0.1},
            "maxSteps": 99,
        },
        "checkpoint": {"volume": {"persistentVolumeClaim": "c"}, "everySteps": every},
    }
    return config_of(spec, attempt=attempt)


def write(root: Path, step: int, *, attempt: int = 1, keep: int = 9, roll_back_seconds: int | None = None) -> Path:
    """A checkpoint of one file, as a job writes it."""
    folder = store.prepare(root, step)
    (folder / "state").write_text("state")
    files = {"state": digests.of(folder / "state", like=digests.XXH3)}
    of = config(attempt=attempt)
    manifest = store.publish(folder, config=of, step=step, parts=step, data=DataSet(96), files=files)
    retention.prune(folder, manifest, keep=keep, roll_back_seconds=roll_back_seconds)
    return folder


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def newest(root: Path) -> int | None:
    found = store.newest(root, config()).checkpoint
    return found.manifest.step if found else None


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("every_seconds", [1, 20, 59, 60, 61, 400])
def test_there_always_is_a_checkpoint_that_is_old_enough_and_not_much_older(keep: int, every_seconds: int) -> None:
    span = 60
    there: list[tuple[int, datetime]] = []
    for step in range(600):
        there.insert(0, (step, NOON + timedelta(seconds=step * every_seconds)))
        kept = {step for step, _ in there[:keep]} | retention.needed(there, keep=keep, seconds=span)
        there = [one for one in there if one[0] in kept]
        assert len(there) <= keep + 3
        if step * every_seconds >= span:
            ages = [(there[0][1] - time).total_seconds() for _, time in there]
            assert min(age for age in ages if age >= span) <= span + max(span, every_seconds)


def test_without_a_rule_that_rolls_back_only_the_newest_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_with_such_a_rule_one_that_is_older_stays_beside_the_newest(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step, keep=2, roll_back_seconds=3600)
    assert names(tmp_path) == ["step-00000001", "step-00000005", "step-00000006"]


def test_checkpoints_of_later_steps_and_earlier_attempts_are_set_aside(tmp_path: Path) -> None:
    for step, attempt in ((10, 1), (20, 1), (30, 1), (25, 2)):
        write(tmp_path, step, attempt=attempt)
    for _ in range(2):  # each process of the attempt does it
        retention.set_aside(tmp_path, (2, 12), config=config())
        assert names(tmp_path) == [
            "rolled-back-00000020-of-attempt-1",
            "rolled-back-00000030-of-attempt-1",
            "step-00000010",
            "step-00000025",
        ]
    assert newest(tmp_path) == 25


def test_what_was_set_aside_goes_when_the_training_is_there_again(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    retention.set_aside(tmp_path, (2, 12), config=config())
    write(tmp_path, 20, attempt=2)
    assert names(tmp_path) == ["rolled-back-00000030-of-attempt-1", "step-00000010", "step-00000020"]


def test_where_all_checkpoints_are_of_later_steps_the_oldest_is_taken_unless_it_was_the_first(tmp_path: Path) -> None:
    for step in (20, 30):
        write(tmp_path, step)
    retention.set_aside(tmp_path, (2, 12), config=config())
    assert newest(tmp_path) == 20
    retention.set_aside(tmp_path, (2, 12), config=config(every=20))
    assert newest(tmp_path) is None


def test_the_oldest_stays_when_it_was_taken_and_the_training_goes_on_from_it(tmp_path: Path) -> None:
    for step in (200, 300):
        write(tmp_path, step)
    retention.set_aside(tmp_path, (2, 150), config=config())
    write(tmp_path, 210, attempt=2)
    retention.set_aside(tmp_path, (2, 150), config=config())
    assert names(tmp_path) == ["rolled-back-00000300-of-attempt-1", "step-00000200", "step-00000210"]


def test_one_that_the_attempt_before_writes_late_is_set_aside_also_where_there_is_no_older_one_of_it(
    tmp_path: Path,
) -> None:
    write(tmp_path, 210, attempt=2)
    write(tmp_path, 300, attempt=1)
    retention.set_aside(tmp_path, (2, 150), config=config())
    assert newest(tmp_path) == 210


@pytest.mark.parametrize("every", [10, 200])
def test_a_damaged_one_is_nothing_to_go_back_to(tmp_path: Path, every: int) -> None:
    for step in range(100, 150, 10):
        write(tmp_path, step)
    (tmp_path / "step-00000100" / "state").write_text("st")
    for _ in range(2):
        retention.set_aside(tmp_path, (2, 105), config=config(every=every))
        assert newest(tmp_path) == 110


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    aside = "rolled-back-00000020-of-attempt-1"
    write(tmp_path, 10)
    folder = write(tmp_path, 20)
    for _ in range(3):
        retention.set_aside(tmp_path, (2, 12), config=config())
        shutil.copytree(tmp_path / aside, folder)  # as by a user
    retention.set_aside(tmp_path, (2, 12), config=config())
    assert names(tmp_path) == [aside, f"{aside}-2", f"{aside}-3", f"{aside}-4", "step-00000010"]
    write(tmp_path, 20, attempt=2)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_another_process_of_the_attempt_may_be_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    verify = store.verify

    def after_another(folder: Path, manifest: Manifest) -> None:
        monkeypatch.setattr(store, "verify", verify)
        retention.set_aside(tmp_path, (2, 12), config=config())
        verify(folder, manifest)

    monkeypatch.setattr(store, "verify", after_another)
    retention.set_aside(tmp_path, (2, 12), config=config())
    assert names(tmp_path) == [
        "rolled-back-00000020-of-attempt-1",
        "rolled-back-00000030-of-attempt-1",
        "step-00000010",
    ]


def test_one_that_is_damaged_stays_where_it_is(tmp_path: Path) -> None:
    write(tmp_path, 10)
    (write(tmp_path, 20) / NAME).write_text("{}")
    retention.set_aside(tmp_path, (2, 15), config=config())
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_a_checkpoint_that_was_taken_over_from_another_job_is_the_start_and_stays(tmp_path: Path) -> None:
    folder = write(tmp_path, 20)
    manifest: Manifest = store.manifest_of(folder).model_copy(update={"taken": "origin-01234567"})
    store.write_manifest(folder, manifest)
    retention.set_aside(tmp_path, (2, 0), config=config())
    assert newest(tmp_path) == 20
