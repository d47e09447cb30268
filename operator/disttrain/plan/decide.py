"""decide: a snapshot of a job in, what shall be done out. Pure: the same snapshot gives the same plan, on a cluster and without.

The order of the policies is the behaviour of the operator, so it stands here and nowhere else. Each has a file of its own.
"""

from disttrain.api.names import MANAGED_BY
from disttrain.plan import children, deadlines, report, restart, success, suspend
from disttrain.plan.cleanup import after_the_end
from disttrain.plan.hands_off import hands_off
from disttrain.plan.model import Plan, Snapshot
from disttrain.plan.view import JobView


def decide(snapshot: Snapshot) -> Plan:
    """What shall be done about a job now."""
    view = JobView(snapshot)
    # Somebody else's job (KEP-2232), or one that is being deleted: its children go by their ownerReferences.
    if view.spec.managed_by != MANAGED_BY or view.job.metadata.deletion_timestamp is not None:
        return Plan(status=view.status)
    # The end is final, whatever the spec says since and however the pods are.
    if view.finished:
        return after_the_end(view)
    # Another version stored it, and knows more of it than we do. Its pods stay, and nothing is made.
    if snapshot.not_understood:
        return hands_off(view)
    step = (
        # Work that is done stays done: no failure, deadline or suspension after it undoes it.
        success.reached(view)
        # Pods that are told to end may fail or miss a deadline on the way; that is nobody's fault.
        or suspend.asked(view)
        # The deadlines stand above the retries: a job that may not run any longer is not restarted.
        or deadlines.passed(view)
        # Every failure is written down before anything is made or deleted because of it.
        or restart.failures(view)
        # Nothing special: what is missing is made, what is old is deleted.
        or children.converge(view)
    )
    return report.plan(view, step)
