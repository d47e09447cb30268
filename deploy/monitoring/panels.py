"""The parts of a Grafana dashboard, made with Grafana's own builders: panels, variables, marks, links.

A field that Grafana does not know cannot be written. Not here: what is shown (job_dashboard.py, operator_dashboard.py).
"""

import warnings
from typing import Any

with warnings.catch_warnings():
    # It recommends the schema v2, which is experimental in Grafana 12: the classic one is meant.
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.builders import common, prometheus, timeseries
    from grafana_foundation_sdk.builders import dashboard as build
    from grafana_foundation_sdk.builders import heatmap as heatmaps
    from grafana_foundation_sdk.builders import stat as stats
    from grafana_foundation_sdk.builders import table as tables
    from grafana_foundation_sdk.models import common as kinds
    from grafana_foundation_sdk.models import dashboard as models
    from grafana_foundation_sdk.models import heatmap as heatmap_kinds
    from grafana_foundation_sdk.models.prometheus import PromQueryFormat, QueryEditorMode

Query = prometheus.Dataquery
Panel = stats.Panel | timeseries.Panel | heatmaps.Panel | tables.Panel
Levels = build.ThresholdsConfig
Dashboard = models.Dashboard

DATASOURCE = kinds.DataSourceRef(type_val="prometheus", uid="${datasource}")
WINDOW = "[$__rate_interval]"

SAMPLES_PER_SECOND = "suffix: samples/s"


def target(expr: str, legend: str = "__auto", *, instant: bool = False, format: str = "time_series") -> Query:
    """One PromQL query."""
    query = Query().datasource(DATASOURCE).editor_mode(QueryEditorMode.CODE).expr(expr).legend_format(legend)
    query = query.format(PromQueryFormat(format))
    return query.instant() if instant else query.range()


def fill(panel: Any, title: str, description: str, targets: list[Query], *, size: tuple[int, int], unit: str) -> Any:
    """What every panel has. size: width in 24ths of the dashboard, and height."""
    for letter, each in zip("ABCDEFGH", targets, strict=False):
        panel = panel.with_target(each.ref_id(letter))
    panel = panel.title(title).description(description).datasource(DATASOURCE)
    return panel.span(size[0]).height(size[1]).unit(unit)


def thresholds(*steps: tuple[float | None, str]) -> Levels:
    levels = [models.Threshold(value=value, color=color) for value, color in steps]
    return Levels().mode(models.ThresholdsMode.ABSOLUTE).steps(levels)


def texts(*shown: tuple[str, str]) -> models.ValueMap:
    """The mapping of the values 0, 1, 2 … to a text and a colour."""
    return models.ValueMap(
        {
            str(value): models.ValueMappingResult(text=text, color=color, index=value)
            for value, (text, color) in enumerate(shown)
        }
    )


def override(panel: Any, field: str, *properties: tuple[str, Any]) -> Any:
    """The panel with other properties for the curve or column of that name."""
    return panel.override_by_name(
        field, [models.DynamicConfigValue(id_val=name, value=value) for name, value in properties]
    )


