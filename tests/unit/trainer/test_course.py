"""What a training decides beside its steps: by its evaluations, and what is kept of them."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from configs import config_of
from disttrain.api.course import KeepBest, Mode
from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import course as courses
from disttrain_trainer.checkpoint import retention, store
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.manifest import NAME
from disttrain_trainer.checkpoint.measured import Measured, combined
from disttrain_trainer.checkpoint.store import name_of
from disttrain_trainer.coordinator.checkpoint_folder import CheckpointFolder
from disttrain_trainer.coordinator.evaluations import Evaluations
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.data.schedule import DataSet
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.evaluation import Evaluator, measured_of
from disttrain_trainer.net.messages import MessageType, encode

STOPPING = {"metric": "accuracy", "mode": "Max", "patience": 2}
BEST = {"metric": "loss", "mode": "Min"}


def config(
    *, stopping: dict[str, Any] | None = None, best: dict[str, Any] | None = None, steps: int = 100
) -> JobConfig:
    return config_of(
        {
            "strategy": {"type": "DataParallel"},
            "trainer": {
                "model": "m:m",
                "dataset": "m:d",
                "evaluate": "m:e",
                "evaluateEverySteps": 10,
                "optimizer": {"name": "SGD", "learningRate": 0.1},
                "maxSteps": steps,
            }
            | ({"earlyStopping": stopping} if stopping else {}),
            "checkpoint": {"volume": {"persistentVolumeClaim": "c"}, "everySteps": 10, "keep": 2}
            | ({"keepBest": best} if best else {}),
        }
    )


def test_an_evaluation_is_due_at_each_multiple_but_the_last_step() -> None:
    assert [step for step in range(101) if courses.is_due(config(), step, total=100)] == list(range(10, 100, 10))


def test_the_training_ends_after_as_many_evaluations_without_a_better_value_as_patience_says() -> None:
    course, job = Course(), config(stopping=STOPPING)
    for step, accuracy in ((10, 0.5), (20, 0.5), (30, 0.6), (40, math.nan)):
        course = course.after(step, {"accuracy": accuracy}, job)
        assert course.stopped is None
    course = course.after(50, {"accuracy": 0.6}, job)
    assert course.stopped == "earlyStopping: accuracy is not better than 0.6 for 2 evaluations"
    assert (course.evaluated, course.record) == (50, 0.6)


def test_an_evaluation_that_could_not_be_made_does_not_count() -> None:
    job = config(stopping=STOPPING)
    course = Course().after(10, {"accuracy": 0.5}, job).after(20, None, job)
    assert (course.evaluated, course.waited, course.evaluation) == (20, 0, None)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stopping": STOPPING}, r"trainer\.earlyStopping\.metric: .* no 'accuracy'; it returned f1, recall"),
        ({"best": BEST}, r"checkpoint\.keepBest\.metric: .* no 'loss'; it returned f1, recall"),
    ],
)
def test_a_metric_that_evaluate_does_not_return_is_refused_by_its_field(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongInput, match=said):
        courses.require_metrics({"recall": 1.0, "f1": 1.0}, config(**fields))


def test_slices_are_combined_by_their_weights() -> None:
    slices = [measured_of({"loss": (1.0, 3)}, "m:e"), measured_of({"loss": (5.0, 1)}, "m:e"), Measured({}, {})]
    assert combined(slices) == Measured({"loss": 2.0}, {"loss": 4.0})
    assert measured_of({"loss": (1.0, 3), "f1": 0.5}, "m:e").weights is None


def test_a_weight_that_is_none_is_refused() -> None:
    with pytest.raises(WrongInput, match="'loss' with the weight -1"):
        measured_of({"loss": (1.0, -1)}, "m:e")


def test_the_master_waits_for_every_slice_of_the_present_round() -> None:
    evaluations = Evaluations(config=config(), tracker=Tracker(attempt=1))

    def found(number: int, *, round_number: int = 1) -> bool:
        slice_of = {"generation": round_number, "step": 10, "slice": number, "of": 2}
        return evaluations.found({**slice_of, "evaluation": {"loss": float(number)}, "weights": {"loss": 1.0}})

    assert not found(0)
    assert not found(1, round_number=2)
    assert found(0, round_number=2)
    assert (evaluations.course.evaluated, evaluations.course.evaluation) == (10, {"loss": 0.5})
    assert not found(1, round_number=2)


def publish(root: Path, job: JobConfig, step: int, loss: float | None) -> None:
    folder = store.prepare(root, step)
    found = None if loss is None else {"loss": loss}
    course = Course().after(step, found, job)
    manifest = store.publish(
        folder, config=job, step=step, parts=step, data=DataSet(64), files={}, evaluation=found, course=course
    )
    assert job.checkpoint is not None
    retention.prune(folder, manifest, keep=job.checkpoint.keep, keep_best=job.checkpoint.keep_best)


def test_the_best_checkpoint_stays_beside_the_newest_ones(tmp_path: Path) -> None:
    job, keep_best = config(best=BEST), KeepBest(metric="loss", mode=Mode.MIN)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 1.0), (50, None)):
        publish(tmp_path, job, step, loss)
    assert store.best(tmp_path, keep_best) == (20, 1.0)
    assert [folder.name for folder in store.folders(tmp_path)] == [name_of(step) for step in (50, 40, 20)]
    store.amend(tmp_path / name_of(50), Course().after(50, {"loss": 0.5}, job))
    assert store.best(tmp_path, keep_best) == (50, 0.5)
    publish(tmp_path, job, 60, 4.0)
    assert [folder.name for folder in store.folders(tmp_path)] == [name_of(step) for step in (60, 50)]


def test_a_later_checkpoint_that_did_not_hold_does_not_push_out_the_best_one(tmp_path: Path) -> None:
    job = config(best=BEST)
    for step, loss in ((10, 1.0), (60, 0.5), (20, 2.0), (30, 3.0), (40, 4.0)):
        publish(tmp_path, job, step, loss)
    assert [folder.name for folder in store.folders(tmp_path)] == [name_of(step) for step in (60, 40, 30, 10)]


def test_a_training_that_ended_early_is_finished_until_its_end_is_another_one(tmp_path: Path) -> None:
    job = config(stopping=STOPPING)
    course = Course(evaluated=10, waited=2, stopped="earlyStopping")
    folder = store.prepare(tmp_path, 10)
    store.publish(folder, config=job, step=10, parts=10, data=DataSet(64), files={}, finished=True, course=course)
    assert store.manifest_of(folder).for_job(job).finished
    longer = store.manifest_of(folder).for_job(config(stopping=STOPPING | {"patience": 5}))
    assert not longer.finished
    assert longer.course.stopped is None


@pytest.mark.parametrize("other", [{"metric": "loss", "mode": "Min"}, {"mode": "Min"}])
def test_the_best_value_of_another_metric_or_mode_does_not_count(tmp_path: Path, other: dict[str, Any]) -> None:
    job, another = config(stopping=STOPPING), config(stopping=STOPPING | other)
    course, folder = Course(evaluated=10, record=0.9, waited=1), store.prepare(tmp_path, 10)
    store.publish(folder, config=job, step=10, parts=10, data=DataSet(64), files={}, course=course)
    assert store.manifest_of(folder).for_job(job).course == course
    resumed = store.manifest_of(folder).for_job(another).course.after(20, {"accuracy": 2.0, "loss": 2.0}, another)
    assert (resumed.record, resumed.waited) == (2.0, 0)


def test_an_evaluation_without_the_metric_counts_as_no_better_one() -> None:
    assert Course(record=0.5).after(10, {}, config(stopping=STOPPING)).waited == 1


def test_a_data_set_without_slices_is_evaluated_whole_each_time() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    def found(data: Any) -> Measured:
        def evaluate(model: nn.Module, data: Any) -> dict[str, tuple[float, int]]:
            return {"mean": (1.0, sum(1 for _ in data))}

        return Evaluator(evaluate, name="m:e", dataset=lambda: data, seeds=nullcontext).measure(nn.Linear(1, 1))

    assert found(Stream()) == Measured({"mean": 1.0})
    assert found(DataLoader(range(3))) == Measured({"mean": 1.0})  # type: ignore[arg-type]  # a range has what it needs
    assert found([0, 1, 2]) == Measured({"mean": 1.0}, {"mean": 3.0})


def test_the_parts_that_are_left_out_are_whole_numbers_where_there_is_no_room_for_all() -> None:
    tracker = Tracker(attempt=1)
    tracker.course = Course(roll_backs=1, left_out=list(range(1000, 3000, 2)))
    shown = tracker.progress(now=0, waiting_for=None).roll_backs
    assert shown is not None
    numbers = shown.left_out_parts.split(",")
    assert 150 < len(numbers) < 1000
    assert numbers == [str(part) for part in range(1000, 1000 + 2 * len(numbers), 2)]


def test_an_evaluation_is_kept_though_a_later_manifest_cannot_be_read(tmp_path: Path) -> None:
    job = config(best=BEST)
    for step in (10, 20):
        publish(tmp_path, job, step, None)
    (tmp_path / name_of(20) / NAME).write_text("{")

    def run_apart(work: Callable[[], Any], answer: Callable[[Any], None], executor: Any) -> None:
        answer(work())

    tracker = Tracker(attempt=1)
    CheckpointFolder(tmp_path, keep=2, config=job, tracker=tracker, run_apart=run_apart).amend(
        Course(evaluated=10, evaluation={"loss": 1.0})
    )
    assert store.manifest_of(tmp_path / name_of(10)).evaluation == {"loss": 1.0}
    assert tracker.best is not None
    assert tracker.best.step == 10


def test_there_is_no_roll_back_whose_parts_a_message_would_have_no_room_for() -> None:
    job = config_of(
        {
            "strategy": {"type": "DataParallel"},
            "trainer": {
                "model": "m:m",
                "dataset": "m:d",
                "nanPolicy": {"rollBacks": 1000},
                "optimizer": {"name": "SGD", "learningRate": 0.1},
                "maxSteps": 20,
                "partsPerStep": 4096,
                "batchSize": 4096,
            },
        }
    )
    course, step = Course(), 10**5
    while course.may_roll_back(job):
        course = course.without(range(step * 4096, (step + 1) * 4096), "worker-0")
        step += 1
    assert course.roll_backs == 16
    encode(MessageType.COURSE, course=course.model_dump())


def test_going_back_to_a_state_undoes_no_roll_back() -> None:
    before = Course(evaluated=10)
    after = Course(evaluated=20).without([14, 15], "worker-1 at step 7").without([2], "worker-0 at step 1")
    went_back = before.merged(after)
    assert (went_back.evaluated, went_back.roll_backs, went_back.left_out) == (10, 2, [2, 14, 15])
    assert went_back.rolled_back == "worker-0 at step 1"
    assert went_back.merged(before) == went_back
