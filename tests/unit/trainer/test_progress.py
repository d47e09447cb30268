"""Step, loss and speed of a job, from reports at given times."""

import math

import pytest

from disttrain.api import Progress, Termination
from disttrain_trainer.coordinator.progress import Tracker


def test_the_loss_is_the_mean_over_the_samples_of_the_newest_reports() -> None:
    tracker = Tracker(attempt=1)
    tracker.report(rank=0, samples=10, loss=100.0, now=0)
    tracker.report(rank=0, samples=10, loss=20.0, now=5)
    tracker.report(rank=1, samples=30, loss=30.0, now=5.5)
    assert tracker.loss() == 50 / 40


def test_the_loss_of_a_short_job_is_that_of_its_end_not_of_all_of_it() -> None:
    tracker = Tracker(attempt=1)
    tracker.report(rank=0, samples=10, loss=23.0, now=3)
    tracker.report(rank=1, samples=10, loss=23.0, now=3)
    assert tracker.loss() == 2.3
    for tenth in range(1, 10):
        tracker.report(rank=0, samples=10, loss=10.0 / tenth, now=3 + tenth / 10)
    tracker.report(rank=1, samples=10, loss=1.0, now=3.9)
    assert tracker.loss() == (10.0 / 9 + 1.0) / 20


def test_a_rank_that_is_gone_has_no_part_in_the_loss() -> None:
    tracker = Tracker(attempt=1)
    tracker.report(rank=0, samples=1, loss=9.0, now=0)
    tracker.report(rank=1, samples=1, loss=1.0, now=50)
    assert tracker.loss() == 5.0
    tracker.forget(0)
    assert tracker.loss() == 1.0


def test_the_loss_of_a_finished_job_is_that_of_its_last_steps_whenever_they_were_reported() -> None:
    def finished(*reports: tuple[int, list[tuple[float, float, float]]]) -> float | None:
        tracker = Tracker(attempt=1)
        for now, (rank, final) in enumerate(reports):
            tracker.report(rank=rank, samples=10, loss=7.0 * now, now=now, final=final)
        tracker.finish(now=60)
        return tracker.loss()

    assert finished((0, [(4, 1.0, 2.0), (6, 3.0, 2.0)]), (1, [(5, 2.0, 4.0)])) == 6.0 / 8.0
    assert finished((1, [(5, 9.0, 4.0)]), (0, [(4, 1.0, 2.0)]), (0, [(5, 2.0, 4.0), (6, 3.0, 2.0)])) == 6.0 / 8.0


def test_the_speed_is_that_of_the_last_seconds() -> None:
    tracker = Tracker(attempt=1)
    for second in range(31):
        tracker.report(rank=0, samples=1000 if second < 20 else 10, loss=1.0, now=second)
    assert tracker.samples_per_second(30) == 10.0


def test_the_speed_falls_when_nothing_is_reported() -> None:
    tracker = Tracker(attempt=1)
    for second in range(11):
        tracker.report(rank=0, samples=100, loss=None, now=second)
    assert tracker.samples_per_second(10) == 100.0
    assert tracker.samples_per_second(100) == 0.0


def test_the_speed_of_a_finished_job_stays() -> None:
    tracker = Tracker(attempt=1)
    for second in range(11):
        tracker.report(rank=0, samples=100, loss=None, now=second)
    tracker.finish(10)
    assert tracker.progress(now=1000, waiting_for=None).samples_per_second == 100.0


@pytest.mark.parametrize(("whole", "shown"), [(None, 2.0), (3.0, 3.0), (math.inf, None)])
def test_the_gradient_norm_is_that_of_the_whole_gradient_where_it_is_known(
    whole: float | None, shown: float | None
) -> None:
    tracker = Tracker(attempt=1)
    tracker.report(rank=0, samples=8, loss=1.0, now=0, gradient_norm=2.0)
    tracker.gradient_norm = whole
    assert tracker.progress(now=0, waiting_for=None).gradient_norm == shown


def test_steps_that_were_lost_are_counted_once() -> None:
    tracker = Tracker(attempt=1)
    tracker.reach(100)
    tracker.fall_back(80)
    tracker.reach(90)
    tracker.fall_back(95)
    progress = tracker.progress(now=0, waiting_for=None)
    assert (progress.step, progress.redone_steps) == (95, 20)


def finished(evaluation: dict[str, float]) -> Progress:
    """The termination message of a job that found this, as a kubelet hands it on."""
    tracker = Tracker(attempt=1)
    tracker.reach(10)
    tracker.evaluation = evaluation
    tracker.finish(now=1)
    text = Termination(done=True, progress=tracker.progress(now=1, waiting_for=None)).encode()
    last = Termination.decode(text.encode()[:4096].decode(errors="replace"))
    assert last.done
    assert last.progress is not None
    assert (last.progress.finished, last.progress.step) == (True, 10)
    return last.progress


def test_a_number_of_the_evaluation_that_is_not_finite_is_said_by_its_name_and_value() -> None:
    said = finished({"loss": float("nan"), "accuracy": 0.5, "perplexity": float("inf")})
    assert said.evaluation == {"accuracy": 0.5}
    assert said.warning == (
        "evaluation: loss is nan, perplexity is inf; JSON has no such number, and the job's status leaves it out"
    )
    assert finished({"accuracy": 0.5}).warning is None


@pytest.mark.parametrize(
    ("evaluation", "kept"),
    [
        ({f"class {number:04}": number / 7 for number in range(5000)}, 32),
        ({f"{number}" + "é\0" * 4000: 1.0 for number in range(40)}, 0),
        ({f"{number:02}" + "é" * 60: 1 / 3 for number in range(20)}, 13),
    ],
)
def test_an_evaluation_of_any_size_leaves_the_last_word_whole(evaluation: dict[str, float], kept: int) -> None:
    said = finished(evaluation)
    assert len(said.evaluation or {}) == kept
    more = len(evaluation) - kept
    assert said.warning == f"evaluation: the job's status has {kept} of its numbers and no room for {more} more"


def test_the_samples_that_whole_epochs_left_out_are_counted_also_after_a_fall_back() -> None:
    tracker = Tracker(attempt=1)
    tracker.reach(7)
    assert tracker.dropped_samples is None
    tracker.steps_per_epoch, tracker.left_out = 3, 5
    assert tracker.dropped_samples == 10
    tracker.fall_back(2)
    assert tracker.progress(now=0, waiting_for=None).dropped_samples == 0
