"""The history that a training leaves beside its checkpoints: what the job reports, through the loss of processes and of the master."""

import urllib.request
from pathlib import Path

from disttrain.api.history import FILE, Event, Line, Point, decode, kept
from disttrain.api.names import Role
from training.job import Job, checkpoints, digits, held, served

SAVE_STEPS = 40
MIDDLE = 2 * SAVE_STEPS + 10
LAST = 8 * 23


def lines_of(folder: Path) -> list[Line]:
    read = [decode(line) for line in (folder / FILE).read_bytes().splitlines()]
    return [line for line in read if line is not None]


def points_of(folder: Path) -> list[Point]:
    return [line for line in lines_of(folder) if isinstance(line, Point)]


def test_a_lost_master_leaves_one_history_without_the_steps_that_were_done_again(tmp_path: Path) -> None:
    spec = digits(**checkpoints(SAVE_STEPS), trainer=held(epochs=8))
    with Job(folder=tmp_path, spec=spec) as job:
        job.hold(SAVE_STEPS + 2)
        job.start()
        job.until_held(SAVE_STEPS + 2, checkpoint=SAVE_STEPS)
        # Each look of the master tells of the newest checkpoint: on a busy machine two may lie between two looks.
        job.until(
            lambda _: any(
                isinstance(line, Event) and line.type == "checkpoint" for line in lines_of(tmp_path / "checkpoints")
            )
        )
        job.hold(MIDDLE)
        job.until_held(MIDDLE, checkpoint=2 * SAVE_STEPS)
        # The file is written by a thread of its own: a step that is not in it yet cannot be seen to be lost.
        job.until(lambda _: any(line.step > 2 * SAVE_STEPS for line in points_of(tmp_path / "checkpoints")))
        job.kill(Role.MASTER)
        for rank in range(2):
            job.kill(Role.WORKER, rank)
        job.let_go()
        progress = job.complete()
    header, *lines = lines_of(tmp_path / "checkpoints")
    assert header.encode().startswith('{"history":1,')
    events = [line for line in lines if isinstance(line, Event)]
    assert [event.type for event in events].count("start") == 2
    assert [event.step for event in events if event.type == "fallBack"] == [2 * SAVE_STEPS]
    assert {SAVE_STEPS, 2 * SAVE_STEPS, LAST} <= {event.step for event in events if event.type == "checkpoint"}
    assert (events[-1].type, events[-1].step, events[-1].details["finished"]) == ("end", LAST, True)
    assert [row["rank"] for row in events[-2].details["ranks"]] == [0, 1]
    points = [
        line for line in kept(line for line in lines if isinstance(line, Point | Event)) if isinstance(line, Point)
    ]
    steps = [point.step for point in points]
    assert steps == sorted(set(steps))
    assert points[-1].step == LAST
    assert points[-1].loss is not None
    assert progress.loss is not None
    assert abs(points[-1].loss - progress.loss) < 1e-8
    assert {"forward", "backward"} <= points[-1].phases.keys() | points[-2].phases.keys()


def test_the_master_serves_the_history_of_a_job_without_a_place_for_it(tmp_path: Path) -> None:
    spec = digits(**served("Sync"), trainer=held(epochs=8))
    with Job(folder=tmp_path, spec=spec) as job:

        def newest() -> Point | None:
            with urllib.request.urlopen(f"http://127.0.0.1:{job.metrics_port}/history", timeout=10) as answer:
                read = [decode(line) for line in answer.read().splitlines()]
            return next((line for line in reversed(read) if isinstance(line, Point)), None)

        job.hold(SAVE_STEPS)
        job.start()
        job.until_held(SAVE_STEPS)
        # The master asks the servers once a second what they have measured.
        job.until(lambda _: "\ndisttrain_gradient_norm" in job.metrics())
        job.hold(MIDDLE)
        job.until_held(MIDDLE)
        # The file is written by a thread of its own.
        job.until(lambda _: (point := newest()) is not None and point.step == MIDDLE)
        point = newest()
        job.let_go()
        job.complete()
    assert point is not None
    assert point.loss is not None
    assert point.samples_per_second is not None
    assert point.gradient_norm is not None
