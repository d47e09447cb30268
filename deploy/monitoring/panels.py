"""The parts of a Grafana dashboard as plain dicts: panels, variables, marks, and the layout that places them.

Shape: Grafana's classic dashboard schema, version 42 (Grafana 12). Not here: what is shown (job_dashboard.py, operator_dashboard.py).
"""

from typing import Any

Json = dict[str, Any]

SCHEMA_VERSION = 42
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WINDOW = "[$__rate_interval]"

SAMPLES_PER_SECOND = "suffix: samples/s"


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


def texts(*shown: tuple[str, str]) -> Json:
    """The mapping of the values 0, 1, 2 … to a text and a colour."""
    options = {str(value): {"text": text, "color": color, "index": value} for value, (text, color) in enumerate(shown)}
    return {"type": "value", "options": options}


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


def happened(metric: str, selector: str, window: str, *, process: str) -> str:
    """Increase of a counter whose events are rare and whose label values are not known beforehand.

    Such a series appears with its first event, which increase() alone never sees: it has no earlier value to compare with. All of it
    is new, unless it was there at every scrape of a process older than the window, as after a restart of Prometheus. process:
    selects the process's own series."""
    each = f"{metric}{{{selector}}}"
    seconds = {"$__range": "$__range_s", "$__rate_interval": "$__interval_ms / 1000", "15m": "900"}[window]
    old = (
        f"count_over_time({each}[{window}]) >= on (instance) group_left () sum_over_time(up{{{process}}}[{window}])"
        f" and on (instance) process_start_time_seconds{{{process}}} <= time() - {seconds}"
    )
    return f"(({each} unless ({old})) or increase({each}[{window}]))"


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
    """Marks in every panel wherever the query has a value. It is asked once a minute: for a week, Prometheus' retention, that is
    within the 11,000 points that it gives for a query. What lasts shorter has to be looked for over two minutes."""
    return {
        "name": name,
        "datasource": DATASOURCE,
        "enable": on,
        "hide": False,
        "iconColor": color,
        "expr": expr,
        "titleFormat": name,
        "textFormat": text,
        "step": "1m",
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


def mean(expr: str, of: str) -> str:
    return f"{expr} / {of}"
