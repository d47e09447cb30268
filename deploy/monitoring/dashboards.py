"""The Grafana dashboards, as Python that prints JSON: one job (job.json) and the operator (operator.json).

    python deploy/monitoring/dashboards.py           writes deploy/monitoring/dashboards/*.json
    python deploy/monitoring/dashboards.py --check   fails when they are stale

Panels are plain dicts in the shape of Grafana's dashboard schema (schemaVersion 42, Grafana 12). Every query is over the
metrics as exported, never over a recording rule, so that the dashboards work on a Prometheus that has none of our rules.
The layout is computed: panels flow from left to right and a section begins on a new line.
"""

import json
import sys
from pathlib import Path
from typing import Any

Json = dict[str, Any]

FOLDER = Path(__file__).parent / "dashboards"
SCHEMA_VERSION = 42
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

JOB = 'namespace="$namespace",job_name="$job_name"'
WORKERS = f'{JOB},role="worker"'
SERVERS = f'{JOB},role="parameter-server"'
RANKS = f'{WORKERS},rank=~"$rank"'
OPERATOR = 'namespace="$namespace",job="disttrain-operator"'
WINDOW = "[$__rate_interval]"

SAMPLES_PER_SECOND = "suffix: samples/s"
STEPS = "suffix: steps"


# --- the parts of a panel


def target(expr: str, legend: str = "__auto", *, instant: bool = False, format: str = "time_series") -> Json:
    """One PromQL query; its refId is set by the panel."""
    return {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": expr,
        "format": format,
        "instant": instant,
        "range": not instant,
        "legendFormat": legend,
    }


def panel(
    kind: str,
    title: str,
    description: str,
    targets: list[Json],
    *,
    size: tuple[int, int],
    defaults: Json,
    options: Json,
    overrides: list[Json] | None = None,
    **more: Any,
) -> Json:
    for letter, each in zip("ABCDEFGH", targets, strict=False):
        each["refId"] = letter
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"x": 0, "y": 0, "w": size[0], "h": size[1]},
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": overrides or []},
        "options": options,
        **more,
    }


def thresholds(*steps: tuple[float | None, str]) -> Json:
    return {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in steps]}


def override(field: str, *properties: tuple[str, Any]) -> Json:
    """Other properties for the curve or column of that name."""
    return {
        "matcher": {"id": "byName", "options": field},
        "properties": [{"id": name, "value": value} for name, value in properties],
    }


def stat(
    title: str,
    description: str,
    expr: str,
    *,
    unit: str = "none",
    decimals: int | None = None,
    width: int = 3,
    levels: Json | None = None,
    mappings: list[Json] | None = None,
    spark: bool = False,
    background: bool = False,
    legend: str = "__auto",
    text: str = "auto",
) -> Json:
    """One number now. spark: with its course behind it."""
    defaults: Json = {
        "unit": unit,
        "color": {"mode": "thresholds"},
        "thresholds": levels or thresholds((None, "text")),
        "mappings": mappings or [],
        "noValue": "no data",
    }
    if decimals is not None:
        defaults["decimals"] = decimals
    return panel(
        "stat",
        title,
        description,
        [target(expr, legend, instant=not spark)],
        size=(width, 4),
        defaults=defaults,
        options={
            "colorMode": "background" if background else "value",
            "graphMode": "area" if spark else "none",
            "justifyMode": "center",
            "orientation": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "percentChangeColorMode": "standard",
            "showPercentChange": False,
            "textMode": text,
            "wideLayout": True,
        },
    )


