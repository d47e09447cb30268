"""The account of a job's failures: how many count, how long a replacement waits for it, when a checkpoint sets it back.

Not here: which failures there are and what is done about them (restart.py).
"""

from datetime import datetime, timedelta

from disttrain.api.spec import BackoffLimitReset, FailureRule
from disttrain.api.status import LastRestart, Restarts
from disttrain.plan.model import PodView
from disttrain.plan.world import World

BASE = timedelta(seconds=1)
CAP = timedelta(seconds=300)


def counted_so_far(world: World) -> int:
    """Failures that count towards the limit; a checkpoint since the last one has set them back."""
    if checkpoint_resets(world) and world.checkpoint_step != world.restarts.checkpoint_step:
        return 0
    return world.restarts.counted_towards_limit


def record(world: World, *, failed: int, counted: bool, last: LastRestart | None) -> Restarts:
    """The failures written down."""
    before = world.restarts
    return before.model_copy(
        update={
            "total": before.total + failed,
            "counted_towards_limit": counted_so_far(world) + counted,
            "checkpoint_step": world.checkpoint_step if counted else before.checkpoint_step,
            "last": last or before.last,
        }
    )


def delay(counted: int) -> timedelta:
    """How long a replacement waits, from the end of the failed pod: 1 s, 2 s, 4 s … 300 s."""
    return min(CAP, BASE * (1 << min(max(counted, 1) - 1, 16)))


def release(world: World, pod: PodView) -> datetime:
    """When a failed pod may be replaced. Until then it stays, and its log with it."""
    rule = rule_for(world, pod)
    counted = counted_so_far(world) if rule is None or rule.count_towards_limit else 0
    return world.until(finished(world, pod), delay(counted))


def next_attempt(world: World) -> datetime | None:
    """When the pods of a restarted job may be made; None: now. A single pod has its back-off behind it when its place is free."""
    if world.present or world.restarts.last is None:
        return None
    moment = world.until(world.restarts.last.time, delay(counted_so_far(world)))
    return moment if moment > world.now else None


def finished(world: World, pod: PodView) -> datetime:
    """When a pod ended, never later than now: a node's clock may be ahead. A failure that is written down has the moment that was
    written, so that its back-off ends and does not begin anew with every pass."""
    if pod.ended <= world.now:
        return pod.ended
    last = world.restarts.last
    return last.time if last is not None and pod.uid in world.restarts.accounted else world.now


def carried_over(world: World) -> Restarts | None:
    """The account without the uids of pods that are gone, and set back by a new checkpoint; None while nothing ever failed."""
    if world.status.restarts is None:
        return None
    uids = {pod.uid for pod in world.snapshot.pods}
    accounted = tuple(uid for uid in world.restarts.accounted if uid in uids)
    return world.restarts.model_copy(update={"accounted": accounted, "counted_towards_limit": counted_so_far(world)})


def checkpoint_resets(world: World) -> bool:
    """Whether only the failures since the last checkpoint count."""
    return world.spec.run_policy.backoff_limit_reset is BackoffLimitReset.ON_CHECKPOINT


def rule_for(world: World, pod: PodView) -> FailureRule | None:
    """The rule of the failure policy that a failed pod meets first."""
    for rule in world.spec.failure_policy.rules:
        code_matches = rule.on_exit_codes is None or pod.exit_code in rule.on_exit_codes
        condition_matches = rule.on_pod_conditions is None or not pod.conditions.isdisjoint(rule.on_pod_conditions)
        if code_matches and condition_matches:
            return rule
    return None
