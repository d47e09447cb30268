"""Exit codes of programs of the user's: what they say while other pods of the job are lost, and what they do not."""

from datetime import timedelta

import pytest

from disttrain.api.reasons import JobState
from disttrain.plan.model import Phase
from unit.plan.builders import MASTER, deleted, make_job

DISRUPTED = {"conditions": frozenset({"DisruptionTarget"}), "disruption": "EvictionByEvictionAPI"}


def started(kind):
    """A job of three workers, each on a node of its own."""
    scene = make_job().workers(3)
    scene = (scene.command() if kind == "command" else scene.script()).started()
    for rank in range(3):
        scene.change(rank, node=f"node-{rank}")
    return scene.change(0, MASTER, node="node-0")


both = pytest.mark.parametrize("kind", ["command", "script"])


def answer(scene):
    if scene.finished:
        return "failed"
    counted = scene.status.restarts.counted_towards_limit if scene.status.restarts else 0
    return "counted" if counted else "not counted" if scene.status.is_true("Restarting") else "nothing"


@both
@pytest.mark.parametrize(
    "lost",
    [
        pytest.param({"ready": False, "silent": True}, id="its node is silent"),
        pytest.param({"deleting": True, "ready": False}, id="it is being deleted"),
        pytest.param({"deleting": True, **DISRUPTED}, id="it is drained"),
        pytest.param(DISRUPTED, id="it is marked and still runs"),
    ],
)
@pytest.mark.parametrize("code", [1, 2, 127])
def test_a_survivor_is_not_the_cause_while_another_pod_is_lost(kind, lost, code):
    scene = started(kind)
    silent = {"silent_since": scene.now} if "silent" in lost else {}
    scene.change(1, **{key: value for key, value in lost.items() if key != "silent"}, **silent)
    scene.failed(0, code=code).after(4).step()
    assert answer(scene) == "not counted"
    assert (scene.status.attempt == 2) == (kind == "command")


@both
@pytest.mark.parametrize("order", ["the survivor first", "the lost one first"])
@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        pytest.param({"code": 137}, "counted", id="out of memory"),
        pytest.param({"code": 134}, "counted", id="it aborted"),
        pytest.param({"code": 1, **DISRUPTED}, "not counted", id="it was drained"),
        pytest.param({"code": None, **DISRUPTED}, "not counted", id="it was evicted before it ran"),
    ],
)
def test_a_pod_that_was_ended_from_outside_is_the_cause_whatever_the_clocks_of_the_nodes_say(
    kind, order, cause, expected
):
    scene = started(kind)
    ago = -5 if order == "the survivor first" else 5
    scene.failed(0, code=1).failed(1, ago=ago, **cause).after(4).step()
    assert answer(scene) == expected


@both
def test_a_survivor_that_is_seen_after_the_cause_was_written_down_is_its_consequence(kind):
    scene = started(kind).rules(
        {
            "name": "gone",
            "onPodConditions": ["DisruptionTarget"],
            "action": "RestartReplica",
            "countTowardsLimit": False,
        },
        {"name": "bad", "onExitCodes": [1], "action": "FailJob"},
    )
    scene.failed(1, code=137, **DISRUPTED).after(4).step()
    scene.failed(0, code=1, ago=10).seen()
    assert answer(scene) == "not counted"


@both
def test_an_exit_code_fails_the_job_a_minute_later_when_every_other_pod_is_well(kind):
    scene = started(kind).failed(0, code=1)
    scene.after(4).step()
    assert answer(scene) != "failed"
    assert "exit code 1" in scene.condition("Ready").message
    assert scene.status.state is JobState.RESTARTING
    assert deleted(scene.after(55).step()) == []
    assert answer(scene.after(1)) != "failed"
    scene.step()
    assert scene.says("Failed") == ("True", "UserCodeFailed")


@both
def test_a_node_that_falls_silent_within_the_minute_explains_it(kind):
    scene = started(kind).failed(0, code=1)
    for _ in range(4):
        scene.after(12).step()
    assert not scene.finished
    scene.node_falls_silent(2).step()
    assert answer(scene) == "not counted"
    assert not scene.after(60).seen().finished


@both
def test_a_peer_that_is_not_ready_for_a_minute_makes_it_a_failure_that_counts(kind):
    scene = started(kind).change(1, ready=False).failed(0, code=1).after(60)
    scene.step()
    assert answer(scene) == "counted"


@both
def test_where_all_pods_are_on_one_node_nothing_is_waited_for(kind):
    scene = started(kind)
    for rank in range(3):
        scene.change(rank, node="node-0")
    scene.failed(0, code=1).after(3).step()
    assert answer(scene) == "failed"