def series(
    title: str,
    description: str,
    *targets: Json,
    unit: str,
    width: int = 12,
    height: int = 8,
    stacked: bool = False,
    bars: bool = False,
    steps: bool = False,
    least: float | None = 0,
    most: float | None = None,
    levels: Json | None = None,
    logarithmic: bool = False,
    dashed: str | None = None,
    right: str | None = None,
    colors: dict[str, str] | None = None,
    table: bool = False,
) -> Json:
    """Curves over time. dashed: the legend of a curve that is a reference for the others. right: of one with an axis of its
    own. bars: for counts of rare events; each bar is a minute or more, so that an event is in one bar. table: the legend with
    last and maximum."""
    custom: Json = {
        "drawStyle": "bars" if bars else "line",
        "lineInterpolation": "stepAfter" if steps else "linear",
        "lineWidth": 0 if stacked and not bars else 1,
        "fillOpacity": 70 if stacked or bars else 6,
        "gradientMode": "none",
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "axisPlacement": "auto",
        "scaleDistribution": {"type": "log", "log": 10} if logarithmic else {"type": "linear"},
        "thresholdsStyle": {"mode": "line" if levels else "off"},
    }
    defaults: Json = {
        "unit": unit,
        "color": {"mode": "palette-classic"},
        "custom": custom,
        "thresholds": levels or thresholds((None, "green")),
        "mappings": [],
    }
    if least is not None and not logarithmic:
        defaults["min"] = least
    if most is not None:
        defaults["max"] = most
    overrides = []
    if dashed is not None:
        line = {"fill": "dash", "dash": [8, 6]}
        overrides.append(
            override(
                dashed,
                ("custom.lineStyle", line),
                ("custom.fillOpacity", 0),
                ("color", {"mode": "fixed", "fixedColor": "text"}),
            )
        )
    if right is not None:
        overrides.append(override(right, ("custom.axisPlacement", "right"), ("min", 0)))
    for name, color in (colors or {}).items():
        overrides.append(override(name, ("color", {"mode": "fixed", "fixedColor": color})))
    if bars:
        defaults["decimals"] = 0
    return panel(
        "timeseries",
        title,
        description,
        list(targets),
        size=(width, height),
        defaults=defaults,
        overrides=overrides,
        options={
            "legend": {
                "displayMode": "table" if table else "list",
                "placement": "right" if table else "bottom",
                "showLegend": True,
                "calcs": ["lastNotNull", "max"] if table else [],
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        **({"interval": "1m"} if bars else {}),
    )


def quantiles(metric: str, selector: str, *, by: str = "", legend: str = "") -> list[Json]:
    """Median, 90th and 99th percentile of a histogram."""
    group = f"le, {by}" if by else "le"
    return [
        target(
            f"histogram_quantile({q}, sum by ({group}) (rate({metric}_bucket{{{selector}}}{WINDOW})))",
            f"{legend}{name}",
        )
        for q, name in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))
    ]


def happened(metric: str, selector: str, window: str) -> str:
    """Increase of a counter whose events are rare and whose label values are not known beforehand. Such a series appears with
    its first event, which increase() alone never sees: it has no earlier value to compare with."""
    each = f"{metric}{{{selector}}}"
    return f"(({each} unless {each} offset {window}) or increase({each}[{window}]))"


def heatmap(title: str, description: str, expr: str, *, unit: str, width: int = 12, height: int = 8) -> Json:
    """A histogram over time: a column an instant, a row a bucket, the colour how many."""
    return panel(
        "heatmap",
        title,
        description,
        [target(expr, "{{le}}", format="heatmap")],
        size=(width, height),
        defaults={"unit": unit, "custom": {"scaleDistribution": {"type": "linear"}}},
        options={
            "calculate": False,
            "cellGap": 1,
            "cellValues": {"unit": "short"},
            "color": {
                "mode": "scheme",
                "scheme": "Oranges",
                "steps": 64,
                "reverse": False,
                "exponent": 0.5,
                "fill": "dark-orange",
            },
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "showValue": "never",
            "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": True},
            "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
        },
    )


