"""A linter for the dashboards: what Grafana's schema says, what grafana/dashboard-linter asks for, and what both leave out.

Not here: whether the queries answer (tests/monitoring/test_dashboards.py, on a real Prometheus). No Grafana opens them in any test.
"""

import copy
import itertools
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from prometheus_client.metrics import MetricWrapperBase

from disttrain.api.names import Role
from disttrain.controller import metrics as operator_metrics
from disttrain_trainer.runtime import metrics as trainer_metrics
from monitoring.contract import METRICS, TRAINER_METRICS
from monitoring.grafana import DASHBOARDS, MONITORING, load, panels, targets

with warnings.catch_warnings():
    # It recommends the schema v2, which is experimental in Grafana 12: the classic one is meant.
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.models import dashboard as schema

Json = dict[str, Any]

CORE_PANELS = {"timeseries", "stat", "heatmap", "table", "row"}
"""Those of Grafana's own panels that we use; `graph` and other retired ones are not among them."""
UNITS = {value for name, value in vars(units).items() if not name.startswith("_") and isinstance(value, str)}
GLOBAL_VARIABLES = {"__rate_interval", "__interval", "__interval_ms", "__range", "__range_s"}
SERIES = {series: (name, metric) for name, metric in METRICS.items() for series in metric.names(name)}
OTHER_SERIES = {"up", "ALERTS", "process_start_time_seconds"}

each_dashboard = pytest.mark.parametrize("name", DASHBOARDS)