def stat(
    title: str,
    description: str,
    expr: str,
    *,
    unit: str = "none",
    decimals: int | None = None,
    width: int = 3,
    levels: Levels | None = None,
    mappings: list[models.ValueMap] | None = None,
    spark: bool = False,
    background: bool = False,
    legend: str = "__auto",
    text: str = "auto",
) -> stats.Panel:
    """One number now. spark: with its course behind it."""
    panel: stats.Panel = (
        fill(stats.Panel(), title, description, [target(expr, legend, instant=not spark)], size=(width, 4), unit=unit)
        .color_scheme(build.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        .thresholds(levels or thresholds((None, "text")))
        .mappings(mappings or [])
        .no_value("no data")
        .color_mode(kinds.BigValueColorMode.BACKGROUND if background else kinds.BigValueColorMode.VALUE)
        .graph_mode(kinds.BigValueGraphMode.AREA if spark else kinds.BigValueGraphMode.NONE)
        .justify_mode(kinds.BigValueJustifyMode.CENTER)
        .orientation(kinds.VizOrientation.AUTO)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
        .percent_change_color_mode(kinds.PercentChangeColorMode.STANDARD)
        .text_mode(kinds.BigValueTextMode(text))
    )
    return panel if decimals is None else panel.decimals(decimals)


def series(
    title: str,
    description: str,
    *targets: Query,
    unit: str,
    width: int = 12,
    height: int = 8,
    stacked: bool = False,
    bars: bool = False,
    steps: bool = False,
    least: float | None = 0,
    most: float | None = None,
    levels: Levels | None = None,
    logarithmic: bool = False,
    dashed: str | None = None,
    right: str | None = None,
    colors: dict[str, str] | None = None,
    table: bool = False,
) -> timeseries.Panel:
    """Curves over time. dashed: the legend of a curve that is a reference for the others. right: of one with an axis of its
    own. bars: for counts of rare events; each bar is a minute or more, so that an event is in one bar. table: the legend with
    last and maximum."""
    scale = common.ScaleDistributionConfig()
    legend = common.VizLegendOptions().show_legend(True)
    if table:
        legend = legend.display_mode(kinds.LegendDisplayMode.TABLE).placement(kinds.LegendPlacement.RIGHT)
    panel: timeseries.Panel = (
        fill(timeseries.Panel(), title, description, list(targets), size=(width, height), unit=unit)
        .color_scheme(build.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC))
        .thresholds(levels or thresholds((None, "green")))
        .thresholds_style(
            common.GraphThresholdsStyleConfig().mode(
                kinds.GraphThresholdsStyleMode.LINE if levels else kinds.GraphThresholdsStyleMode.OFF
            )
        )
        .draw_style(kinds.GraphDrawStyle.BARS if bars else kinds.GraphDrawStyle.LINE)
        .line_interpolation(kinds.LineInterpolation.STEP_AFTER if steps else kinds.LineInterpolation.LINEAR)
        .line_width(0 if stacked and not bars else 1)
        .fill_opacity(70 if stacked or bars else 6)
        .show_points(kinds.VisibilityMode.NEVER)
        .span_nulls(False)
        .stacking(
            common.StackingConfig().mode(kinds.StackingMode.NORMAL if stacked else kinds.StackingMode.NONE).group("A")
        )
        .scale_distribution(
            scale.type(kinds.ScaleDistribution.LOG).log(10)
            if logarithmic
            else scale.type(kinds.ScaleDistribution.LINEAR)
        )
        .legend(legend.calcs(["lastNotNull", "max"] if table else []))
        .tooltip(common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING))
    )
    if least is not None and not logarithmic:
        panel = panel.min(least)
    if most is not None:
        panel = panel.max(most)
    if bars:
        panel = panel.decimals(0).interval("1m")
    if dashed is not None:
        line = {"fill": "dash", "dash": [8, 6]}
        grey = ("color", {"mode": "fixed", "fixedColor": "text"})
        panel = override(panel, dashed, ("custom.lineStyle", line), ("custom.fillOpacity", 0), grey)
    if right is not None:
        panel = override(panel, right, ("custom.axisPlacement", "right"), ("min", 0))
    for name, color in (colors or {}).items():
        panel = override(panel, name, ("color", {"mode": "fixed", "fixedColor": color}))
    return panel


def quantiles(metric: str, selector: str, *, by: str = "", legend: str = "") -> list[Query]:
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