def jobs_table(
    title: str, description: str, columns: dict[str, tuple[str, str]], *, link: str, height: int = 6
) -> Json:
    """A row for each job. columns: title -> (query, unit); the job's name leads to its dashboard."""
    names = {f"Value #{letter}": column for letter, column in zip("ABCDEFGH", columns, strict=False)}
    overrides = [override(column, ("unit", unit)) for column, (_, unit) in columns.items()]
    overrides.append(override("Job", ("links", [{"title": "Open this job", "url": link, "targetBlank": False}])))
    return panel(
        "table",
        title,
        description,
        [target(expr, instant=True, format="table") for expr, _ in columns.values()],
        size=(24, height),
        defaults={
            "unit": "none",
            "color": {"mode": "thresholds"},
            "thresholds": thresholds((None, "text")),
            "custom": {"align": "auto", "inspect": False},
            "noValue": "",
        },
        overrides=overrides,
        options={
            "frameIndex": 0,
            "showHeader": True,
            "cellHeight": "sm",
            "sortBy": [{"displayName": "Namespace", "desc": False}],
        },
        transformations=[
            {"id": "merge", "options": {}},
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Time": True},
                    "indexByName": {"namespace": 0, "job_name": 1},
                    "renameByName": {"namespace": "Namespace", "job_name": "Job", **names},
                },
            },
        ],
    )


def variable(name: str, label: str, description: str, query: str, *, many: bool = False) -> Json:
    result: Json = {
        "type": "query",
        "name": name,
        "label": label,
        "description": description,
        "datasource": DATASOURCE,
        "query": query,
        "definition": query,
        "refresh": 2,  # on every change of the time range
        "sort": 7 if many else 1,  # natural order: rank 10 after 9
        "multi": many,
        "includeAll": many,
        "hide": 0,
        "options": [],
        "regex": "",
        "skipUrlSync": False,
    }
    if many:
        result |= {"allValue": ".*", "current": {"selected": True, "text": ["All"], "value": ["$__all"]}}
    return result


def event(name: str, expr: str, color: str, *, text: str = "", on: bool = True) -> Json:
    """Marks in every panel wherever the query has a value."""
    return {
        "name": name,
        "datasource": DATASOURCE,
        "enable": on,
        "hide": False,
        "iconColor": color,
        "expr": expr,
        "titleFormat": name,
        "textFormat": text,
        "step": "15s",
    }


def link(title: str, url: str) -> Json:
    return {
        "title": title,
        "type": "link",
        "url": url,
        "icon": "dashboard",
        "tooltip": title,
        "tags": [],
        "asDropdown": False,
        "targetBlank": False,
        "includeVars": False,
        "keepTime": True,
    }


def flow(sections: list[tuple[str, list[Json]]]) -> list[Json]:
    """Gives every panel its place and id: sections from top to bottom, panels from left to right, 24 columns wide."""
    placed: list[Json] = []
    y = 0
    for title, panels in sections:
        row = {
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
        }
        placed.append(row)
        x, y, tallest = 0, y + 1, 0
        for each in panels:
            place = each["gridPos"]
            if x + place["w"] > 24:
                x, y, tallest = 0, y + tallest, 0
            place |= {"x": x, "y": y}
            x, tallest = x + place["w"], max(tallest, place["h"])
            placed.append(each)
        y += tallest
    for number, each in enumerate(placed, 1):
        each["id"] = number
    return placed


def dashboard(
    uid: str,
    title: str,
    description: str,
    *,
    variables: list[Json],
    events: list[Json],
    links: list[Json],
    sections: list[tuple[str, list[Json]]],
    span: str,
) -> Json:
    datasource = {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "description": "The Prometheus that scrapes the pods.",
        "query": "prometheus",
        "regex": "",
        "refresh": 1,
        "hide": 0,
        "multi": False,
        "includeAll": False,
        "options": [],
        "skipUrlSync": False,
    }
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["disttrain"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": f"now-{span}", "to": "now"},
        "timezone": "browser",
        "weekStart": "",
        "fiscalYearStartMonth": 0,
        "liveNow": False,
        "timepicker": {},
        "links": links,
        "templating": {"list": [datasource, *variables]},
        "annotations": {"list": events},
        "panels": flow(sections),
    }


# --- one job


def mean(expr: str, of: str) -> str:
    return f"{expr} / {of}"