@pytest.fixture(scope="module", autouse=True)
def _panel_plugins() -> None:
    plugins.register_default_plugins()


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """What Grafana's typed model of a dashboard does not know, or reads otherwise."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            yield from lost(value, kept[name], f"{path}.{name}") if name in kept else iter([f"{path}.{name}"])
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif given != kept:
        yield path


def unknown_fields(dashboard: Json) -> list[str]:
    kept = json.loads(JSONEncoder().encode(schema.Dashboard.from_json(copy.deepcopy(dashboard))))
    return list(lost(dashboard, kept))


def variables(dashboard: Json) -> dict[str, Json]:
    return {variable["name"]: variable for variable in dashboard["templating"]["list"]}


def used_variables(text: str) -> set[str]:
    found = re.findall(r"\$(\w+)|\$\{([\w.]+)(?::\w+)?\}", text)
    return {first or second for first, second in found}


def series_of(expr: str) -> set[str]:
    """The names of the series in a query: words that are no function, label or value."""
    bare = re.sub(r'"[^"]*"', "", expr)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\{[^}]*\}", "{}", bare)
    return set(re.findall(r"\b(\w+)(?=\{)", bare))


def test_checked_in_dashboards_are_what_the_program_generates() -> None:
    done = subprocess.run(
        [sys.executable, MONITORING / "dashboards.py", "--check"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr


@each_dashboard
def test_grafanas_schema_knows_every_field(name: str) -> None:
    assert unknown_fields(load(name)) == []


@pytest.mark.parametrize("where", ["dashboard", "panel", "options", "custom", "target"])
def test_a_misspelt_field_would_be_seen(where: str) -> None:
    dashboard = load("job")
    panel = next(each for each in dashboard["panels"] if each["type"] == "timeseries")
    place = {
        "dashboard": dashboard,
        "panel": panel,
        "options": panel["options"],
        "custom": panel["fieldConfig"]["defaults"]["custom"],
        "target": panel["targets"][0],
    }[where]
    place["misspelt"] = 1
    assert [each.rpartition(".")[2] for each in unknown_fields(dashboard)] == ["misspelt"]


@each_dashboard
def test_dashboard_has_what_provisioning_and_links_need(name: str) -> None:
    dashboard = load(name)
    assert dashboard["uid"] == f"disttrain-{name}"
    assert "id" not in dashboard, "Grafana gives it"
    assert dashboard["schemaVersion"] == 42
    assert dashboard["editable"] is False
    assert dashboard["graphTooltip"] == 1
    assert dashboard["title"]
    assert dashboard["description"]
    assert "disttrain" in dashboard["tags"]


@each_dashboard
def test_panel_ids_are_unique_and_panels_lie_side_by_side_without_gaps_below_one_another(name: str) -> None:
    placed = load(name)["panels"]
    assert len({panel["id"] for panel in placed}) == len(placed)
    for panel in placed:
        place = panel["gridPos"]
        assert place["w"] > 0, panel["title"]
        assert place["h"] > 0, panel["title"]
        assert 0 <= place["x"] <= 24 - place["w"], panel["title"]
    for one, other in itertools.combinations(placed, 2):
        a, b = one["gridPos"], other["gridPos"]
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, f"{one['title']} and {other['title']} overlap"
    area = sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in placed)
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in placed)
    assert area == 24 * height, "a hole in the layout"


@each_dashboard
def test_panels_have_known_type_title_description_unit_and_the_templated_data_source(name: str) -> None:
    dashboard = load(name)
    assert {panel["type"] for panel in dashboard["panels"]} <= CORE_PANELS
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(titles) == len(set(titles))
    for panel in panels(dashboard):
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert len(panel["description"]) > 25, panel["title"]
        overridden = [
            each["value"]
            for override in panel["fieldConfig"]["overrides"]
            for each in override["properties"]
            if each["id"] == "unit"
        ]
        for unit in [panel["fieldConfig"]["defaults"]["unit"], *overridden]:
            assert unit in UNITS or re.fullmatch(r"suffix: .+", unit), f"{panel['title']}: {unit}"
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"], panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters))


@each_dashboard
def test_every_variable_that_is_used_exists_and_is_read_again_with_the_time_range(name: str) -> None:
    dashboard = load(name)
    known = variables(dashboard)
    queries = [target["expr"] for _, target in targets(dashboard)]
    queries += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    queries += [variable["query"] for variable in known.values()]
    for query in queries:
        assert used_variables(query) <= known.keys() | GLOBAL_VARIABLES, query
    assert known["datasource"]["type"] == "datasource"
    for variable in known.values():
        if variable["type"] == "query":
            assert variable["refresh"] == 2, variable["name"]
            assert variable["datasource"]["uid"] == "${datasource}", variable["name"]
            assert variable["query"] == variable["definition"], variable["name"]
            assert variable["label"], variable["name"]
    everything = " ".join(queries)
    assert [each for each in known if each != "datasource" and each not in used_variables(everything)] == [], "unused"


@each_dashboard
def test_links_lead_to_dashboards_and_variables_that_exist(name: str) -> None:
    text = DASHBOARDS[name].read_text()
    uids = {load(other)["uid"]: variables(load(other)) for other in DASHBOARDS}
    links = re.findall(r'"url": "/d/([\w-]+)\?([^"]*)"', text)
    assert links
    for uid, words in links:
        assert uid in uids
        for word in words.split("&"):
            assert word.partition("=")[0].removeprefix("var-") in uids[uid], word


@each_dashboard
def test_queries_pick_the_job_or_the_operator(name: str) -> None:
    for panel, target in targets(load(name)):
        if target["expr"].startswith("vector"):
            continue
        selectors = re.findall(r"\{([^}]*)\}", re.sub(r'"\{\{.*?\}\}"', "", target["expr"]))
        assert selectors, panel["title"]
        for selector in selectors:
            job = 'namespace="$namespace",job_name="$job_name"' in selector
            scrape_job = re.search(r'\bjob="disttrain-(operator|trainer)"', selector)
            assert job or scrape_job, f"{panel['title']}: {selector}"


@each_dashboard
def test_counters_are_shown_as_rates_or_increases_over_grafanas_interval(name: str) -> None:
    for panel, target in targets(load(name)):
        expr = target["expr"]
        assert not re.search(r"\birate\(", expr), panel["title"]
        for function, window in re.findall(r"\b(rate|increase)\([^\[]*\[([^\]]+)\]", expr):
            allowed = {"$__rate_interval"} | ({"$__range", "5m", "15m"} if function == "increase" else set())
            assert window in allowed, f"{panel['title']}: {function} over {window}"
        for series in series_of(expr) & SERIES.keys():
            _, metric = SERIES[series]
            if metric.kind in ("counter", "histogram"):
                assert re.search(rf"\b(rate|increase)\({series}\{{", expr), f"{panel['title']}: {series} is a counter"
            else:
                assert not re.search(rf"\b(rate|increase)\({series}\{{", expr), f"{panel['title']}: {series} is a gauge"


@each_dashboard
def test_queries_use_metrics_of_the_contract_only(name: str) -> None:
    for panel, target in targets(load(name)):
        names = series_of(target["expr"])
        assert names, panel["title"]
        assert names <= SERIES.keys() | OTHER_SERIES, panel["title"]


@each_dashboard
def test_legends_use_labels_that_the_metric_has(name: str) -> None:
    for panel, target in targets(load(name)):
        has = {"le", "namespace", "job_name", "role", "rank", "pod", "node", "instance", "job"}
        for series in series_of(target["expr"]) & SERIES.keys():
            has |= SERIES[series][1].labels
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= has, panel["title"]


@each_dashboard
def test_tables_rename_a_column_for_every_query(name: str) -> None:
    for panel in panels(load(name)):
        if panel["type"] == "table":
            (organize,) = [each["options"] for each in panel["transformations"] if each["id"] == "organize"]
            values = {f"Value #{target['refId']}" for target in panel["targets"]}
            assert values <= organize["renameByName"].keys()
            assert all(target["format"] == "table" and target["instant"] for target in panel["targets"])
            columns = set(organize["renameByName"].values())
            assert {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]} <= columns


def test_the_operator_exports_the_metrics_that_the_dashboards_show() -> None:
    exported = {}
    ours = [each for each in vars(operator_metrics).values() if isinstance(each, MetricWrapperBase)]
    for collector in [*ours, operator_metrics.JobsCollector(list)]:
        (family,) = collector.collect()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = getattr(collector, "_labelnames", None)
        if labels is None:
            labels = [label for sample in family.samples for label in sample.labels]
        exported[name] = (family.type, frozenset(labels))
    contract = {
        name: (metric.kind, metric.labels) for name, metric in METRICS.items() if name.startswith("disttrain_operator_")
    }
    assert {name: exported.get(name) for name in contract} == contract


UNCOUNTED = {
    "worker": ["disttrain_lost_steps_total"],
    "parameter-server": [f"disttrain_{name}_total" for name in ("steps", "samples", "lost_steps", "recoveries")],
}


@pytest.mark.parametrize("role", ["master", "parameter-server", "worker"])
def test_a_trainer_exports_the_metrics_that_the_dashboards_show(role: str) -> None:
    config = SimpleNamespace(
        namespace="demo",
        name="digits",
        attempt=1,
        world_size=4,
        strategy=SimpleNamespace(type=SimpleNamespace(value="DataParallel")),
    )
    process = trainer_metrics.Metrics(SimpleNamespace(config=config, role=Role(role), rank=0))
    for gauge in (
        "loss",
        "step",
        "epoch",
        "samples_per_second",
        "gradient_norm",
        "version",
        "checkpoint_step",
        "dropped_samples",
    ):
        setattr(process, gauge, 1)
    process.goodput_seconds, process.values = {"productive": 1.0}, {"accuracy": 1.0}
    process.evaluation, process.evaluation_step = {"accuracy": 1.0}, 1
    exported = {}
    for family in process.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert {"namespace", "job_name", "role", "rank"} <= labels, name
        exported[name] = (family.type, frozenset(labels - {"namespace", "job_name", "role", "rank"}))
    only = {
        "disttrain_step_": "worker",
        "disttrain_ps_staleness": "parameter-server",
        "disttrain_ps_late": "parameter-server",
    }
    contract = {
        name: (metric.kind, metric.labels)
        for name, metric in TRAINER_METRICS.items()
        if all(role == owner or not name.startswith(prefix) for prefix, owner in only.items())
    }
    # What a process does not count it leaves out: as 0 it would say that there is none.
    for name in UNCOUNTED.get(role, ()):
        del contract[name]
    assert exported == contract
