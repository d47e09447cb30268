"""Which part a free worker computes once more: one of the step in work, that it does not have, and that no other worker hedges."""

from hypothesis import given
from hypothesis import strategies as st

from configs import config_of
from disttrain_trainer.coordinator.hedging import Hedges
from disttrain_trainer.coordinator.work_queue import WorkQueue
from disttrain_trainer.data.index_set import IndexSet

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


def test_the_last_part_of_the_worker_with_most_left_comes_first_and_moves() -> None:
    queue, hedges = make(), Hedges(2)
    assert [queue.take(worker, 2) for worker in range(WORKERS)] == [[0, 3], [1, 4], [2, 5]]
    queue.finish(0, [0, 3])
    queue.finish(2, [2])
    assert hedges.give(0, queue, begun=False) == (4, 1)
    assert queue.holders(4) == [0], "worker 1 must not begin it, too"
    assert hedges.give(2, queue, begun=False) is None, "2 and 1 compute the others now"
    assert hedges.give(2, queue, begun=True) == (1, None)
    assert queue.holders(1) == [1], "a copy leaves the part with its holder"


def test_a_part_that_is_computed_now_is_given_after_a_wait_and_the_oldest_first() -> None:
    queue, hedges = make(parts_per_step=3), Hedges(1)
    for worker in range(WORKERS):
        queue.take(worker, 1)
    hedges.finish(1, [], queue)
    hedges.finish(2, [], queue)
    queue.finish(2, [2])
    assert hedges.give(2, queue, begun=False) is None
    assert hedges.give(2, queue, begun=True) == (0, None), "worker 0 has said nothing for the longest time"


def test_a_part_that_no_worker_has_taken_comes_before_all_others() -> None:
    queue, hedges = make(), Hedges(1)
    assert queue.take(0, 2) == [0, 3]
    queue.finish(0, [0, 3])
    assert hedges.give(0, queue, begun=False) == (1, None)
    assert queue.holders(1) == [0]
    assert 1 not in queue.take(1, 2)


def test_no_more_hedges_are_outstanding_than_there_are_backup_workers() -> None:
    queue, hedges = make(), Hedges(1)
    for worker in range(WORKERS):
        queue.take(worker, 2)
    queue.finish(0, [0, 3])
    queue.finish(1, [1, 4])
    assert hedges.give(0, queue, begun=True) == (5, 2)
    assert hedges.give(1, queue, begun=True) is None
    hedges.leave(0)
    queue.leave(0)
    assert hedges.give(1, queue, begun=True) == (5, None), "the hedge of a lost worker is given again"


def test_a_part_that_was_moved_to_a_worker_that_stands_still_is_copied_again() -> None:
    queue, hedges = make(), Hedges(2)
    for worker in range(WORKERS):
        queue.take(worker, 2)
    queue.finish(0, [0, 3])
    queue.finish(1, [1, 4])
    queue.finish(2, [2])
    queue.move(5, 0)  # and nothing is heard of worker 0 any more
    assert hedges.give(1, queue, begun=True) == (5, None)


def test_who_hears_that_a_part_is_done_elsewhere() -> None:
    queue, hedges = make(), Hedges(2)
    for worker in range(WORKERS):
        queue.take(worker, 2)
    queue.finish(0, [0, 3])
    assert hedges.give(0, queue, begun=False) == (4, 1)
    assert hedges.finish(2, [2], queue) == {}, "no other worker computes it"
    assert hedges.finish(0, [4], queue) == {1: [4]}, "who had it may have begun it"
    queue.finish(0, [4])
    assert hedges.give(0, queue, begun=False) == (5, 2)
    assert hedges.finish(2, [5], queue) == {0: [5]}, "who had it had begun it, and was first"


@given(
    events=st.lists(
        st.tuples(st.sampled_from(["take", "finish", "hedge", "lose", "join"]), st.integers(0, 2), st.booleans()),
        max_size=80,
    ),
    backups=st.integers(1, 2),
    parts_per_step=st.sampled_from([1, 2, 3, 5, 6]),
)
def test_whatever_happens_every_part_is_computed_and_no_hedge_is_in_vain(
    events: list[tuple[str, int, bool]], backups: int, parts_per_step: int
) -> None:
    """The flag: the worker has waited; who had the part had begun it; the copy is done before the worker's own parts."""
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
            before = {other: set(parts) for other, parts in own.items()}
            given = hedges.give(worker, queue, begun=flag)
            if given is None:
                continue
            part = given.part
            assert part // parts_per_step == queue.applied.floor // parts_per_step, "of a step that cannot begin"
            assert part not in queue.applied, "it is done"
            assert part not in before[worker], "it has the part itself"
            assert given.former is None or part in before[given.former]
            if given.former is not None and not flag:
                own[given.former].remove(part)
            copies[worker] = part
            outstanding = hedges.outstanding(queue)
            assert outstanding[part] == worker
            assert len(outstanding) <= backups
            assert list(outstanding.values()).count(worker) == 1
        elif event == "finish":
            if flag and worker in copies:
                done = [copies.pop(worker)]
            else:
                done, own[worker] = own[worker][:1], own[worker][1:]
            others = hedges.finish(worker, done, queue)
            assert worker not in others
            queue.finish(worker, done)
    for worker in own:
        queue.leave(worker)
    queue.join(7)
    rest = queue.take(7, 100)
    assert sorted({*queue.applied, *rest}) == list(range(30))
    assert not set(queue.applied) & set(rest)


def test_the_worker_of_a_copy_hears_that_it_is_late_though_the_servers_said_first_that_the_part_is_done() -> None:
    queue, hedges = make(parts_per_step=3), Hedges(2)
    for worker in range(WORKERS):
        queue.take(worker, 1)
    queue.finish(2, [2])
    assert hedges.give(2, queue, begun=True) == (0, None)
    queue.learn(IndexSet([0]))
    assert hedges.outstanding(queue) == {}
    assert hedges.give(2, queue, begun=True) == (1, None)
    assert hedges.finish(0, [0], queue) == {2: [0]}
