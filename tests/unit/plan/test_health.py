"""spec.health: when a rule is in breach, what its action does, and what survives a restart of the operator."""

from datetime import timedelta
from typing import Any

import pytest

from disttrain.api.runtime import ProgressBest, ProgressCheckpoint
from disttrain.plan.model import Refusal, SuspendJob
from unit.plan.builders import MASTER, NOON, WORKER, Scene, created, deleted, make_job


def ruled(action: str = "Event", **fields: Any) -> Scene:
    rule = {"name": "diverged", "metric": "Loss", "above": 20, "forSeconds": 30, "action": action, **fields}
    return make_job().spec(
        health={"rules": [rule]}, checkpoint={"volume": {"persistentVolumeClaim": "c"}, "everySteps": 10}
    )


def breach(scene: Scene, *, seconds: int = 35, step: int = 11, **fields: Any) -> list[str]:
    """Reports in breach, each five seconds with a step more; the reasons and messages of the Events."""
    events = []
    for more in range(seconds // 5):
        plan = scene.after(5).reports(step + more, **({"loss": 30.0} | fields)).step()
        events += [f"{event.reason}: {event.message}" for event in plan.events]
    return events


def test_a_rule_that_is_in_breach_for_its_seconds_posts_one_event():
    scene = ruled().training()
    assert breach(scene, seconds=30) == []
    assert scene.plan().look_again <= timedelta(seconds=5)
    said = "HealthRule: Rule diverged of spec.health: Loss is 30, above 20 for 30 s"
    assert breach(scene, seconds=100, step=20) == [said]
    assert scene.status.attempt == 1


def test_a_breach_that_ends_in_time_is_forgotten_and_the_next_one_is_another():
    scene = ruled().training()
    breach(scene, seconds=25)
    assert scene.status.health[0].since == NOON + timedelta(seconds=5)
    scene.after(5).reports(30, loss=1.0).step()
    assert scene.status.health == ()
    assert breach(scene, seconds=25, step=31) == []
    assert len(breach(scene, seconds=10, step=40)) == 1
    scene.after(5).reports(50, loss=1.0).step()
    assert len(breach(scene, step=51)) == 1


def test_a_new_operator_goes_on_from_the_stored_moment():
    scene = ruled().training()
    breach(scene, seconds=25)
    scene.new_operator().after(1).step()
    assert scene.status.health[0].since == NOON + timedelta(seconds=5)
    assert len(breach(scene, seconds=10, step=20)) == 1


def test_a_new_operator_acts_on_no_old_report_and_does_not_look_again_each_second():
    scene = ruled("FailJob").training()
    breach(scene, seconds=25)
    plan = scene.new_operator().after(60).step()
    assert not scene.finished
    assert plan.look_again is None or plan.look_again >= timedelta(seconds=5)


def test_a_rule_is_not_judged_while_a_pod_is_missing_nor_at_the_end_nor_without_the_metric():
    scene = ruled("FailJob").training()
    breach(scene, seconds=25)
    scene.gone(1).after(5).reports(20, loss=30.0).step()
    assert scene.status.health == ()
    scene.all_run().seen()
    assert breach(scene, seconds=30, step=100) == []  # the last step is made
    assert scene.status.health == ()
    without = ruled("FailJob", metric="GradientNorm").training()
    breach(without, seconds=60)
    assert without.status.health == ()


@pytest.mark.parametrize(
    ("metric", "bound", "report"),
    [
        ("Loss", {"above": 2}, {"loss": 2.5}),
        ("Loss", {"below": 2}, {"loss": 1.5}),
        ("SamplesPerSecond", {"below": 100}, {"samples_per_second": 99.0}),
        ("GradientNorm", {"above": 10}, {"gradient_norm": 11.0}),
    ],
)
def test_each_metric_is_that_of_the_report(metric: str, bound: dict[str, float], report: dict[str, float]):
    scene = ruled(metric=metric, above=None, **bound) if "below" in bound else ruled(metric=metric, **bound)
    assert (
        len(
            breach(scene.training(), loss=None, **report)
            if "loss" not in report
            else breach(scene.training(), **report)
        )
        == 1
    )


def test_staleness_is_that_of_now_and_not_the_largest_that_was_seen():
    scene = ruled(metric="Staleness", above=3).servers(2, consistency="Async").training()
    assert breach(scene, staleness=0, max_staleness_seen=9) == []
    assert len(breach(scene, step=20, staleness=4)) == 1


def test_the_age_of_a_step_counts_from_the_last_one_and_its_moment_is_looked_at():
    scene = ruled("RestartJob", metric="StepAge", above=7, forSeconds=0).training()
    plan = scene.after(5).reports(10, last_update_time=NOON).step()
    assert plan.look_again <= timedelta(seconds=2)
    assert scene.status.attempt == 1
    scene.after(3).reports(10, last_update_time=NOON).step()
    assert scene.status.attempt == 2
    assert scene.status.restarts.last.message == "Rule diverged of spec.health: StepAge is 8, at least 7 for 0 s"


def test_restart_job_counts_towards_the_limit_and_ends_at_it():
    scene = ruled("RestartJob").run_policy(backoffLimit=1).training()
    breach(scene)
    assert scene.status.attempt == 2
    assert scene.says("Restarting") == ("True", "HealthRule")
    assert (scene.status.restarts.total, scene.status.restarts.counted_towards_limit) == (1, 1)
    assert deleted(scene.step()) == ["digits-master-0", "digits-worker-0", "digits-worker-1"]
    assert scene.status.health == ()
    scene.after(60).seen().all_run().seen()
    breach(scene, step=1)
    assert scene.says("Failed") == ("True", "BackoffLimitExceeded")


def test_fail_job_fails_the_job_and_names_the_rule():
    scene = ruled("FailJob").training()
    breach(scene)
    assert scene.says("Failed") == ("True", "HealthRule")
    assert "Rule diverged of spec.health: Loss is 30, above 20 for 30 s" in scene.condition("Failed").message


def test_suspend_is_written_down_first_and_then_set_in_the_spec():
    scene = ruled("Suspend").training()
    said = "HealthRule: Rule diverged of spec.health: Loss is 30, above 20 for 30 s; the job is suspended"
    assert breach(scene) == [said]
    scene.gone(1)  # it is decided, whatever happens now
    assert scene.new_operator().step().actions[-1] == SuspendJob()
    scene.spec(suspend=True).seen()
    assert scene.says("Suspended") == ("True", "Suspended")
    assert scene.status.health == ()
    scene.spec(suspend=False).seen().all_run().reports(12, loss=1.0).seen()
    assert scene.status.attempt == 2


@pytest.mark.parametrize(
    ("retryable", "said", "remedy"),
    [
        (True, 'disttrainjobs "digits" is forbidden', "apply deploy/base/rbac of the operator's release"),
        (False, "policy: jobs are not suspended", "the cluster's admission policies have to allow it"),
    ],
)
def test_a_suspension_that_is_refused_is_tried_again_and_pods_are_replaced_meanwhile(
    retryable: bool, said: str, remedy: str
):
    scene = ruled("Suspend").training()
    breach(scene)
    scene.suspend_refused = Refusal(name="spec.suspend", message=said, retryable=retryable, time=scene.now)
    plan = scene.gone(1).after(1).step()
    assert created(plan) == [(WORKER, 1)]
    assert SuspendJob() not in plan.actions
    assert scene.says("Suspended") == ("False", "NotSuspended")
    message = f"A rule of spec.health suspends the job, but the operator may not set spec.suspend: {remedy} ({said})"
    assert scene.condition("Suspended").message == message
    scene.all_run().seen()
    assert scene.plan().look_again <= timedelta(seconds=59)
    assert scene.after(59).step().actions == (SuspendJob(),)


@pytest.mark.parametrize(
    ("value", "above", "said"),
    [
        (12345.4, 12000, "Loss is 12345, above 12000"),
        (0.183444, 0.1, "Loss is 0.1834, above 0.1"),
        (2.5e20, 1234567, "Loss is 2.5e+20, above 1234567"),
    ],
)
def test_numbers_are_said_in_plain_digits(value: float, above: float, said: str):
    (event,) = breach(ruled(above=above).training(), loss=value)
    assert f": {said} for" in event


def rolled_back(scene: Scene, *, steps: int) -> Scene:
    """The next attempt trains from a checkpoint, and its loss is good for so many steps."""
    scene.after(60).seen().all_run().seen()
    saved = ProgressCheckpoint(step=10, time=NOON)
    for step in range(10, 10 + steps):
        scene.after(5).reports(step, loss=1.0, last_checkpoint=saved).step()
    return scene


def test_roll_back_begins_an_attempt_that_believes_no_checkpoint_of_the_breach():
    scene = ruled("RollBack").training(15)
    saved = ProgressCheckpoint(step=20, time=NOON + timedelta(seconds=30))
    events = breach(scene, step=16, last_checkpoint=saved)
    assert scene.status.attempt == 2
    assert (scene.status.roll_back.attempt, scene.status.roll_back.step) == (2, 15)
    assert "going back to the newest checkpoint up to step 15" in events[0]
    assert scene.status.restarts.counted_towards_limit == 0
    scene.after(60).seen()
    assert scene.pod(0, MASTER).attempt == 2


@pytest.mark.parametrize(("step", "after"), [(20, None), (15, 15)], ids=["set aside", "before the breach"])
def test_the_status_names_no_best_checkpoint_that_a_roll_back_sets_aside(step, after):
    scene = ruled("RollBack").training(15)
    saved = ProgressCheckpoint(step=20, time=NOON + timedelta(seconds=30))
    breach(scene, step=16, last_checkpoint=saved, best=ProgressBest(step=step, value=0.5))
    assert scene.status.attempt == 2
    best = scene.status.training.best_checkpoint
    assert (best and best.step) == after


def test_checkpoints_up_to_the_last_good_report_are_believed_though_the_stored_step_is_older():
    scene = ruled("RollBack").spec(observability={"statusIntervalSeconds": 3600}).training(15)
    scene.after(50).reports(74, loss=1.0).step()
    assert scene.status.training.step == 15
    saved = ProgressCheckpoint(step=75, time=scene.now)
    breach(scene, step=75, last_checkpoint=saved)
    assert scene.status.roll_back.step == 74


def test_no_checkpoint_is_believed_because_of_its_age_alone():
    scene = ruled("RollBack").training(15).new_operator()
    saved = ProgressCheckpoint(step=70, time=scene.now)
    scene.after(50)  # no report was read for long, and the breach is older than the first one
    breach(scene, step=75, last_checkpoint=saved)
    assert scene.status.roll_back.step == 15


def test_an_attempt_that_is_in_breach_from_its_first_report_on_counts_and_believes_none_of_its_checkpoints():
    scene = ruled("RollBack").training(100)
    breach(scene, seconds=25, step=494, total=1000)
    assert scene.status.training.step > 490  # written while the rule is in breach
    breach(scene, seconds=10, step=499, total=1000)
    for roll_backs in (1, 2, 3):
        assert (scene.status.attempt, scene.status.roll_back.step) == (roll_backs + 1, 100)
        assert scene.status.health[0].roll_backs == roll_backs
        scene.after(60).seen().all_run().seen()
        breach(scene, step=130, total=1000)
    assert scene.says("Failed") == ("True", "HealthRule")


def test_three_roll_backs_without_a_newer_checkpoint_then_the_job_fails():
    scene = ruled("RollBack").training(15)
    for attempt in (2, 3, 4):
        breach(scene, step=16)
        assert scene.status.attempt == attempt
        assert scene.status.health[0].roll_backs == attempt - 1
        rolled_back(scene, steps=6)
        assert scene.status.health[0].roll_backs == attempt - 1
    breach(scene, step=16)
    assert scene.says("Failed") == ("True", "HealthRule")
    assert "rolled the job back 3 times without a newer checkpoint" in scene.condition("Failed").message


def test_a_newer_checkpoint_sets_the_count_of_roll_backs_back():
    scene = ruled("RollBack").training(15)
    for _ in range(3):
        breach(scene, step=16)
        rolled_back(scene, steps=6)
    scene.after(5).reports(25, loss=1.0).step()
    breach(scene, step=26)
    assert not scene.finished
    assert scene.status.health[0].roll_backs == 1
    assert scene.status.roll_back.step == 25


def test_a_rule_that_is_taken_out_leaves_no_trace_but_the_roll_back():
    scene = ruled("RollBack").training(15)
    breach(scene, step=16)
    del scene.body["spec"]["health"]
    scene.seen()
    assert scene.status.health == ()
    assert scene.status.roll_back.step == 15
