"""The dashboard of the operator: all jobs, and whether the operator itself is well."""

from functools import partial

from panels import (
    SAMPLES_PER_SECOND,
    WINDOW,
    Dashboard,
    dashboard,
    event,
    happened,
    heatmap,
    jobs_table,
    link,
    mean,
    quantiles,
    series,
    stat,
    target,
    texts,
    thresholds,
    variable,
)

OPERATOR = 'namespace="$namespace",job="disttrain-operator"'
WORKERS = 'job="disttrain-trainer",role="worker"'
MASTERS = 'job="disttrain-trainer",role="master"'

STATE_COLORS = {
    "Pending": "#8AB8FF",
    "Scheduling": "#5794F2",
    "Starting": "#3274D9",
    "Training": "green",
    "Stalled": "orange",
    "Restarting": "yellow",
    "Resizing": "super-light-purple",
    "Suspended": "#8e8e8e",
    "Complete": "dark-green",
    "Failed": "red",
}


def operator() -> Dashboard:
    reconcile = "disttrain_operator_reconcile_duration_seconds"
    counted = partial(happened, process=OPERATOR)
    # Of the operator that leads: one that waits in reserve watches nothing.
    watch_age = f"disttrain_operator_watch_age_seconds{{{OPERATOR}}} and on (instance) disttrain_operator_leader{{{OPERATOR}}} == 1"
    failed = f'{OPERATOR},result="Failed"'
    overview = [
        stat(
            "Operator",
            "Whether an operator answers and holds the lease. Jobs go on training without one, but nothing is "
            "repaired.",
            f"max(disttrain_operator_leader{{{OPERATOR}}})",
            background=True,
            levels=thresholds((None, "red"), (1, "green")),
            mappings=[texts(("No leader", "red"), ("Leading", "green"))],
        ),
        stat(
            "Live jobs",
            "Jobs that are neither complete nor failed.",
            f'sum(max by (state) (disttrain_operator_jobs{{{OPERATOR},state!~"Complete|Failed"}}))',
            decimals=0,
            spark=True,
        ),
        stat(
            "Failed",
            "Jobs that failed in the time shown.",
            f"sum({counted('disttrain_operator_jobs_finished_total', failed, '$__range')}) or vector(0)",
            decimals=0,
            levels=thresholds((None, "green"), (1, "red")),
        ),
        stat(
            "Restarts",
            "Pods that were replaced in the time shown.",
            f"sum({counted('disttrain_operator_restarts_total', OPERATOR, '$__range')}) or vector(0)",
            decimals=0,
            levels=thresholds((None, "green"), (1, "orange")),
        ),
        stat(
            "Queue",
            "Jobs that wait for the reconciler.",
            f"sum(disttrain_operator_queue_depth{{{OPERATOR}}})",
            decimals=0,
            spark=True,
            levels=thresholds((None, "green"), (20, "orange"), (100, "red")),
        ),
        stat(
            "Reconcile p99",
            "99 of 100 passes over a job are quicker.",
            f"histogram_quantile(0.99, sum by (le) (rate({reconcile}_bucket{{{OPERATOR}}}{WINDOW})))",
            unit="s",
            spark=True,
            levels=thresholds((None, "green"), (0.5, "orange"), (2, "red")),
        ),
        stat(
            "Oldest watch",
            "Seconds since the quietest watch reported something, or a resync found nothing to tell; a healthy one "
            "stays near the resync period of 60 s.",
            f"max({watch_age})",
            unit="s",
            spark=True,
            levels=thresholds((None, "green"), (120, "orange"), (300, "red")),
        ),
        stat(
            "Errors",
            "Passes that failed in the time shown. They are tried again; a number that grows is in the operator's log.",
            f"sum(increase(disttrain_operator_reconcile_errors_total{{{OPERATOR}}}[$__range])) or vector(0)",
            decimals=0,
            levels=thresholds((None, "green"), (1, "red")),
        ),
    ]
    jobs = [
        series(
            "Jobs by state",
            "Every DistTrainJob that the operator serves, by its state.",
            target(f"max by (state) (disttrain_operator_jobs{{{OPERATOR}}})", "{{state}}"),
            unit="none",
            stacked=True,
            steps=True,
            colors=STATE_COLORS,
            table=True,
        ),
        series(
            "Finished jobs",
            "Jobs that ended, by result and reason.",
            target(
                f"sum by (result, reason) {counted('disttrain_operator_jobs_finished_total', OPERATOR, '$__rate_interval')}",
                "{{result}} {{reason}}",
            ),
            unit="none",
            bars=True,
            stacked=True,
        ),
        jobs_table(
            "Jobs",
            "Every job whose pods answer now; of a script or command, what it reports. The name leads to the dashboard of the job.",
            {
                "Step": ('max by (namespace, job_name) (disttrain_step{job="disttrain-trainer"})', "none"),
                "Loss": (
                    f"avg by (namespace, job_name) (disttrain_loss{{{WORKERS}}})"
                    f" or max by (namespace, job_name) (disttrain_loss{{{MASTERS}}})",
                    "none",
                ),
                "Samples/s": (
                    f"sum by (namespace, job_name) (rate(disttrain_samples_total{{{WORKERS}}}{WINDOW}))"
                    f" or (sum by (namespace, job_name) (rate(disttrain_samples_total{{{MASTERS}}}{WINDOW}))"
                    f" and on (namespace, job_name) disttrain_step{{{MASTERS}}})",
                    SAMPLES_PER_SECOND,
                ),
                "Workers": (f"count by (namespace, job_name) (disttrain_job_info{{{WORKERS}}})", "none"),
                "Recoveries": (
                    'max by (namespace, job_name) (increase(disttrain_recoveries_total{job="disttrain-trainer"}[$__range]))',
                    "none",
                ),
            },
            link="/d/disttrain-job?var-namespace=${__data.fields.Namespace}&var-job_name=${__data.fields.Job}",
        ),
    ]
    faults = [
        series(
            "Restarts by cause",
            "Replaced pods, by role and cause.",
            target(
                f"sum by (role, reason) {counted('disttrain_operator_restarts_total', OPERATOR, '$__rate_interval')}",
                "{{role}} {{reason}}",
            ),
            unit="none",
            bars=True,
            stacked=True,
            width=8,
        ),
        series(
            "Recovery",
            "Mean seconds from the failure of a pod until the job is whole again, by role of that pod, over the "
            "last 15 minutes.",
            target(
                mean(
                    f"sum by (role) {counted('disttrain_operator_recovery_seconds_sum', OPERATOR, '15m')}",
                    f"sum by (role) {counted('disttrain_operator_recovery_seconds_count', OPERATOR, '15m')}",
                ),
                "{{role}}",
            ),
            unit="s",
            width=8,
        ),
        series(
            "Startup by phase",
            "Mean seconds until all nodes are found (schedule), from there until all pods are ready (ready), and "
            "to the first step (train); over the last 15 minutes.",
            target(
                mean(
                    f"sum by (phase) {counted('disttrain_operator_startup_seconds_sum', OPERATOR, '15m')}",
                    f"sum by (phase) {counted('disttrain_operator_startup_seconds_count', OPERATOR, '15m')}",
                ),
                "{{phase}}",
            ),
            unit="s",
            width=8,
            stacked=True,
        ),
    ]
    loop = [
        series(
            "Reconcile duration",
            "Median, 90th and 99th percentile of one pass over a job.",
            *quantiles(reconcile, OPERATOR),
            unit="s",
        ),
        heatmap(
            "Reconcile durations",
            "How many passes took how long.",
            f"sum by (le) (increase({reconcile}_bucket{{{OPERATOR}}}{WINDOW}))",
            unit="s",
        ),
        series(
            "Queue and errors",
            "Jobs that wait, and failed passes a second.",
            target(f"sum(disttrain_operator_queue_depth{{{OPERATOR}}})", "queue"),
            target(f"sum(rate(disttrain_operator_reconcile_errors_total{{{OPERATOR}}}{WINDOW}))", "errors a second"),
            unit="none",
            width=8,
        ),
        series(
            "Passes",
            "Passes over a job, each second.",
            target(f"sum(rate({reconcile}_count{{{OPERATOR}}}{WINDOW}))", "passes"),
            unit="cps",
            width=8,
        ),
        series(
            "Leader",
            "Which operator pod holds the lease: 1 for the leader, 0 for those that wait.",
            target(f"max by (pod) (disttrain_operator_leader{{{OPERATOR}}})", "{{pod}}"),
            unit="none",
            width=8,
            steps=True,
            most=1,
        ),
    ]
    api = [
        series(
            "API requests",
            "Requests to the API server, each second, by verb and resource.",
            target(
                f"sum by (verb, resource) (rate(disttrain_operator_api_requests_total{{{OPERATOR}}}{WINDOW}))",
                "{{verb}} {{resource}}",
            ),
            unit="reqps",
            table=True,
        ),
        series(
            "API answers",
            "Requests a second by status code. 409 is a harmless repeat; 403 a missing permission; 429 and 5xx a "
            "busy API server.",
            target(f"sum by (code) (rate(disttrain_operator_api_requests_total{{{OPERATOR}}}{WINDOW}))", "{{code}}"),
            unit="reqps",
            stacked=True,
        ),
        series(
            "Age of the watches",
            "Seconds since each watch reported something, or a resync found nothing to tell. One that grows past 5 "
            "minutes is dead.",
            target(f"max by (resource) ({watch_age})", "{{resource}}"),
            unit="s",
            width=8,
        ),
        series(
            "Missed by a watch",
            "Objects that a resync found changed and that the watch had not reported, each second. Anything but 0 "
            "is worth a look at the API server.",
            target(
                f"sum by (resource) (rate(disttrain_operator_resync_drift_total{{{OPERATOR}}}{WINDOW}))", "{{resource}}"
            ),
            unit="cps",
            width=8,
        ),
        series(
            "Scrapes",
            "Whether the operator's pods answer the scrape: 1 yes, 0 no.",
            target(f"max by (pod) (up{{{OPERATOR}}})", "{{pod}}"),
            unit="none",
            width=8,
            steps=True,
            most=1,
        ),
    ]
    return dashboard(
        "disttrain-operator",
        "DistTrain / Operator",
        "All jobs of the operator, and whether the operator itself is well.",
        span="1h",
        variables=[
            variable(
                "namespace",
                "Namespace",
                "Namespace that the operator runs in.",
                'label_values(disttrain_operator_leader{job="disttrain-operator"}, namespace)',
            )
        ],
        events=[
            event("Alert", 'ALERTS{alertname=~"Operator.*",alertstate="firing"}', "red", text="{{alertname}}", on=False)
        ],
        links=[link("Job", "/d/disttrain-job?var-datasource=${datasource}")],
        sections=[
            ("Now", overview),
            ("Jobs", jobs),
            ("Faults", faults),
            ("Reconciling", loop),
            ("API server", api),
        ],
    )
