"""Pods that are taken away again and again, by whomever: a pause of their own, and what counts all the same."""

import pytest

from disttrain.plan.disruptions import by_its_own_use
from disttrain.plan.model import Phase, Refusal
from unit.plan.builders import WORKER, created, deleted, make_job

EVICTED = {"conditions": frozenset({"DisruptionTarget"}), "disruption": "EvictionByEvictionAPI", "code": 143}
BY_KUBELET = {"conditions": frozenset({"DisruptionTarget"}), "disruption": "TerminationByKubelet", "reason": "Evicted"}
OWN = "The node was low on resource: memory. Container trainer was using 9Gi, request is 1Gi, has larger consumption of memory. "
DOUBLED = [0, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def waits(scene, lose, times, *, run=False):
    """Seconds until the pod is made again, each time that it is lost."""
    seconds = []
    for _ in range(times):
        lose(scene)
        for waited in range(400):
            if any((WORKER, 1) in created(scene.step()) for _ in range(3)):
                seconds.append(waited)
                break
            scene.after(1)
        if run:
            scene.all_run().seen()
        scene.after(1)
    return seconds


@pytest.mark.parametrize("run", [True, False], ids=["it runs again", "it never gets a node"])
def test_a_pod_that_something_deletes_again_and_again_is_made_after_a_pause_that_doubles(run):
    assert waits(make_job().training(), lambda scene: scene.gone(1), 11, run=run) == DOUBLED


def test_so_it_is_with_one_that_is_deleted_before_the_job_ever_ran():
    scene = make_job()
    scene.seen()
    assert waits(scene, lambda scene: scene.gone(1), 4) == DOUBLED[:4]


def test_the_grace_period_of_a_deleted_pod_is_a_part_of_the_pause():
    scene = make_job().training()

    def delete(scene):
        scene.change(1, deleting=True).step()
        scene.after(30).gone(1)

    assert waits(scene, delete, 7, run=True) == [0, 0, 0, 0, 0, 2, 34]


def test_evictions_that_come_again_and_again_wait_twice_as_long_each_time():
    scene = make_job().run_policy(backoffLimit=0).training()
    assert waits(scene, lambda scene: scene.failed(1, **EVICTED).step(), 10, run=True) == [1, *DOUBLED[1:10]]
    assert scene.status.restarts.counted_towards_limit == 0


@pytest.mark.parametrize("code", [0, 1, 75, 143])
def test_a_disrupted_pod_is_the_cause_whatever_its_exit_code_is(code):
    scene = make_job().training().failed(1, **{**EVICTED, "code": code}).failed(0, code=75, ago=1).seen()
    assert scene.says("Restarting") == ("True", "Evicted")
    assert scene.status.disruptions.in_a_row == 1
    assert scene.status.restarts.counted_towards_limit == 0
    assert (scene.status.restarts.last.role, scene.status.restarts.last.index) == ("Worker", 1)


@pytest.mark.parametrize("kind", ["command", "script", "training"])
def test_pods_that_are_taken_away_and_exit_with_0_have_not_done_their_work(kind):
    scene = getattr(make_job(), kind)()
    scene = scene if kind == "training" else scene.started()
    for worker in (0, 1):
        scene.exited_early(worker).change(
            worker, conditions=frozenset({"DisruptionTarget"}), disruption="TerminationByKubelet"
        )
    scene.seen().after(9).seen()
    assert not scene.finished
    assert scene.says("Restarting") == ("True", "Evicted")
    assert "ExitedEarly" not in scene.condition("Restarting").message
    assert scene.status.restarts.counted_towards_limit == 0
    assert not scene.after(15).seen().all_run().seen().finished


@pytest.mark.parametrize("code", [1, 75, 137])
def test_an_eviction_for_the_pods_own_memory_counts_whatever_its_exit_code_is(code):
    scene = make_job().training().failed(1, code=code, message=OWN, **BY_KUBELET).seen()
    assert scene.status.restarts.counted_towards_limit == 1


def test_a_command_that_is_disrupted_again_and_again_waits_too():
    scene = make_job().command().started()
    assert waits(scene, lambda scene: scene.gone(1), 6, run=True) == DOUBLED[:6]


def test_two_pods_that_are_taken_away_at_once_are_one_disruption():
    scene = make_job().workers(4).training().gone(1).gone(2)
    assert len(created(scene.step())) == 2
    assert scene.status.disruptions.in_a_row == 1


def test_a_failed_pod_that_the_operator_itself_deletes_is_no_disruption_though_that_is_not_written_yet():
    scene = make_job().training().failed(1).seen().after(2)
    assert deleted(scene.plan()) == [scene.pod(1).name]
    scene.change(1, deleting=True)  # the write of the status waits meanwhile
    for _ in range(3):
        scene.after(1).step()
        assert scene.status.disruptions is None
    scene.gone(1)
    assert (WORKER, 1) in created(scene.step())


def test_a_step_of_the_whole_job_ends_it():
    scene = make_job().training()
    waits(scene, lambda scene: scene.gone(1), 5, run=True)
    scene.after(5).reports(11).seen()
    assert scene.status.disruptions is None
    assert waits(scene, lambda scene: scene.gone(1), 3, run=True) == DOUBLED[:3]


def test_steps_that_others_make_without_the_pod_do_not():
    scene = make_job().servers(1).training()
    step = 10
    for expected in DOUBLED[:7]:
        scene.gone(1)
        waited = 0
        while (WORKER, 1) not in created(scene.reports(step).step()):
            scene.after(1)
            waited, step = waited + 1, step + 1
        assert waited == expected
        scene.change(1, phase=Phase.PENDING)


def test_ten_minutes_without_one_end_it_for_a_program_that_reports_no_steps():
    scene = make_job().script().started()
    waits(scene, lambda scene: scene.gone(1), 4, run=True)
    scene.after(590).seen()
    assert scene.status.disruptions.in_a_row == 4
    assert scene.after(20).seen().status.disruptions is None


def test_a_resume_begins_without_a_pause():
    scene = make_job().training()
    waits(scene, lambda scene: scene.gone(1), 5)
    scene.spec(suspend=True).seen().spec(suspend=False).seen()
    assert len(scene.pods) == 3


@pytest.mark.parametrize(
    "lose",
    [
        pytest.param(lambda scene: scene.failed(1).seen(), id="a failure that counts"),
        pytest.param(lambda scene: scene.failed(1, code=75).seen(), id="a lost peer"),
        pytest.param(lambda scene: scene.rules(default="RestartJob").failed(1).seen(), id="a restart of the job"),
    ],
)
def test_what_the_operator_deletes_itself_is_no_disruption(lose):
    scene = make_job().training()
    for _ in range(3):
        lose(scene)
        scene.after(10).seen().all_run().seen().after(1).reports(10).seen()
        assert scene.status.disruptions is None


def test_a_pod_that_was_refused_was_not_taken_away():
    scene = make_job().training().gone(1)
    scene.refusals = (Refusal(name="Pod digits-worker-1", message="quota", retryable=True, time=scene.now),)
    scene.seen().after(10).step()
    scene.pods.pop("digits-worker-1")  # the next attempt is refused, too
    scene.refusals = (Refusal(name="Pod digits-worker-1", message="quota", retryable=True, time=scene.now),)
    assert scene.after(5).seen().status.disruptions is None


def test_a_worker_that_was_done_is_not_missed():
    scene = make_job().training().succeeded(0).seen().gone(0).seen()
    assert scene.status.disruptions is None


class TestItsOwnUse:
    """The kubelet evicts a pod that uses more than it asked for: that is a failure of the job's."""

    @pytest.mark.parametrize(
        ("message", "own"),
        [
            (OWN, True),
            ("Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ", True),
            ('Container trainer exceeded its local ephemeral storage limit "1Gi". ', True),
            ('Usage of EmptyDir volume "disttrain-tmp" exceeds the limit "1Gi". ', True),
            (
                "The node was low on resource: memory. Container trainer was using 5Gi, which exceeds its request of 1Gi. ",
                True,
            ),
            ("", True),
            ("The node was low on resource: memory. Threshold quantity: 100Mi, available: 80Mi. ", False),
            ("The node had condition: [DiskPressure]. ", False),
        ],
    )
    def test_the_words_of_the_kubelet_tell(self, message, own):
        scene = make_job().training().failed(1, message=message, **BY_KUBELET)
        assert by_its_own_use(scene.pod(1)) == own
        scene.step()
        assert scene.status.restarts.counted_towards_limit == own

    @pytest.mark.parametrize(
        "fields",
        [
            {**BY_KUBELET, "reason": "Terminated"},
            {**BY_KUBELET, "disruption": "EvictionByEvictionAPI"},
            {**BY_KUBELET, "disruption": "PreemptionByScheduler"},
        ],
    )
    def test_a_shutdown_of_the_node_and_an_eviction_by_others_do_not_count(self, fields):
        scene = make_job().training().failed(1, message=OWN, **fields)
        scene.step()
        assert scene.status.restarts.counted_towards_limit == 0

    def test_it_uses_the_limit_up_though_steps_are_made_between(self):
        scene = make_job().run_policy(backoffLimit=3).training()
        for step in range(11, 15):
            scene.failed(1, message=OWN, **BY_KUBELET).seen().after(10).seen().all_run().reports(step).seen()
        assert scene.says("Failed") == ("True", "BackoffLimitExceeded")
        assert "was using 9Gi" in scene.condition("Failed").message

    def test_a_checkpoint_between_sets_it_back(self):
        scene = make_job().run_policy(backoffLimit=1).training()
        for step in range(11, 20):
            scene.failed(1, message=OWN, **BY_KUBELET).seen().after(10).seen().all_run()
            scene.reports(step, last_checkpoint={"step": step, "time": scene.now}).seen()
        assert not scene.finished
