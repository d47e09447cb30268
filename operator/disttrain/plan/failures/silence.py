"""A master that hangs: it runs, but neither the operator nor its peers receive anything from it. It fails by our judgement."""

from dataclasses import replace

from disttrain.api.names import Role
from disttrain.api.reasons import Reason
from disttrain.api.status import LastRestart
from disttrain.plan.failures.account import record
from disttrain.plan.failures.steps import announced, limit_exceeded, written_down
from disttrain.plan.model import Phase, PodView
from disttrain.plan.step import Step
from disttrain.plan.view import REPORT_TIMEOUT, JobView


def silent_master(view: JobView) -> PodView | None:
    """A running master that reported once and reports no more, while its peers have given it up (the caller knows that).

    Each alone says little: the operator's own network may be cut, and peers lose one another too. Together they say that it hangs.
    """
    master, read = view.present.get((Role.MASTER, 0)), view.snapshot.progress_read
    if master is None or master.deleting or master.phase is not Phase.RUNNING or read is None:
        return None
    if master in view.declared_failed:
        return None  # it is written down already; the failures of now are its consequences
    if master.silent_since is not None:
        return None  # its whole node does not report: that is no failure of the master
    return master if master.created < read and view.reached(read + REPORT_TIMEOUT) else None


def replace_silent(view: JobView, master: PodView, fresh: list[PodView]) -> Step:
    """The running master declared failed. As any failure that is written down first; children.py deletes the pod in a later pass."""
    message = (
        f"Pod {master.name} hangs: neither its peers nor the operator received anything from it "
        f"for {REPORT_TIMEOUT.seconds} s"
    )
    if over := limit_exceeded(view, message):
        return over
    reason = Reason.MASTER_SILENT
    last = LastRestart(role=master.role.status_name, index=0, reason=reason, message=message, time=view.second)
    failed = [*fresh, master]
    step = written_down(view, failed, record(view, failed=len(failed), counted=True, last=last))
    return replace(announced(step, reason, message), final=True)
