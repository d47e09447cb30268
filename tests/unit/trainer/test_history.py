"""What the master writes into a job's history, and how its file stays small, whole and no obstacle."""

import errno
import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from disttrain.api.history import FILE, Event, EventType, Header, Line, Point, decode, kept
from disttrain.api.runtime import Progress, ProgressCheckpoint
from disttrain_trainer.coordinator.history import Look, Recorder
from disttrain_trainer.coordinator.history_file import HistoryFile, HistoryWriter
from disttrain_trainer.coordinator.progress import Tracker

HEADER = Header("digits", "default", "u", 0.25)


def look(time: float, step: int, *, began_at: int | None = 0, back: int | None = None, **progress: Any) -> Look:
    return Look(
        time=time,
        progress=Progress(attempt=1, step=step, **progress),
        samples=step * 64,
        phases={"data": step * 0.5},
        fell_back_to=back,
        began_at=began_at,
    )


def recorded(looks: list[Look], *, interval: float = 0.25, last_step: int | None = None) -> list[Line]:
    recorder = Recorder(attempt=1, last_step=last_step)
    return [line for one in looks for line in recorder.look(one, interval=interval, ranks=list)]


def points(lines: list[Line]) -> list[Point]:
    return [line for line in lines if isinstance(line, Point)]


def events(lines: list[Line]) -> list[tuple[str, int | None]]:
    return [(line.type, line.step) for line in lines if isinstance(line, Event)]


def test_each_look_at_a_training_that_moved_is_a_point() -> None:
    lines = recorded([look(0, 0), look(0.25, 3, loss=0.5), look(0.5, 3, loss=0.5), look(0.75, 5, loss=0.25)])
    assert [(p.step, p.loss, p.seconds) for p in points(lines)] == [(3, 0.5, 0.25), (5, 0.25, 0.25)]
    assert [p.phases for p in points(lines)] == [{"data": 1.5}, {"data": 1.0}]


def test_with_a_longer_interval_a_point_is_the_mean_over_it() -> None:
    looks = [look(0, 0), *(look(0.25 * n, n, loss=float(n)) for n in range(1, 9))]
    assert [(p.step, p.loss, p.seconds) for p in points(recorded(looks, interval=1.0))] == [
        (4, 2.5, 1.0),
        (8, 6.5, 1.0),
    ]


def test_checkpoints_rounds_and_evaluations_are_events() -> None:
    saved = ProgressCheckpoint(step=2, time=datetime.now(UTC))
    lines = recorded(
        [
            look(0, 0),
            look(1, 1, generation=1, world_size=2),
            look(2, 2, generation=1, world_size=2, last_checkpoint=saved),
            look(3, 3, generation=1, world_size=2, last_checkpoint=saved, evaluation={"a": 1.0}, evaluation_step=3),
        ]
    )
    assert events(lines) == [("start", None), ("round", 1), ("checkpoint", 2), ("evaluation", 3)]


def test_a_fall_back_within_a_master_is_marked_before_the_steps_that_are_done_again() -> None:
    lines = recorded([look(0, 0), look(1, 8), look(2, 5, back=4), look(3, 9)])
    assert events(lines)[1:] == [("fallBack", 4)]
    assert [line.step for line in kept(lines) if isinstance(line, Point)] == [5, 9]  # type: ignore[arg-type]


def test_a_master_that_goes_on_from_a_checkpoint_marks_what_its_predecessor_did_in_vain() -> None:
    lines = recorded([look(0, 50, began_at=None), look(1, 57, began_at=50)], last_step=80)
    assert ("fallBack", 50) in events(lines)


def test_a_master_that_loses_nothing_marks_nothing() -> None:
    lines = recorded([look(0, 80, began_at=None), look(1, 85, began_at=80)], last_step=80)
    assert events(lines) == [("start", None)]


def test_the_end_has_the_final_loss_the_goodput_and_the_ranks() -> None:
    tracker = Tracker(attempt=1)
    tracker.report(rank=1, samples=4, loss=8.0, now=0.0, phases={"forward": 0.5})
    recorder = Recorder(attempt=1, last_step=None)
    recorder.look(look(0, 0), interval=0.25, ranks=list)
    lines = recorder.end(look(1, 9, loss=0.125, finished=True), interval=0.25, ranks=tracker.ranks.table)
    assert points(lines)[-1].loss == 0.125
    table, end = (line for line in lines[-2:] if isinstance(line, Event))
    assert table.details["ranks"] == [{"rank": 1, "samples": 4, "loss": 2.0, "phases": {"forward": 0.5}}]
    assert (end.type, end.step, end.details["finished"]) == ("end", 9, True)


