"""The dashboard of one job: how far it is, how fast, what it waits for, what its faults cost."""

from panels import (
    SAMPLES_PER_SECOND,
    WINDOW,
    Dashboard,
    dashboard,
    event,
    heatmap,
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

JOB = 'namespace="$namespace",job_name="$job_name"'
MASTER = f'{JOB},role="master"'
WORKERS = f'{JOB},role="worker"'
SERVERS = f'{JOB},role="parameter-server"'
RANKS = f'{WORKERS},rank=~"$rank"'
STEPS = "suffix: steps"

# The workers of our own loop count for themselves. Those of a script or command cannot: what it reports is the master's to tell, and a
# job that never reports has neither.
LOSS = f"(avg(disttrain_loss{{{WORKERS}}}) or max(disttrain_loss{{{MASTER}}}))"
REPORTED_SAMPLES = f"(sum(rate(disttrain_samples_total{{{MASTER}}}{WINDOW})) and on () disttrain_step{{{MASTER}}})"


def job() -> Dashboard:
    steps = f"sum(rate(disttrain_steps_total{{{WORKERS}}}{WINDOW}))"
    phases = f"disttrain_step_phase_seconds_total{{{WORKERS}}}{WINDOW}"
    compute = f'disttrain_step_phase_seconds_total{{{RANKS},phase=~"data|forward|backward"}}{WINDOW}'
    goodput = f"increase(disttrain_goodput_seconds_total{{{JOB}}}[$__range])"
    productive = f'increase(disttrain_goodput_seconds_total{{{JOB},bucket="productive"}}[$__range])'
    # 2 when the step is not that of 5 minutes ago, 1 when it is, 2 for a first one that is younger; before it, 0 while a pod is known.
    step = f"max(disttrain_step{{{MASTER}}})"
    earlier = f"max(disttrain_step{{{MASTER}}} offset 5m)"
    moves = f"(1 + ({step} != bool {earlier}) or 2 + 0 * ({step} > 0) or 0 * max(up{{{JOB}}}))"
    not_finite = f"(max(disttrain_loss{{{JOB}}} != bool disttrain_loss{{{JOB}}}) or vector(0))"
    state = f"clamp_max({moves} + 3 * {not_finite}, 3)"
    overview = [
        stat(
            "State",
            "Training: at least one step in the last 5 minutes. Waiting: none, so recovering or stalled. No report yet: "
            "the job starts, or it is a script or command that does not report; of that no more is known.",
            state,
            background=True,
            levels=thresholds((None, "blue")),
            mappings=[
                texts(("No report yet", "blue"), ("Waiting", "orange"), ("Training", "green"), ("Loss is NaN", "red"))
            ],
        ),
        stat(
            "Step",
            "The newest global step that any rank reports.",
            f"max(disttrain_step{{{JOB}}})",
            decimals=0,
            spark=True,
        ),
        stat("Epoch", "The epoch in work, counted from 1.", f"max(disttrain_epoch{{{JOB}}})", decimals=0),
        stat("Loss", "Mean of the ranks' last loss.", LOSS, spark=True),
        stat(
            "Throughput",
            "Samples that all workers together train on, each second.",
            f"sum(rate(disttrain_samples_total{{{WORKERS}}}{WINDOW})) or {REPORTED_SAMPLES}",
            unit=SAMPLES_PER_SECOND,
            decimals=0,
            spark=True,
        ),
        stat(
            "Workers",
            "Training processes that answer the scrape.",
            f"count(disttrain_job_info{{{WORKERS}}})",
            decimals=0,
            spark=True,
        ),
        stat(
            "Recoveries",
            "Times that the job went on after losing processes, in the time shown, as the process that saw most "
            "of them counts.",
            f"max(increase(disttrain_recoveries_total{{{JOB}}}[$__range]))",
            decimals=0,
            levels=thresholds((None, "green"), (1, "orange"), (10, "red")),
        ),
        stat(
            "Goodput",
            "Share of the time shown that went into steps that counted; the rest was queueing, starting, redoing "
            "lost steps or standing still.",
            f"sum({productive}) / sum({goodput})",
            unit="percentunit",
            decimals=1,
            levels=thresholds((None, "red"), (0.7, "orange"), (0.9, "green")),
        ),
    ]
    learning = [
        series(
            "Loss by rank",
            "The loss each rank reported last, and their mean; of a script the mean alone. A rank that leaves the bundle "
            "reads other data or diverges.",
            target(f"disttrain_loss{{{RANKS}}}", "rank {{rank}}"),
            target(LOSS, "mean"),
            unit="none",
            least=None,
            height=9,
            dashed="mean",
        ),
        series(
            "Step and checkpoint",
            "The global step, the step that the newest complete checkpoint holds, and that of the last evaluation. The distance to "
            "the checkpoint is what a lost server or a restart of the job costs.",
            target(f"max(disttrain_step{{{JOB}}})", "step"),
            target(f"max(disttrain_checkpoint_last_step{{{JOB}}})", "checkpoint"),
            target(f"max(disttrain_evaluation_step{{{JOB}}})", "evaluation"),
            unit="none",
            height=9,
            dashed="checkpoint",
        ),
        series(
            "Throughput by rank",
            "Samples a second of each rank, stacked: the height is the throughput of the job. The ranks of a script are "
            "shown together.",
            target(
                f"sum by (rank) (rate(disttrain_samples_total{{{RANKS}}}{WINDOW}))"
                f' or on () label_replace({REPORTED_SAMPLES}, "rank", "all", "", "")',
                "rank {{rank}}",
            ),
            unit=SAMPLES_PER_SECOND,
            stacked=True,
        ),
        series(
            "Gradient norm",
            "Norm of the gradient of an update, on a logarithmic axis; of synchronous parameter servers the master tells it. "
            "Growing without end announces a loss of NaN; lower the learning rate or clip.",
            target(f"disttrain_gradient_norm{{{RANKS}}} or disttrain_gradient_norm{{{MASTER}}}", "{{role}} {{rank}}"),
            unit="none",
            logarithmic=True,
        ),
        series(
            "Evaluation",
            "What trainer.evaluate returned last, by name: each trainer.evaluateEverySteps, and at the end.",
            target(f"max by (name) (disttrain_evaluation{{{JOB}}})", "{{name}}"),
            unit="none",
            least=None,
            width=8,
        ),
        series(
            "Values of the loss",
            "The named values that trainer.loss returns beside the loss, as means of all workers.",
            target(f"max by (name) (disttrain_value{{{JOB}}})", "{{name}}"),
            unit="none",
            least=None,
            width=8,
        ),
        series(
            "Samples left out",
            "Samples that trainer.lastBatch: Drop leaves out at the end of an epoch, in each bar. Empty for a job that keeps all.",
            target(f"max(increase(disttrain_samples_dropped_total{{{MASTER}}}{WINDOW}))", "samples"),
            unit="none",
            width=8,
            bars=True,
        ),
    ]
    speed = [
        series(
            "Step time by phase",
            "Where a mean step of a mean worker spends its time. Much communicate: the network, or waiting for a "
            "slow rank. Much data: the input pipeline.",
            target(mean(f"sum by (phase) (rate({phases}))", f"scalar({steps})"), "{{phase}}"),
            unit="s",
            stacked=True,
        ),
        series(
            "Step duration",
            "Median, 90th and 99th percentile over all workers.",
            *quantiles("disttrain_step_duration_seconds", WORKERS),
            unit="s",
        ),
        series(
            "Own work by rank",
            "Seconds a step for data, forward and backward, without waiting for others. In a synchronous job the "
            "rank on top holds all others up.",
            target(
                mean(
                    f"sum by (rank) (rate({compute}))",
                    f"sum by (rank) (rate(disttrain_steps_total{{{RANKS}}}{WINDOW}))",
                ),
                "rank {{rank}}",
            ),
            unit="s",
        ),
        heatmap(
            "Step durations",
            "How many steps took how long: two bands are two kinds of workers, or a step in so many that waits.",
            f"sum by (le) (increase(disttrain_step_duration_seconds_bucket{{{WORKERS}}}{WINDOW}))",
            unit="s",
        ),
        series(
            "Communication",
            "Bytes a second that training processes send and receive, by role.",
            target(
                f'sum by (role, direction) (rate(disttrain_communication_bytes_total{{{JOB},role!="master"}}{WINDOW}))',
                "{{role}} {{direction}}",
            ),
            unit="Bps",
            width=24,
            table=True,
        ),
    ]
    servers = [
        series(
            "Staleness",
            "How many steps old the parameters were that a gradient was computed on, when it arrived. Sync keeps "
            "it at 0, BoundedStaleness below its bound.",
            *quantiles("disttrain_ps_staleness_steps", SERVERS),
            unit=STEPS,
            width=8,
        ),
        series(
            "Version by server",
            "The version of the parameters that each server holds. They move together; one that stands still "
            "blocks the job. A drop is a roll-back to a checkpoint.",
            target(f"disttrain_ps_version{{{SERVERS}}}", "server {{rank}}"),
            unit="none",
            width=8,
            steps=True,
        ),
        series(
            "Late gradients",
            "Gradients a second that came too late to count: those of backup workers, and repeated ones.",
            target(f"sum by (rank) (rate(disttrain_ps_late_gradients_total{{{SERVERS}}}{WINDOW}))", "server {{rank}}"),
            unit="cps",
            width=8,
        ),
    ]
    faults = [
        series(
            "Recoveries and lost steps",
            "Faults that the job survived (left axis), and steps that had to be done again (right axis), in each bar.",
            target(f"max(increase(disttrain_recoveries_total{{{JOB}}}{WINDOW}))", "recoveries"),
            target(f"sum(increase(disttrain_lost_steps_total{{{JOB}}}{WINDOW}))", "lost steps"),
            unit="none",
            width=8,
            bars=True,
            right="lost steps",
            colors={"recoveries": "orange", "lost steps": "purple"},
        ),
        series(
            "Where the time goes",
            "Share of each second by bucket: productive steps, queued, starting, redone after a fault, stalled.",
            target(
                mean(
                    f"sum by (bucket) (rate(disttrain_goodput_seconds_total{{{JOB}}}{WINDOW}))",
                    f"scalar(sum(rate(disttrain_goodput_seconds_total{{{JOB}}}{WINDOW})))",
                ),
                "{{bucket}}",
            ),
            unit="percentunit",
            width=8,
            stacked=True,
            most=1,
            colors={
                "productive": "green",
                "queued": "blue",
                "starting": "yellow",
                "redone": "purple",
                "stalled": "red",
            },
        ),
        series(
            "Checkpoint duration",
            "Mean seconds that writing a checkpoint took in the last 15 minutes, by the process that writes.",
            target(
                mean(
                    f"sum by (role, rank) (increase(disttrain_checkpoint_duration_seconds_sum{{{JOB}}}[15m]))",
                    f"(sum by (role, rank) (increase(disttrain_checkpoint_duration_seconds_count{{{JOB}}}[15m])) > 0)",
                ),
                "{{role}} {{rank}}",
            ),
            unit="s",
            width=8,
        ),
    ]
    return dashboard(
        "disttrain-job",
        "DistTrain / Job",
        "One DistTrainJob: how far it is, how fast, what it waits for, and what its faults cost.",
        span="30m",
        variables=[
            # By what every process tells from its start on: only a job that reports a step has one.
            variable("namespace", "Namespace", "Namespace of the job.", "label_values(disttrain_job_info, namespace)"),
            variable(
                "job_name",
                "Job",
                "Name of the DistTrainJob.",
                'label_values(disttrain_job_info{namespace="$namespace"}, job_name)',
            ),
            variable(
                "rank",
                "Ranks",
                "Ranks shown in the panels by rank.",
                f"label_values(disttrain_job_info{{{WORKERS}}}, rank)",
                many=True,
            ),
        ],
        events=[
            event("Recovery", f"max(increase(disttrain_recoveries_total{{{JOB}}}[2m])) > 0", "orange"),
            event("Alert", f'ALERTS{{{JOB},alertstate="firing"}}', "red", text="{{alertname}}", on=False),
        ],
        links=[link("Operator", "/d/disttrain-operator?var-datasource=${datasource}")],
        sections=[
            ("Now", overview),
            ("Learning", learning),
            ("Speed", speed),
            ("Parameter servers (empty for a job without)", servers),
            ("Faults and checkpoints", faults),
        ],
    )
