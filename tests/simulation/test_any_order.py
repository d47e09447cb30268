"""Whatever happens to the pods, in whatever order, however late the operator learns of it and at what point it dies: the promises hold.

A quick slice runs with every `make test`; `make simulation` searches for minutes.
"""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from disttrain.api.names import ChildKind, Role
from disttrain.plan import Plan, decide
from disttrain.plan.model import DISRUPTED, Create, CreatePod, CreateSecret, Phase, PodView
from simulation.cluster import Cluster, Operator
from simulation.jobs import jobs
from width import WIDE

EXIT_CODES = (1, 2, 75, 134, 137, 143)
AHEAD = (0, 0, 0, 3, 3600)
"""Seconds by which a node's clock is ahead."""


class AnyOrder(RuleBasedStateMachine):
    """One job, its cluster and its operator."""

    @initialize(body=jobs(), running=st.booleans())
    def begin(self, body: dict[str, Any], running: bool) -> None:
        self.cluster = Cluster(body)
        self.operator = Operator(self.cluster)
        self.accounted: set[str] = set()
        self.seen_writes = self.stalls = 0
        if running:
            self.a_pass_that_sees_everything()
            self.all_pods_come_along()
            self.steps_are_made(steps=1, checkpoint=False)
            self.a_pass_that_sees_everything()

    # The cluster

    @rule(seconds=st.sampled_from((0.4, 1, 2, 5, 11, 61, 400)))
    def time_passes(self, seconds: float) -> None:
        self.cluster.now += timedelta(seconds=seconds)

    @rule(data=st.data())
    def a_pod_comes_along(self, data: st.DataObject) -> None:
        if name := self._a_pod(data):
            self.cluster.run(name)

    @rule()
    def all_pods_come_along(self) -> None:
        for name in list(self.cluster.pods):
            self.cluster.run(name)
            self.cluster.run(name)

    @rule(data=st.data(), code=st.sampled_from(EXIT_CODES), evicted=st.booleans(), ahead=st.sampled_from(AHEAD))
    def a_pod_fails(self, data: st.DataObject, code: int, evicted: bool, ahead: float) -> None:
        if name := self._a_pod(data):
            self.cluster.end(name, code, conditions=frozenset({DISRUPTED} if evicted else ()), ahead=ahead)

    @rule(data=st.data(), code=st.sampled_from((75, 134, 137)), times=st.integers(1, 4))
    def a_pod_fails_again_and_again(self, data: st.DataObject, code: int, times: int) -> None:
        name = self._a_pod(data)
        for _ in range(times):
            self.all_pods_come_along()
            if name in self.cluster.pods:
                self.cluster.end(name, code)
            for _ in range(3):
                self.cluster.now += timedelta(seconds=5)
                self.a_pass_that_sees_everything()
                self._grace_periods_end()

    @rule(data=st.data())
    def a_pod_succeeds(self, data: st.DataObject) -> None:
        if (name := self._a_pod(data)) and self.cluster.pods[name].phase is Phase.RUNNING:
            self.cluster.end(name, 0)

    @rule()
    def the_master_ends_and_says_that_all_is_done(self) -> None:
        for name, pod in self.cluster.pods.items():
            if pod.role is Role.MASTER and pod.phase is Phase.RUNNING:
                self.cluster.end(name, 0, all_done=True)

    @rule(data=st.data())
    def a_user_deletes_a_pod(self, data: st.DataObject) -> None:
        if name := self._a_pod(data):
            self.cluster.delete(name)

    @rule(data=st.data(), code=st.sampled_from(EXIT_CODES))
    def a_pod_is_asked_to_end_and_fails(self, data: st.DataObject, code: int) -> None:
        if name := self._a_pod(data):
            self.cluster.delete(name)
            if name in self.cluster.pods:
                self.cluster.end(name, code)

    @rule(data=st.data())
    def a_grace_period_is_over(self, data: st.DataObject) -> None:
        if name := self._a_pod(data):
            self.cluster.vanish(name)

    @rule(data=st.data())
    def a_node_falls_silent(self, data: st.DataObject) -> None:
        if name := self._a_pod(data):
            self.cluster.lose_node(name)

    @rule(data=st.data())
    def a_node_reports_again(self, data: st.DataObject) -> None:
        if name := self._a_pod(data):
            self.cluster.node_reports_again(name)

    @rule(data=st.data())
    def a_node_is_given_up(self, data: st.DataObject) -> None:
        if name := self._a_pod(data):
            self.cluster.give_node_up(name)

    @rule(steps=st.integers(1, 50), checkpoint=st.booleans())
    def steps_are_made(self, steps: int, checkpoint: bool) -> None:
        self.cluster.train(steps, checkpoint=checkpoint)

    @rule(value=st.booleans())
    def the_user_suspends_or_resumes(self, value: bool) -> None:
        self.cluster.suspend(value)

    @rule()
    def a_user_deletes_the_service(self) -> None:
        self.cluster.children -= {ChildKind.SERVICE}

    # The operator

    @rule(data=st.data())
    def an_event_arrives(self, data: st.DataObject) -> None:
        names = sorted({*self.cluster.pods, *self.operator.pods})
        if names:
            self.operator.see(data.draw(st.sampled_from(names)))

    @rule(poll=st.booleans())
    def a_pass(self, poll: bool) -> None:
        if poll:
            self.operator.poll()
        self._reconcile()

    @rule()
    def a_pass_that_sees_everything(self) -> None:
        self.operator.see_all()
        self.operator.poll()
        self._reconcile()

    @rule(actions=st.integers(0, 6), dies=st.booleans())
    def a_pass_that_ends_half_way(self, actions: int, dies: bool) -> None:
        self.operator.reconcile(stop_after=actions)
        if dies:
            self.operator.restart()

    @rule()
    def another_operator_takes_over(self) -> None:
        self.operator.restart()

    def _reconcile(self) -> Plan:
        seen = self.operator.snapshot
        plan = self.operator.reconcile()
        if plan.status.is_true("Suspended"):
            assert seen.pods == (), "suspended, and yet there are pods"
        assert plan.status.start_time is not None or not seen.pods, "a job with pods that never started"
        return plan

    # What must hold

    @invariant()
    def nothing_is_made_for_a_finished_job(self) -> None:
        assert self.cluster.made_after_the_end == []

    @invariant()
    def every_failure_is_written_down_before_its_pod_is_deleted(self) -> None:
        assert self.cluster.deleted_uncounted == []

    @invariant()
    def pods_of_an_attempt_have_one_certificate(self) -> None:
        for uids in self.cluster.mounted.values():
            assert len(uids) == 1
            assert None not in uids, "a pod before its certificate"

    @invariant()
    def one_pod_in_one_place(self) -> None:
        places = [(pod.role, pod.index) for pod in self.cluster.pods.values()]
        assert len(places) == len(set(places))

    @invariant()
    def every_write_is_sound(self) -> None:
        """Looks at each status once, with the one before it."""
        for number in range(self.seen_writes, len(self.cluster.writes)):
            self._check_write(number)
        self.seen_writes = len(self.cluster.writes)

    def _check_write(self, number: int) -> None:
        writes = self.cluster.writes
        before, after = writes[number - 1] if number else None, writes[number]
        assert before != after, "a write that says nothing"
        assert not (after.is_true("Complete") and after.is_true("Failed"))
        if before is not None and (before.is_true("Complete") or before.is_true("Failed")):
            assert after == before.model_copy(update={"certificate": None}), "a final status was changed"
            return
        assert [condition.type for condition in after.conditions] == [
            "Valid", "Suspended", "Scheduled", "Ready", "Progressing", "Restarting", "Complete", "Failed",
        ]  # fmt: skip
        self._check_account(number, before, after)
        self._check_times(before, after)
        self._check_goodput(after)

    def _check_account(self, number: int, before: Any, after: Any) -> None:
        total_before = before.restarts.total if before and before.restarts else 0
        total = after.restarts.total if after.restarts else 0
        counted_before = before.restarts.counted_towards_limit if before and before.restarts else 0
        counted = after.restarts.counted_towards_limit if after.restarts else 0
        assert counted <= self.cluster.body["spec"]["runPolicy"]["backoffLimit"]
        assert counted <= counted_before + 1
        stalled = after.restarts is not None and after.restarts.last is not None and after.restarts.last.role == "Job"
        self.stalls += stalled and total > total_before  # no pod's: the master waited for none
        assert sum(replica.restarts for replica in after.replica_statuses) == total - self.stalls
        uids_before = set(before.restarts.accounted) if before and before.restarts else set()
        fresh = set(after.restarts.accounted if after.restarts else ()) - uids_before
        assert fresh.isdisjoint(self.accounted), "a failure was counted twice"
        # A master that hangs is declared failed: it is the only one that is written down without having failed.
        judged = fresh - self.cluster.own_failures
        silent = sum(event.reason == "MasterSilent" for event in self.cluster.events)
        declared_failed = (
            after.restarts is not None
            and after.restarts.last is not None
            and after.restarts.last.reason == "MasterSilent"
        )
        assert len(judged) <= (1 if declared_failed else 0), "a pod that was asked to end was counted"
        self.accounted |= fresh
        new_attempt = ((before and before.attempt) or 1) < (after.attempt or 1)
        assert total - total_before in ({0, 1} if new_attempt else {len(fresh)})
        failed = [self.cluster.failed_pods[uid] for uid in fresh - judged]
        # What fails after a disrupted pod is its consequence.
        well = self.cluster.others_well[number]
        if any(self._is_a_cause(pod, before, others_well=well) for pod in failed) and not any(
            DISRUPTED in p.conditions for p in failed
        ):
            assert counted == counted_before + 1 or (self._resets and counted == 1), "a failure that was not counted"
        judged_by = ("Stalled", "HealthRule")  # no pod failed
        stalls = sum(event.reason in judged_by and "attempt" in event.message for event in self.cluster.events)
        assert total <= len(self.cluster.own_failures) + stalls + silent, "more failures are counted than there were"

    @property
    def _resets(self) -> bool:
        return bool(self.cluster.body["spec"]["runPolicy"]["backoffLimitReset"] == "OnCheckpoint")

    def _is_a_cause(self, pod: PodView, before: Any, *, others_well: bool) -> bool:
        """Whether a failure that is written down now has to be counted: nothing else can be to blame for it."""
        trainer, worker = self.cluster.body["spec"]["trainer"], pod.role is Role.WORKER
        lost_its_peers = pod.exit_code == 75 and not ("command" in trainer and worker)
        # A program of the user's ends with any exit code for the loss of a peer.
        lost_its_peers |= "model" not in trainer and worker and 0 < pod.exit_code < 128 and not others_well
        blamed_before = before is not None and before.is_true("Restarting")
        return not lost_its_peers and not blamed_before

    def _check_times(self, before: Any, after: Any) -> None:
        assert (after.completion_time is not None) == (after.is_true("Complete") or after.is_true("Failed"))
        if before is None:
            return
        assert (after.attempt or 1) - (before.attempt or 1) in (0, 1)
        if before.start_time is not None and after.attempt == before.attempt:
            assert after.start_time == before.start_time
        for condition in after.conditions:
            old = before.condition(condition.type)
            if old is not None and old.status == condition.status:
                assert old.last_transition_time == condition.last_transition_time

    def _check_goodput(self, after: Any) -> None:
        """As long as a job was never suspended or resumed, every second since its start is in exactly one bucket."""
        if after.goodput is None or any(
            write.condition("Suspended").reason != "NotSuspended" for write in self.cluster.writes
        ):
            return
        seconds = after.goodput.model_dump(exclude={"accounted_until", "master"})
        assert timedelta(seconds=sum(seconds.values())) == after.goodput.accounted_until - after.start_time

    @invariant()
    def the_same_snapshot_gives_the_same_plan(self) -> None:
        assert decide(self.operator.snapshot) == decide(self.operator.snapshot)

    def teardown(self) -> None:
        """Nothing fails any more: the job is soon unchanged by a pass, and then reaches its end."""
        if not hasattr(self, "cluster"):
            return
        self._rest()
        self.cluster.suspend(False)
        for _ in range(400):
            if self.cluster.finished:
                break
            self._quiet_pass()
            self._pods_do_their_work()
            self.cluster.now += timedelta(seconds=7)
        self.every_write_is_sound()
        assert self.cluster.finished, f"never ends: {self.cluster.status.state}"
        for _ in range(40):
            self._quiet_pass()
            self._kubernetes_gives_up_what_is_silent()
            self._grace_periods_end()
            self.cluster.now += timedelta(seconds=2)
        self.nothing_is_made_for_a_finished_job()
        assert self.cluster.secrets == {}, "a Secret outlives the job"
        policy, left = self.cluster.body["spec"]["runPolicy"]["cleanPodPolicy"], self.cluster.pods.values()
        assert policy != "All" or not left
        assert policy != "Running" or all(pod.done for pod in left)

    def _rest(self) -> None:
        """With nothing happening, passes come to rest, and further passes as time goes on write nothing but a deadline's end."""
        for _ in range(12):
            self._grace_periods_end()
            if not self._quiet_pass():
                break
        else:
            raise AssertionError("the passes do not come to rest")
        writes = len(self.cluster.writes)
        for _ in range(40):
            self.cluster.now += timedelta(seconds=1)
            self.cluster.train(1, checkpoint=False)
            self._quiet_pass()
            self._grace_periods_end()
        # 8 for the progress; a back-off, the grace of the master or a deadline may end meanwhile. Not one for each pass.
        assert len(self.cluster.writes) - writes <= 16, [w.state for w in self.cluster.writes[writes:]]
        self.every_write_is_sound()

    def _quiet_pass(self) -> bool:
        """Whether the pass did anything."""
        self.operator.see_all()
        self.operator.poll()
        writes, forced = len(self.cluster.writes), len(self.cluster.forced_without_need)
        plan = self._reconcile()
        assert len(self.cluster.forced_without_need) == forced, "a pod was removed by force though its node reports"
        creations = (CreatePod, CreateSecret, Create)
        assert not (self.cluster.finished and any(isinstance(action, creations) for action in plan.actions))
        return bool(plan.actions) or len(self.cluster.writes) > writes

    def _kubernetes_gives_up_what_is_silent(self) -> None:
        for name in list(self.cluster.pods):
            self.cluster.give_node_up(name)

    def _grace_periods_end(self) -> None:
        for name in list(self.cluster.pods):
            self.cluster.vanish(name)

    def _pods_do_their_work(self) -> None:
        self._kubernetes_gives_up_what_is_silent()
        self._grace_periods_end()
        pods = list(self.cluster.pods.values())
        if all(pod.phase in (Phase.RUNNING, Phase.SUCCEEDED) for pod in pods) and self.cluster.status.is_true("Ready"):
            for pod in pods:
                self.cluster.end(pod.name, 0)
        for pod in pods:
            self.cluster.run(pod.name)
            self.cluster.run(pod.name)

    def _a_pod(self, data: st.DataObject) -> str | None:
        names = sorted(self.cluster.pods)
        return data.draw(st.sampled_from(names)) if names else None


AnyOrder.TestCase.settings = settings(
    max_examples=4_000 if WIDE else 80,
    stateful_step_count=60 if WIDE else 30,
    deadline=None,
    derandomize=not WIDE,
    suppress_health_check=list(HealthCheck),
)
TestAnyOrder = pytest.mark.timeout(0 if WIDE else 120)(AnyOrder.TestCase)