def read(folder: Path) -> list[Line | None]:
    return [decode(line) for line in (folder / FILE).read_bytes().splitlines()]


def a_point(step: int) -> Point:
    return Point(step=step, time=float(step), seconds=0.25, loss=1.0 / (1 << step % 8), samples_per_second=1234.5)


def test_a_file_that_goes_on_keeps_its_lines_and_knows_the_last_step(tmp_path: Path) -> None:
    first = HistoryFile(tmp_path / "made", HEADER)
    first.append([a_point(1), a_point(2)])
    first.close()
    second = HistoryFile(tmp_path / "made", HEADER)
    assert second.last_step == 2
    second.append([a_point(3)])
    second.close()
    assert read(tmp_path / "made") == [HEADER, a_point(1), a_point(2), a_point(3)]


def test_a_cut_last_line_costs_itself_alone(tmp_path: Path) -> None:
    first = HistoryFile(tmp_path, HEADER)
    first.append([a_point(1), a_point(2)])
    first.close()
    os.truncate(tmp_path / FILE, (tmp_path / FILE).stat().st_size - 5)
    second = HistoryFile(tmp_path, HEADER)
    assert second.last_step == 1
    second.append([a_point(3)])
    second.close()
    assert [line for line in read(tmp_path) if line is not None] == [HEADER, a_point(1), a_point(3)]


def test_a_file_that_grows_is_thinned_and_its_interval_grows_with_it(tmp_path: Path) -> None:
    file = HistoryFile(tmp_path, HEADER, most_points=20_000)
    saved = Event(EventType.CHECKPOINT, 3.0, 3)
    file.append([saved])
    for step in range(3000):
        file.append([a_point(step)])
    file.close()
    lines = read(tmp_path)
    assert (tmp_path / FILE).stat().st_size < 21_000
    assert saved in lines
    assert lines[0] == Header("digits", "default", "u", file.interval)
    assert file.interval > 1
    kept_points = [line for line in lines if isinstance(line, Point)]
    assert kept_points[-1].step == 2999
    assert sum(point.seconds for point in kept_points) == pytest.approx(3000 * 0.25)
    again = HistoryFile(tmp_path, HEADER)
    assert again.interval == file.interval
    again.close()


def test_too_many_events_are_thinned_too(tmp_path: Path) -> None:
    file = HistoryFile(tmp_path, HEADER, most_events=5_000)
    for step in range(1000):
        file.append([Event(EventType.CHECKPOINT, float(step), step)])
    file.close()
    assert (tmp_path / FILE).stat().st_size < 6_000


def test_a_week_of_a_job_with_many_named_values_stays_below_20_megabytes(tmp_path: Path) -> None:
    file = HistoryFile(
        tmp_path, HEADER, most_points=80_000, most_events=40_000
    )  # a hundredth of the bounds, and of the week
    values = {f"a_rather_long_name_{number}": 0.123456789 for number in range(32)}
    step = 0
    while step * 0.25 < 6048:
        step += max(1, int(file.interval / 0.25))  # as the recorder has it
        file.append([Point(step=step, time=step * 0.25, seconds=file.interval, loss=0.5, values=values)])
    file.close()
    assert (tmp_path / FILE).stat().st_size < 200_000


def test_a_full_disk_is_said_once_and_nothing_else_happens(caplog: pytest.LogCaptureFixture) -> None:
    tries = []

    def no_room() -> HistoryFile:
        tries.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/claim/history.jsonl")

    with caplog.at_level(logging.WARNING):
        writer = HistoryWriter(no_room, lambda file: [], lambda file: [])
        while len(tries) < 2:
            pass
        writer.end()
    (record,) = caplog.records
    assert record.getMessage() == (
        "the history cannot be written: /claim/history.jsonl No space left on device; the training goes on without"
    )


def test_lines_that_a_full_disk_cut_do_not_spoil_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = HistoryFile(tmp_path, HEADER)
    whole = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 10:
            return whole(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="full"):
        file.append([a_point(1)])
    monkeypatch.setattr(os, "write", whole)
    file.append([a_point(2)])
    file.close()
    assert [line for line in read(tmp_path) if line is not None] == [HEADER, a_point(2)]


def test_the_tracker_gives_each_fall_back_once() -> None:
    tracker = Tracker(attempt=1)
    tracker.reach(10)
    tracker.fall_back(6)
    tracker.fall_back(4)
    assert (tracker.take_fall_back(), tracker.take_fall_back()) == (4, None)


def test_lines_are_plain_json() -> None:
    assert json.loads(a_point(1).encode()) == {
        "step": 1,
        "time": 1.0,
        "seconds": 0.25,
        "loss": 0.5,
        "samplesPerSecond": 1234.5,
    }
