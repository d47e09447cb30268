"""The metrics that dashboards and rules may stand on: name -> type and labels. Test data, not code: what the pods export is held to it."""

from dataclasses import dataclass

TARGET = frozenset({"job", "instance", "namespace", "pod", "node"})
"""Labels that the scrape adds."""
TRAINER = TARGET | {"job_name", "role", "rank"}


@dataclass(frozen=True)
class Metric:
    kind: str
    labels: frozenset[str]
    """Beside those of the target."""

    def names(self, name: str) -> frozenset[str]:
        """The names of its series."""
        return (
            frozenset(name + suffix for suffix in ("_bucket", "_sum", "_count"))
            if self.kind == "histogram"
            else frozenset({name})
        )


def _metric(kind: str, *labels: str) -> Metric:
    return Metric(kind, frozenset(labels))


TRAINER_METRICS = {
    "disttrain_loss": _metric("gauge"),
    "disttrain_value": _metric("gauge", "name"),
    "disttrain_step": _metric("gauge"),
    "disttrain_steps_total": _metric("counter"),
    "disttrain_samples_total": _metric("counter"),
    "disttrain_samples_dropped_total": _metric("counter"),
    "disttrain_samples_per_second": _metric("gauge"),
    "disttrain_epoch": _metric("gauge"),
    "disttrain_gradient_norm": _metric("gauge"),
    "disttrain_step_duration_seconds": _metric("histogram"),
    "disttrain_step_phase_seconds_total": _metric("counter", "phase"),
    "disttrain_communication_bytes_total": _metric("counter", "direction"),
    "disttrain_ps_version": _metric("gauge"),
    "disttrain_ps_staleness_steps": _metric("histogram"),
    "disttrain_ps_late_gradients_total": _metric("counter"),
    "disttrain_checkpoint_duration_seconds": _metric("histogram"),
    "disttrain_checkpoint_last_step": _metric("gauge"),
    "disttrain_evaluation": _metric("gauge", "name"),
    "disttrain_evaluation_step": _metric("gauge"),
    "disttrain_recoveries_total": _metric("counter"),
    "disttrain_lost_steps_total": _metric("counter"),
    "disttrain_goodput_seconds_total": _metric("counter", "bucket"),
    "disttrain_job_info": _metric("gauge", "strategy", "attempt", "world_size"),
}
OPERATOR_METRICS = {
    "disttrain_operator_jobs": _metric("gauge", "state"),
    "disttrain_operator_jobs_finished_total": _metric("counter", "result", "reason"),
    "disttrain_operator_restarts_total": _metric("counter", "role", "reason"),
    "disttrain_operator_reconcile_duration_seconds": _metric("histogram"),
    "disttrain_operator_reconcile_errors_total": _metric("counter"),
    "disttrain_operator_queue_depth": _metric("gauge"),
    "disttrain_operator_startup_seconds": _metric("histogram", "phase"),
    "disttrain_operator_recovery_seconds": _metric("histogram", "role"),
    "disttrain_operator_api_requests_total": _metric("counter", "verb", "resource", "code"),
    "disttrain_operator_watch_age_seconds": _metric("gauge", "resource"),
    "disttrain_operator_resync_drift_total": _metric("counter", "resource"),
    "disttrain_operator_leader": _metric("gauge"),
}
METRICS = TRAINER_METRICS | OPERATOR_METRICS

PHASES = ("data", "forward", "backward", "communicate", "optimize", "checkpoint")
BUCKETS = ("productive", "starting", "redone", "stalled")
