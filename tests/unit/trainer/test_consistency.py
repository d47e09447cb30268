"""The consistency models, driven through every order of events that hypothesis can think of."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.parameter_server.consistency import Async, BoundedStaleness, Clocks, OutOfStep, Sync
from disttrain_trainer.parameter_server.sum_tree import SumTree


class SyncMachine(RuleBasedStateMachine):
    """Parts of the current step and of steps before it arrive in any order, some more than once."""

    PARTS = 6

    def __init__(self) -> None:
        super().__init__()
        self.policy = Sync(parts_per_step=self.PARTS)
        self.sums: dict[int, str] = {}
        self.steps: list[str] = []
        self.known: set[int] = set()

    @rule(back=st.integers(0, 6), part=st.integers(0, PARTS - 1))
    def a_part_arrives(self, back: int, part: int) -> None:
        index = max(0, (self.policy.version - back // 3)) * self.PARTS + part
        arrival = self.policy.arrive(index, empty=False)
        assert (arrival is None) == (index in self.known)
        self.known.add(index)
        if arrival is None:
            return
        self.sums[index] = str(part)
        for a, b in arrival.additions:
            self.sums[a] = f"({self.sums[a]}+{self.sums.pop(b)})"
        if arrival.update is not None:
            self.steps.append(self.sums.pop(arrival.update))
            assert not self.sums, "every part is in the sum"

    @rule(ahead=st.integers(1, 3), part=st.integers(0, PARTS - 1))
    def a_part_of_a_later_step_is_refused(self, ahead: int, part: int) -> None:
        with pytest.raises(OutOfStep):
            self.policy.arrive((self.policy.version + ahead) * self.PARTS + part, empty=False)

    @invariant()
    def each_sum_is_the_same_tree(self) -> None:
        assert set(self.steps) <= {"(((0+1)+(2+3))+(4+5))"}

    @invariant()
    def a_version_is_a_step_with_all_its_parts(self) -> None:
        assert self.policy.version == len(self.steps) == len(self.known) // self.PARTS
        assert set(self.policy.accepted) == self.known
        assert self.policy.in_version == IndexSet(range(self.PARTS * self.policy.version))
        assert self.policy.start(0, 0, self.policy.version)
        assert not self.policy.start(0, 0, self.policy.version + 1)


class StalenessMachine(RuleBasedStateMachine):
    """Workers that start, complete, leave, die and join in any order."""

    BOUND = 2

    def __init__(self) -> None:
        super().__init__()
        self.policy = BoundedStaleness(max_staleness=self.BOUND)
        self.completed: dict[int, int] = {}
        self.running: set[int] = set()
        self.parts = 0
        self.last_minimum = 0

    @rule(worker=st.integers(0, 3), at=st.integers(0, 3))
    def a_worker_joins(self, worker: int, at: int) -> None:
        if worker not in self.completed:
            minimum = min(self.completed.values(), default=self.last_minimum)
            clock = self.policy.join(worker, minimum + at)
            assert clock == minimum + at
            self.completed[worker] = clock

    @precondition(lambda self: self.completed)
    @rule(data=st.data())
    def a_worker_starts_if_it_may(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.completed)))
        lead = self.completed[worker] - min(self.completed.values())
        if worker not in self.running:
            allowed = self.policy.start(worker, self.completed[worker], None)
            assert allowed == (lead <= self.BOUND), "neither too early nor too late"
            if allowed:
                self.running.add(worker)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), twice=st.booleans())
    def a_worker_completes(self, data: st.DataObject, twice: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.running)))
        for _ in range(1 + twice):
            self.policy.arrive(self.parts, empty=False)
            self.policy.complete(worker, self.completed[worker])
        self.parts += 1
        self.completed[worker] += 1
        self.running.discard(worker)

    @precondition(lambda self: self.completed)
    @rule(data=st.data())
    def a_worker_leaves_or_dies(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.completed)))
        self.last_minimum = min(self.completed.values())
        self.policy.leave(worker)
        del self.completed[worker]
        self.running.discard(worker)

    @rule(worker=st.integers(0, 3))
    def a_worker_that_did_not_join_is_refused(self, worker: int) -> None:
        if worker not in self.completed:
            with pytest.raises(OutOfStep):
                self.policy.start(worker, 0, None)

    @invariant()
    def a_worker_may_always_start_or_is_running(self) -> None:
        if self.completed and not self.running:
            slowest = min(self.completed, key=lambda worker: self.completed[worker])
            assert self.completed[slowest] - min(self.completed.values()) == 0

    @invariant()
    def every_part_is_one_update(self) -> None:
        assert self.policy.version == self.parts
        assert self.policy.max_staleness_seen <= self.BOUND


TestSyncInAnyOrder = SyncMachine.TestCase
TestStalenessInAnyOrder = StalenessMachine.TestCase
TestSyncInAnyOrder.settings = TestStalenessInAnyOrder.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None
)


@given(st.lists(st.tuples(st.sampled_from("jlc"), st.integers(0, 3), st.integers(0, 9)), max_size=40))
def test_the_minimum_of_the_clocks_never_decreases(events: list[tuple[str, int, int]]) -> None:
    clocks, before = Clocks(), 0
    for kind, worker, value in events:
        match kind:
            case "j":
                clocks.join(worker, value)
            case "l":
                clocks.leave(worker)
            case "c":
                clocks.complete(worker, value)
        assert clocks.minimum >= before
        before = clocks.minimum


def test_a_dead_worker_leaves_the_minimum_at_once() -> None:
    policy = BoundedStaleness(max_staleness=1)
    for worker in (0, 1):
        policy.join(worker)
    for clock in (0, 1):
        assert policy.start(0, clock, None)
        policy.complete(0, clock)
    assert not policy.start(0, 2, None)
    assert policy.waits_for(None) == "worker 1 to complete iteration 0"
    policy.leave(1)
    assert policy.start(0, 2, None)


def test_async_never_waits_and_tells_how_far_apart_workers_were() -> None:
    policy = Async()
    for worker in (0, 1):
        policy.join(worker)
    for clock in range(9):
        assert policy.start(0, clock, None)
        policy.complete(0, clock)
    assert policy.max_staleness_seen == 8
    assert policy.staleness == 9
    for clock in range(7):
        policy.complete(1, clock)
    assert policy.staleness == 2
    policy.leave(1)
    assert policy.staleness == 0


def test_an_empty_part_counts_in_async_without_an_update() -> None:
    policy = Async()
    arrival = policy.arrive(3, empty=True)
    assert arrival is not None
    assert arrival.update is None
    assert policy.version == 0
    assert 3 in policy.accepted
    assert policy.arrive(3, empty=True) is None


def test_a_waiting_worker_learns_which_parts_are_missing() -> None:
    policy = Sync(parts_per_step=20, version=2)
    policy.arrive(41, empty=False)
    assert policy.waits_for(3) == "step 2 to be complete: part 40, 42, 43, 44, 45, 46, 47, 48 and 11 more is missing"


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8, 13, 64])
def test_a_sum_waits_for_few_gradients_and_ends_after_few_additions(parts: int) -> None:
    tree, held, most = SumTree(parts), 0, 0
    for part in range(parts):
        additions = tree.arrive(part)
        held += 1 - len(additions)
        most = max(most, held)
    assert held == 1, "all are one sum"
    assert len(additions) <= parts.bit_length()
    assert most <= parts.bit_length()