def job() -> Json:
    steps = f"sum(rate(disttrain_steps_total{{{WORKERS}}}{WINDOW}))"
    phases = f"disttrain_step_phase_seconds_total{{{WORKERS}}}{WINDOW}"
    compute = f'disttrain_step_phase_seconds_total{{{RANKS},phase=~"data|forward|backward"}}{WINDOW}'
    goodput = f"increase(disttrain_goodput_seconds_total{{{JOB}}}[$__range])"
    productive = f'increase(disttrain_goodput_seconds_total{{{JOB},bucket="productive"}}[$__range])'
    # Each part alone may be empty: no steps before the first, no loss before the first.
    steps_made = f"(sum(increase(disttrain_steps_total{{{WORKERS}}}[5m])) > bool 0 or 0 * max(up{{{JOB}}}))"
    not_finite = f"(max(disttrain_loss{{{JOB}}} != bool disttrain_loss{{{JOB}}}) or vector(0))"
    state = f"clamp_max({steps_made} + 2 * {not_finite}, 2)"
    overview = [
        stat(
            "State",
            "Training: at least one step in the last 5 minutes. Waiting: pods answer, but no step was made: "
            "starting, recovering or stalled.",
            state,
            background=True,
            levels=thresholds((None, "blue")),
            mappings=[
                {
                    "type": "value",
                    "options": {
                        "0": {"text": "Waiting", "color": "orange", "index": 0},
                        "1": {"text": "Training", "color": "green", "index": 1},
                        "2": {"text": "Loss is NaN", "color": "red", "index": 2},
                    },
                }
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
        stat("Loss", "Mean of the ranks' last loss.", f"avg(disttrain_loss{{{WORKERS}}})", spark=True),
        stat(
            "Throughput",
            "Samples that all workers together train on, each second.",
            f"sum(rate(disttrain_samples_total{{{WORKERS}}}{WINDOW}))",
            unit=SAMPLES_PER_SECOND,
            decimals=0,
            spark=True,
        ),
        stat(
            "Workers",
            "Training processes that answer the scrape.",
            f"count(disttrain_step{{{WORKERS}}})",
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
            "The loss each rank reported last, and their mean. A rank that leaves the bundle reads other data or "
            "diverges.",
            target(f"disttrain_loss{{{RANKS}}}", "rank {{rank}}"),
            target(f"avg(disttrain_loss{{{WORKERS}}})", "mean"),
            unit="none",
            least=None,
            height=9,
            dashed="mean",
        ),
        series(
            "Step and checkpoint",
            "The global step, and the step that the newest complete checkpoint holds. Their distance is what a "
            "lost server or a restart of the job costs.",
            target(f"max(disttrain_step{{{JOB}}})", "step"),
            target(f"max(disttrain_checkpoint_last_step{{{JOB}}})", "checkpoint"),
            unit="none",
            height=9,
            dashed="checkpoint",
        ),
        series(
            "Throughput by rank",
            "Samples a second of each rank, stacked: the height is the throughput of the job.",
            target(f"sum by (rank) (rate(disttrain_samples_total{{{RANKS}}}{WINDOW}))", "rank {{rank}}"),
            unit=SAMPLES_PER_SECOND,
            stacked=True,
        ),
        series(
            "Gradient norm",
            "Norm of the gradient on each rank, on a logarithmic axis. Growing without end announces a loss of "
            "NaN; lower the learning rate or clip.",
            target(f"disttrain_gradient_norm{{{RANKS}}}", "rank {{rank}}"),
            unit="none",
            logarithmic=True,
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
                    f"sum by (role, rank) {happened('disttrain_checkpoint_duration_seconds_sum', JOB, '15m')}",
                    f"(sum by (role, rank) {happened('disttrain_checkpoint_duration_seconds_count', JOB, '15m')} > 0)",
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
            variable("namespace", "Namespace", "Namespace of the job.", "label_values(disttrain_step, namespace)"),
            variable(
                "job_name",
                "Job",
                "Name of the DistTrainJob.",
                'label_values(disttrain_step{namespace="$namespace"}, job_name)',
            ),
            variable(
                "rank",
                "Ranks",
                "Ranks shown in the panels by rank.",
                f"label_values(disttrain_step{{{WORKERS}}}, rank)",
                many=True,
            ),
        ],
        events=[
            event("Recovery", f"max(increase(disttrain_recoveries_total{{{JOB}}}[15s])) > 0", "orange"),
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


# --- the operator

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


def operator() -> Json:
    reconcile = "disttrain_operator_reconcile_duration_seconds"
    failed = f'{OPERATOR},result="Failed"'
    overview = [
        stat(
            "Operator",
            "Whether an operator answers and holds the lease. Jobs go on training without one, but nothing is "
            "repaired.",
            f"max(disttrain_operator_leader{{{OPERATOR}}})",
            background=True,
            levels=thresholds((None, "red"), (1, "green")),
            mappings=[
                {
                    "type": "value",
                    "options": {
                        "0": {"text": "No leader", "color": "red", "index": 0},
                        "1": {"text": "Leading", "color": "green", "index": 1},
                    },
                }
            ],
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
            f"sum({happened('disttrain_operator_jobs_finished_total', failed, '$__range')}) or vector(0)",
            decimals=0,
            levels=thresholds((None, "green"), (1, "red")),
        ),
        stat(
            "Restarts",
            "Pods that were replaced in the time shown.",
            f"sum({happened('disttrain_operator_restarts_total', OPERATOR, '$__range')}) or vector(0)",
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
            "Seconds since the quietest watch told something, or a resync found nothing to tell; a healthy one "
            "stays near the resync period of 60 s.",
            f"max(disttrain_operator_watch_age_seconds{{{OPERATOR}}})",
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
                f"sum by (result, reason) {happened('disttrain_operator_jobs_finished_total', OPERATOR, '$__rate_interval')}",
                "{{result}} {{reason}}",
            ),
            unit="none",
            bars=True,
            stacked=True,
        ),
        jobs_table(
            "Jobs",
            "Every job whose pods answer now. The name leads to the dashboard of the job.",
            {
                "Step": ('max by (namespace, job_name) (disttrain_step{job="disttrain-trainer"})', "none"),
                "Loss": (
                    'avg by (namespace, job_name) (disttrain_loss{job="disttrain-trainer",role="worker"})',
                    "none",
                ),
                "Samples/s": (
                    'sum by (namespace, job_name) (rate(disttrain_samples_total{job="disttrain-trainer",role="worker"}[$__rate_interval]))',
                    SAMPLES_PER_SECOND,
                ),
                "Workers": (
                    'count by (namespace, job_name) (disttrain_step{job="disttrain-trainer",role="worker"})',
                    "none",
                ),
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
                f"sum by (role, reason) {happened('disttrain_operator_restarts_total', OPERATOR, '$__rate_interval')}",
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
                    f"sum by (role) {happened('disttrain_operator_recovery_seconds_sum', OPERATOR, '15m')}",
                    f"sum by (role) {happened('disttrain_operator_recovery_seconds_count', OPERATOR, '15m')}",
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
                    f"sum by (phase) {happened('disttrain_operator_startup_seconds_sum', OPERATOR, '15m')}",
                    f"sum by (phase) {happened('disttrain_operator_startup_seconds_count', OPERATOR, '15m')}",
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
            "Seconds since each watch told something, or a resync found nothing to tell. One that grows past 5 "
            "minutes is dead.",
            target(f"max by (resource) (disttrain_operator_watch_age_seconds{{{OPERATOR}}})", "{{resource}}"),
            unit="s",
            width=8,
        ),
        series(
            "Missed by a watch",
            "Objects that a resync found changed and that the watch had not told of, each second. Anything but 0 "
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


def render() -> dict[str, str]:
    """File name -> content."""
    return {
        f"{name}.json": json.dumps(build(), indent=1, ensure_ascii=False) + "\n"
        for name, build in (("job", job), ("operator", operator))
    }


def main(arguments: list[str]) -> int:
    stale = [
        FOLDER / name
        for name, content in render().items()
        if not (FOLDER / name).exists() or (FOLDER / name).read_text(encoding="utf-8") != content
    ]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.name} is stale: run python deploy/monitoring/dashboards.py", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(exist_ok=True)
    for path in stale:
        path.write_text(render()[path.name], encoding="utf-8")
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
