"""Which part a free worker computes once more: one of the step in work, that it does not have, and that no other worker hedges."""

from hypothesis import given
from hypothesis import strategies as st

from configs import config_of
from disttrain_trainer.coordinator.hedging import Hedges
from disttrain_trainer.coordinator.work_queue import WorkQueue

WORKERS = 3


def make(*, total: int = 12, parts_per_step: int = 6, workers: int = WORKERS) -> WorkQueue:
    queue = WorkQueue(total=total, parts_per_step=parts_per_step, aligned=True)
    for worker in range(workers):
        queue.join(worker)
    return queue


def test_a_job_without_backup_workers_has_no_hedges() -> None:
    spec = {
        "strategy": {"type": "ParameterServer", "parameterServer": {"consistency": "Sync", "backupWorkers": 1}},
        "parameterServer": {"replicas": 1},
        "worker": {"replicas": 2},
        "trainer": {"model": "a:b", "dataset": "a:c", "epochs": 1, "optimizer": {"name": "SGD", "learningRate": 0.1}},
    }
    assert Hedges.of(config_of(spec)) is not None
    spec["strategy"]["parameterServer"]["backupWorkers"] = 0  # type: ignore[index]
    assert Hedges.of(config_of(spec)) is None


def test_the_last_part_of_the_worker_with_most_left_comes_first() -> None:
    queue, hedges = make(), Hedges(2)
    assert [queue.take(worker, 2) for worker in range(WORKERS)] == [[0, 3], [1, 4], [2, 5]]
    queue.finish(0, [0, 3])
    queue.finish(2, [2])
    assert hedges.give(0, queue, begun=False) == 4
    assert hedges.give(2, queue, begun=False) is None, "2 and 1 compute the others now"
    assert hedges.give(2, queue, begun=True) == 1


def test_a_part_that_is_computed_now_is_given_after_a_wait_and_the_oldest_first() -> None:
    queue, hedges = make(parts_per_step=3), Hedges(1)
    for worker in range(WORKERS):
        queue.take(worker, 1)
    hedges.finish(1, [], queue)
    hedges.finish(2, [], queue)
    queue.finish(2, [2])
    assert hedges.give(2, queue, begun=False) is None
    assert hedges.give(2, queue, begun=True) == 0, "worker 0 has said nothing for the longest time"


def test_a_part_that_no_worker_has_taken_comes_before_all_others() -> None:
    queue, hedges = make(), Hedges(1)
    assert queue.take(0, 2) == [0, 3]
    queue.finish(0, [0, 3])
    assert hedges.give(0, queue, begun=False) == 1


def test_no_more_hedges_are_outstanding_than_there_are_backup_workers() -> None:
    queue, hedges = make(), Hedges(1)
    for worker in range(WORKERS):
        queue.take(worker, 2)
    queue.finish(0, [0, 3])
    queue.finish(1, [1, 4])
    assert hedges.give(0, queue, begun=True) == 5
    assert hedges.give(1, queue, begun=True) is None
    hedges.leave(0)
    assert hedges.give(1, queue, begun=True) == 5, "the hedge of a lost worker is given again"


def test_who_hears_that_a_part_is_done_elsewhere() -> None:
    queue, hedges = make(), Hedges(2)
    for worker in range(WORKERS):
        queue.take(worker, 2)
    queue.finish(0, [0, 3])
    assert hedges.give(0, queue, begun=False) == 4
    assert hedges.finish(2, [2], queue) == {}, "no other worker computes it"
    assert hedges.finish(0, [4], queue) == {1: [4]}, "its holder need not compute it"
    queue.finish(0, [4])
    assert hedges.give(0, queue, begun=False) == 5
    assert hedges.finish(2, [5], queue) == {0: [5]}, "the holder was first"


def test_a_holder_whose_part_was_done_elsewhere_still_computes_it() -> None:
    queue, hedges = make(), Hedges(2)
    for worker in range(WORKERS):
        queue.take(worker, 2)
    for worker, parts in ((0, [0, 3]), (2, [2, 5, 1])):
        queue.finish(worker, parts)
    untaken, taken = queue.outstanding()
    assert (untaken, taken) == ([], {1: (None, [4])})
    assert hedges.give(0, queue, begun=False) == 4, "worker 1 has not begun it: it still computes part 1"


@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["take", "finish", "hedge", "lose", "join", "learn"]), st.integers(0, 2), st.booleans()
        ),
        max_size=80,
    ),
    backups=st.integers(1, 2),
    parts_per_step=st.sampled_from([1, 2, 3, 5, 6]),
)
def test_whatever_happens_every_part_is_computed_and_no_hedge_is_in_vain(
    events: list[tuple[str, int, bool]], backups: int, parts_per_step: int
) -> None:
    queue, hedges = make(total=30, parts_per_step=parts_per_step), Hedges(backups)
    own: dict[int, list[int]] = {worker: [] for worker in range(WORKERS)}
    copies: dict[int, int] = {}
    for event, worker, flag in events:
        if event == "join":
            queue.join(worker)
            hedges.leave(worker)
            own[worker] = []
            copies.pop(worker, None)
        elif worker not in own:
            continue
        elif event == "lose":
            queue.leave(worker)
            hedges.leave(worker)
            del own[worker]
            copies.pop(worker, None)
        elif event == "take":
            own[worker] += queue.take(worker, 2)
        elif event == "hedge" and worker not in copies:
            part = hedges.give(worker, queue, begun=flag)
            if part is None:
                continue
            assert part // parts_per_step == queue.applied.floor // parts_per_step, "of a step that cannot begin"
            assert part not in queue.applied, "it is done"
            assert part not in own[worker], "it has the part itself"
            copies[worker] = part
            outstanding = hedges.outstanding(queue)
            assert outstanding[part] == worker
            assert len(outstanding) <= backups
            assert list(outstanding.values()).count(worker) == 1
        elif event == "finish":
            done = [copies.pop(worker)] if flag and worker in copies else own[worker][:1]
            del own[worker][: 0 if done and done[0] not in own[worker][:1] else 1]
            for other, parts in hedges.finish(worker, done, queue).items():
                assert other != worker
                assert all(part in own.get(other, []) or copies.get(other) == part for part in parts)
            queue.finish(worker, done)
    for worker in own:
        queue.leave(worker)
    queue.join(7)
    rest = queue.take(7, 100)
    assert sorted({*queue.applied, *rest}) == list(range(30))
    assert not set(queue.applied) & set(rest)