def heatmap(title: str, description: str, expr: str, *, unit: str, width: int = 12, height: int = 8) -> heatmaps.Panel:
    """A histogram over time: a column an instant, a row a bucket, the colour how many."""
    queries = [target(expr, "{{le}}", format="heatmap")]
    panel: heatmaps.Panel = (
        fill(heatmaps.Panel(), title, description, queries, size=(width, height), unit=unit)
        .color(
            heatmaps.HeatmapColorOptions()
            .mode(heatmap_kinds.HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .steps(64)
            .exponent(0.5)
            .fill("dark-orange")
        )
        .cell_values(heatmaps.CellValues().unit("short"))
        .filter_values(heatmaps.FilterValueRange().le(1e-9))
        .rows_frame(heatmaps.RowsHeatmapOptions().layout(kinds.HeatmapCellLayout.AUTO))
        .show_value(kinds.VisibilityMode.NEVER)
        .tooltip(heatmaps.HeatmapTooltip().mode(kinds.TooltipDisplayMode.SINGLE).show_color_scale(True))
        .y_axis(heatmaps.YAxisConfig().axis_placement(kinds.AxisPlacement.LEFT).unit(unit))
    )
    return panel


def jobs_table(
    title: str, description: str, columns: dict[str, tuple[str, str]], *, link: str, height: int = 6
) -> tables.Panel:
    """A row for each job. columns: title -> (query, unit); the job's name leads to its dashboard."""
    names = {f"Value #{letter}": column for letter, column in zip("ABCDEFGH", columns, strict=False)}
    organize = {
        "excludeByName": {"Time": True},
        "indexByName": {"namespace": 0, "job_name": 1},
        "renameByName": {"namespace": "Namespace", "job_name": "Job", **names},
    }
    queries = [target(expr, instant=True, format="table") for expr, _ in columns.values()]
    panel: tables.Panel = (
        fill(tables.Panel(), title, description, queries, size=(24, height), unit="none")
        .color_scheme(build.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        .thresholds(thresholds((None, "text")))
        .no_value("")
        .cell_height(kinds.TableCellHeight.SM)
        .sort_by([common.TableSortByFieldState().display_name("Namespace").desc(False)])
        .with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(models.DataTransformerConfig(id_val="organize", options=organize))
    )
    for column, (_, unit) in columns.items():
        panel = override(panel, column, ("unit", unit))
    return override(panel, "Job", ("links", [{"title": "Open this job", "url": link, "targetBlank": False}]))


def variable(name: str, label: str, description: str, query: str, *, many: bool = False) -> build.QueryVariable:
    found = (
        build.QueryVariable(name)
        .label(label)
        .description(description)
        .datasource(DATASOURCE)
        .query(query)
        .definition(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        # In natural order, rank 10 comes after 9.
        .sort(models.VariableSort.NATURAL_ASC if many else models.VariableSort.ALPHABETICAL_ASC)
        .multi(many)
        .include_all(many)
    )
    if many:
        found = found.all_value(".*").current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    return found


def event(name: str, expr: str, color: str, *, text: str = "", on: bool = True) -> build.AnnotationQuery:
    """Marks in every panel where the query has a value. It is asked once a minute: for a week, Prometheus' retention, that is
    within the 11,000 points that it gives for a query. What lasts shorter has to be looked for over two minutes."""
    query = build.AnnotationQuery().name(name).datasource(DATASOURCE).enable(on).icon_color(color)
    return query.expr(expr).title_format(name).text_format(text).step("1m")


def link(title: str, url: str) -> build.DashboardLink:
    found = build.DashboardLink(title).type(models.DashboardLinkType.LINK).url(url)
    return found.icon("dashboard").tooltip(title).keep_time(True)


def dashboard(
    uid: str,
    title: str,
    description: str,
    *,
    variables: list[build.QueryVariable],
    events: list[build.AnnotationQuery],
    links: list[build.DashboardLink],
    sections: list[tuple[str, list[Panel]]],
    span: str,
) -> Dashboard:
    """The sections lie one below another, the panels of each from left to right."""
    datasource = build.DatasourceVariable("datasource").label("Data source").type("prometheus")
    found = (
        build.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["disttrain"])
        .version(1)
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("5s")
        .time(f"now-{span}", "now")
        .timezone("browser")
        .variables([datasource.description("The Prometheus that scrapes the pods."), *variables])
        .annotations(events)
        .links(links)
    )
    number = 0
    for section, panels in sections:
        found = found.with_row(build.Row(section).id(number := number + 1))
        for panel in panels:
            found = found.with_panel(panel.id(number := number + 1))
    made = found.build()
    for each in [*made.annotations.list_val, *made.links]:
        each.placement = None  # the builders put both into a menu; they belong above the panels
    return made


def mean(expr: str, of: str) -> str:
    return f"{expr} / {of}"