@both
def test_where_every_worker_ends_with_an_exit_code_nothing_is_waited_for(kind):
    scene = started(kind).failed(0, code=1, ago=1).failed(1, code=1).failed(2, code=1).after(3)
    scene.step()
    assert answer(scene) == "failed"


@both
def test_at_the_start_a_mistake_waits_for_the_peers_that_are_on_their_way(kind):
    scene = make_job().workers(2)
    scene = scene.command() if kind == "command" else scene.script()
    scene.seen().all_run().change(1, phase=Phase.PENDING, ready=False, scheduled=False).failed(0, code=1)
    scene.after(10).step()
    assert answer(scene) == "nothing"
    scene.all_run().seen()
    assert answer(scene) == "failed"


@both
def test_what_ends_while_a_peer_has_no_node_does_not_count_and_the_start_up_deadline_ends_it(kind):
    scene = make_job().workers(2).run_policy(backoffLimit=0, startupDeadlineSeconds=1800)
    scene = scene.command() if kind == "command" else scene.script()
    scene.seen()
    for _ in range(40):
        scene.all_run()
        if "digits-worker-1" in scene.pods:
            scene.change(1, phase=Phase.PENDING, ready=False, scheduled=False)
        if "digits-worker-0" in scene.pods and not scene.pod(0).done:
            scene.failed(0, code=1)
        for _ in range(8):
            scene.after(10).step()
    assert scene.says("Failed") == ("True", "StartupDeadlineExceeded")


def test_of_our_own_loop_an_exit_code_is_an_error_that_was_looked_at():
    scene = make_job().training().node_falls_silent(1).failed(0, code=1)
    scene.step()
    assert scene.says("Failed") == ("True", "UserCodeFailed")


def test_a_command_whose_worker_was_taken_away_says_by_whom():
    scene = make_job().command().started().change(1, deleting=True, disruption="DeletionByTaintManager")
    scene.step()
    assert scene.says("Restarting") == ("True", "NodeLost")


BAD = {"name": "bad", "onExitCodes": [1], "action": "FailJob"}
GONE = {"name": "gone", "onPodConditions": ["DisruptionTarget"], "action": "RestartReplica", "countTowardsLimit": False}


class TestRules:
    """A disruption explains any exit code."""

    @pytest.mark.parametrize("kind", ["model", "script", "command"])
    @pytest.mark.parametrize(
        "disruption",
        ["TerminationByKubelet", "EvictionByEvictionAPI", "PreemptionByScheduler", "DeletionByTaintManager"],
    )
    @pytest.mark.parametrize("code", [1, 2, 126, 127, 137, 143])
    def test_by_default_a_disrupted_pod_is_replaced_and_not_counted(self, kind, disruption, code):
        scene = make_job()
        scene = scene.command() if kind == "command" else scene.script() if kind == "script" else scene
        marked = {"conditions": frozenset({"DisruptionTarget"}), "disruption": disruption, "reason": "Terminated"}
        scene.started().failed(0, code=code, **marked).after(3).step()
        assert answer(scene) == "not counted"

    @pytest.mark.parametrize(
        ("rules", "expected"),
        [
            pytest.param([BAD, GONE], "not counted", id="exit codes stand first"),
            pytest.param([BAD], "counted", id="no rule speaks of disruptions: the default action, which counts"),
            pytest.param([{**BAD, "onPodConditions": ["DisruptionTarget"]}, GONE], "failed", id="a rule asks for both"),
            pytest.param([{**GONE, "action": "FailJob"}], "failed", id="a rule fails disrupted pods"),
            pytest.param(
                [{"name": "term", "onExitCodes": [1], "action": "RestartReplica", "countTowardsLimit": False}],
                "not counted",
                id="a rule of exit codes that does not fail the job holds",
            ),
        ],
    )
    def test_so_it_is_where_the_users_own_rules_put_exit_codes_first(self, rules, expected):
        scene = make_job().rules(*rules).training()
        scene.failed(0, code=1, conditions=frozenset({"DisruptionTarget"})).step()
        assert answer(scene) == expected


def test_the_moment_at_which_a_failed_pod_is_replaced_is_the_one_that_was_written_down():
    scene = make_job().run_policy(backoffLimitReset="Never").training()
    scene.failed(0).seen().after(0.9).change(0, finished=scene.now + timedelta(seconds=0.9))
    assert deleted(scene.step()) == []
    assert deleted(scene.after(0.1).step()) == ["digits-worker-0"]
