"""The one rule of goodput: every second of an attempt is in one bucket, and the status has what the master counted."""

from datetime import UTC, datetime

from disttrain.api.goodput import STALL_SECONDS, MasterGoodput
from disttrain.api.runtime import Progress

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def looked(*looks: tuple[float, int, str | None], finished: float | None = None) -> dict[str, float]:
    """The buckets of a job that began at 100, after looks at (time, step, whom it waits for)."""
    goodput = MasterGoodput(100.0, began=NOON)
    step = 0
    for now, step, waiting in looks:
        speed = 1.0 if step else None
        goodput.look(Progress(attempt=1, step=step, waiting_for=waiting, samples_per_second=speed), now)
    if finished is not None:
        for now in (finished, finished + 100):
            goodput.look(Progress(attempt=1, step=step, samples_per_second=1.0, finished=True), now)
    return goodput.seconds


def test_time_goes_to_what_the_job_is_seen_doing() -> None:
    seconds = looked(
        (103.0, 0, "worker-1 (3 s)"),  # starting
        (105.0, 10, None),
        (110.0, 20, None),
        (112.0, 20, "parameter-server-0 (2 s)"),  # stalled
        (113.0, 12, None),  # back at the checkpoint: redone until step 20 is there again
        (116.0, 20, None),
        (120.0, 30, None),
        finished=120.0,
    )
    assert seconds == {"starting": 3.0, "productive": 11.0, "redone": 4.0, "stalled": 0.0 + 2.0}


def test_a_step_that_lasts_longer_than_the_time_between_two_looks_is_productive() -> None:
    seconds = looked((103.0, 1, None), *((103.0 + 5 * i, 1 + i // 6, None) for i in range(1, 61)))
    assert seconds == {"starting": 0.0, "productive": 303.0, "redone": 0.0, "stalled": 0.0}


def test_a_second_scraper_changes_nothing() -> None:
    one = [(100.0 + 5 * i, i // 3, None) for i in range(1, 30)]
    two = sorted([*one, *((now + 0.1, step, None) for now, step, _ in one)])
    difference = {bucket: abs(value - looked(*two)[bucket]) for bucket, value in looked(*one).items()}
    assert max(difference.values()) < 0.2, difference


def test_a_job_that_stands_still_with_no_member_to_wait_for_is_stalled_after_a_while() -> None:
    seconds = looked((110.0, 10, None), *((110.0 + i, 10, None) for i in range(1, 101)), (215.0, 11, None))
    assert seconds["stalled"] == 100.0
    assert seconds["productive"] == 15.0
    assert STALL_SECONDS < 100


def test_a_job_of_long_steps_gets_more_time() -> None:
    seconds = looked((200.0, 1, None), *((200.0 + 10 * i, 1, None) for i in range(1, 21)), (401.0, 2, None))
    assert seconds == {"starting": 0.0, "productive": 301.0, "redone": 0.0, "stalled": 0.0}


def test_the_time_before_a_resumed_jobs_first_step_is_its_start() -> None:
    goodput = MasterGoodput(100.0, began=NOON)
    goodput.look(Progress(attempt=2, step=120, waiting_for="worker-0 (9 s)"), 109.0)
    goodput.look(Progress(attempt=2, step=121, samples_per_second=1.0), 112.0)
    assert goodput.seconds == {"starting": 9.0, "productive": 3.0, "redone": 0.0, "stalled": 0.0}


def test_the_evaluation_at_the_end_is_work_and_what_comes_after_it_is_nothing() -> None:
    assert looked((103.0, 10, None), finished=110.0)["productive"] == 10.0


def test_steps_that_an_earlier_attempt_had_done_are_done_again() -> None:
    goodput = MasterGoodput(100.0, began=NOON, steps_done=20)
    for now, step in ((102.0, 10), (104.0, 10), (107.0, 15), (110.0, 20), (114.0, 30)):
        goodput.look(Progress(attempt=2, step=step, samples_per_second=1.0 if now > 102 else None), now)
    assert goodput.seconds == {"starting": 4.0, "productive": 4.0, "redone": 6.0, "stalled": 0.0}
    assert goodput.spent.redone_seconds == 6.0


def test_every_second_of_a_master_is_in_its_report() -> None:
    goodput = MasterGoodput(100.0, began=NOON)
    for now, step in ((102.0, 0), (104.0, 3), (107.0, 3)):
        goodput.look(Progress(attempt=1, step=step, samples_per_second=1.0 if step else None), now)
    assert goodput.spent.undecided_seconds == 3.0
    assert sum(goodput.seconds.values()) + goodput.spent.undecided_seconds == 7.0
