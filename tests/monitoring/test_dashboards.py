"""Every query of every panel, executed on a real Prometheus over a recorded run."""

import math
import re
from pathlib import Path

import pytest

from monitoring.contract import METRICS
from monitoring.grafana import DASHBOARDS, PICKED, fill, interval, load, targets
from monitoring.recording import DURATION, END, OTHERS, SCRIPT_SAMPLES, START, Process, Recording
from monitoring.server import Prometheus, QueryError, replay

QUERIES = [
    pytest.param(name, panel, target, id=f"{name}-{panel['title']}-{target['refId']}")
    for name in DASHBOARDS
    for panel, target in targets(load(name))
]
LEGEND_LABEL = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def run(server: Prometheus, name: str, panel: dict, target: dict) -> list[dict]:
    step = interval(panel)
    expr = fill(target["expr"], PICKED[name], seconds=DURATION, interval=step)
    if target["instant"]:
        return server.query(expr, time=END)
    return server.query_range(expr, start=START, end=END, step=step)


def numbers(series: dict) -> list[float]:
    points = series["values"] if "values" in series else [series["value"]]
    return [float(value) for _, value in points]


@pytest.mark.parametrize(("name", "panel", "target"), QUERIES)
def test_every_query_answers_with_data(replayed: Prometheus, name: str, panel: dict, target: dict) -> None:
    result = run(replayed, name, panel, target)
    assert result, f"nothing for {target['expr']}"
    finite = [value for series in result for value in numbers(series) if math.isfinite(value)]
    assert finite, "only NaN or infinity"
    wanted = set(LEGEND_LABEL.findall(target["legendFormat"])) - {"le"}
    if panel["type"] == "table":
        wanted = {"namespace", "job_name"}
    for series in result:
        assert wanted <= set(series["metric"]), (
            f"the legend {target['legendFormat']} needs labels that are not in {series['metric']}"
        )
    keys = [tuple(sorted(series["metric"].items())) for series in result]
    assert len(keys) == len(set(keys))
    if "{{" not in target["legendFormat"] and panel["type"] != "table":
        assert len(result) == 1, "several series and a legend that does not tell them apart"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_variable_finds_its_values(replayed: Prometheus, name: str) -> None:
    for variable in load(name)["templating"]["list"]:
        if variable["type"] == "query":
            matcher, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()
            found = replayed.label_values(label, fill(matcher, PICKED[name], seconds=DURATION), start=START, end=END)
            assert PICKED[name][variable["name"]] in found or (variable["multi"] and found), variable["name"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_annotation_parses(replayed: Prometheus, name: str) -> None:
    for annotation in load(name)["annotations"]["list"]:
        assert annotation["step"] == "1m"
        replayed.query_range(fill(annotation["expr"], PICKED[name], seconds=DURATION), start=START, end=END, step=60)


@pytest.mark.parametrize("scrape", [5, 15, 60])
def test_every_recovery_is_marked_whatever_the_scrape_interval(tmp_path: Path, scrape: int) -> None:
    master = Process({"namespace": "demo", "job_name": "digits", "role": "master", "rank": "0", "instance": "m:9400"})
    recording, recoveries = Recording(), [200, 500, 800]
    for since in range(0, DURATION, scrape):
        master.set("disttrain_recoveries_total", sum(when <= since for when in recoveries))
        recording.scrape(master, START + since)
    (expr,) = [each["expr"] for each in load("job")["annotations"]["list"] if each["name"] == "Recovery"]
    with replay(tmp_path, recording.openmetrics()) as server:
        (marks,) = server.query_range(fill(expr, PICKED["job"], seconds=DURATION), start=START + 7, end=END, step=60)
    minutes = [(int(when) - START) // 60 for when, _ in marks["values"]]
    for when in recoveries:
        assert {when // 60 + 1, when // 60 + 2} & set(minutes), f"none for {when} s: {minutes}"
    assert len(minutes) <= 3 * len(recoveries)


def test_a_job_without_parameter_servers_fills_all_other_panels(replayed: Prometheus) -> None:
    dashboard = load("job")
    empty = set()
    for panel, target in targets(dashboard):
        expr = fill(target["expr"], {"namespace": "research", "job_name": "chars", "rank": ".*"}, seconds=DURATION)
        if not replayed.query_range(expr, start=START, end=END):
            empty.add(panel["title"])
    assert empty == {"Staleness", "Version by server", "Late gradients"}


def filled(server: Prometheus, job_name: str) -> set[str]:
    """The panels that show a number for that job of the namespace research, at minute 8."""
    picked = {"namespace": "research", "job_name": job_name, "rank": ".*"}
    return {
        panel["title"]
        for panel, target in targets(load("job"))
        for series in server.query(fill(target["expr"], picked, seconds=480), time=START + 480)
        if math.isfinite(float(series["value"][1]))
    }


def test_a_script_that_reports_fills_what_its_master_can_tell(replayed: Prometheus) -> None:
    assert filled(replayed, "script") == {
        "State",
        "Step",
        "Loss",
        "Throughput",
        "Workers",
        "Recoveries",
        "Goodput",
        "Loss by rank",
        "Step and checkpoint",
        "Throughput by rank",
        "Recoveries and lost steps",
        "Where the time goes",
    }


def test_of_a_job_that_never_reports_nothing_is_made_up(replayed: Prometheus) -> None:
    assert filled(replayed, "command") == {"State", "Recoveries", "Recoveries and lost steps"}


@pytest.mark.parametrize(
    ("title", "value"),
    [("Throughput", SCRIPT_SAMPLES), ("Throughput by rank", SCRIPT_SAMPLES), ("Goodput", 1), ("Workers", 2)],
)
def test_the_numbers_of_a_script_are_those_of_its_master(replayed: Prometheus, title: str, value: float) -> None:
    picked = {"namespace": "research", "job_name": "script", "rank": ".*"}
    (expr,) = [target["expr"] for panel, target in targets(load("job")) if panel["title"] == title]
    (series,) = replayed.query(fill(expr, picked, seconds=480), time=START + 480)
    assert float(series["value"][1]) == pytest.approx(value)


def test_the_table_of_jobs_has_scripts_too(replayed: Prometheus) -> None:
    columns = {
        target["refId"]: {
            series["metric"]["job_name"]: float(series["value"][1])
            for series in replayed.query(fill(target["expr"], PICKED["operator"], seconds=480), time=START + 480)
        }
        for panel, target in targets(load("operator"))
        if panel["title"] == "Jobs"
    }
    step, loss, samples, workers, recoveries = columns.values()
    assert step["script"] == 46
    assert 0 < loss["script"] < 2.3
    assert samples["script"] == pytest.approx(SCRIPT_SAMPLES)
    assert workers["script"] == 2
    assert recoveries["script"] == recoveries["command"] == 0
    assert "command" not in {*step, *loss, *samples, *workers}


def test_a_misspelt_metric_and_a_syntax_error_would_be_seen(replayed: Prometheus) -> None:
    assert replayed.query_range("disttrain_los", start=START, end=END) == []
    with pytest.raises(QueryError, match="HTTP 400"):
        replayed.query_range("sum(disttrain_loss", start=START, end=END)


def ask(server: Prometheus, name: str, title: str, letter: str = "A") -> list[dict]:
    return next(
        run(server, name, panel, target)
        for panel, target in targets(load(name))
        if panel["title"] == title and target["refId"] == letter
    )


def test_loss_panel_shows_what_each_rank_reported(replayed: Prometheus, recording: Recording) -> None:
    result = ask(replayed, "job", "Loss by rank")
    assert sorted(series["metric"]["rank"] for series in result) == ["0", "1", "2", "3"]
    for series in result:
        rank = series["metric"]["rank"]
        truth = next(
            samples
            for (name, labels), samples in recording.truth.items()
            if name == "disttrain_loss" and {("job_name", "digits"), ("rank", rank)} <= set(labels)
        )
        shown = {int(float(when)): float(value) for when, value in series["values"]}
        assert all(shown[when] == truth[when] for when in shown if when in truth)
        assert len(set(shown) & set(truth)) > 60


def test_the_lost_worker_leaves_a_gap_in_the_worker_count(replayed: Prometheus) -> None:
    (series,) = ask(replayed, "job", "Workers")
    counts = {int(when) - START: float(value) for when, value in series["values"]}
    assert counts[285] == 4
    assert counts[330] == 3
    assert counts[360] == 4


def test_the_slow_rank_stands_out_in_own_work_by_rank(replayed: Prometheus) -> None:
    result = ask(replayed, "job", "Own work by rank")
    at = {series["metric"]["rank"]: dict(series["values"]) for series in result}
    middle = START + 600
    mean_of_others = sum(float(at[rank][middle]) for rank in "012") / 3
    assert float(at["3"][middle]) > 1.6 * mean_of_others


def test_the_phases_add_up_to_the_step(replayed: Prometheus) -> None:
    phases = ask(replayed, "job", "Step time by phase")
    assert {series["metric"]["phase"] for series in phases} == {
        "data",
        "forward",
        "backward",
        "communicate",
        "optimize",
        "checkpoint",
    }
    when = START + 1080
    total = sum(float(dict(series["values"])[when]) for series in phases)
    (mean,) = replayed.query(
        'sum(rate(disttrain_step_duration_seconds_sum{job_name="digits"}[20s]))'
        ' / sum(rate(disttrain_step_duration_seconds_count{job_name="digits"}[20s]))',
        time=when,
    )
    assert total == pytest.approx(float(mean["value"][1]), rel=0.05)


@pytest.mark.parametrize(
    ("namespace", "job_name", "seconds", "state"),
    [
        pytest.param("demo", "digits", 10, 0, id="no report before the first step"),
        pytest.param("demo", "digits", 60, 2, id="training"),
        pytest.param("research", "diverged", 600, 2, id="training before its loss is lost"),
        pytest.param("research", "diverged", 1000, 3, id="loss is NaN"),
        pytest.param("research", "script", 15, 0, id="no report yet of a script"),
        pytest.param("research", "script", 30, 2, id="training from the first report"),
        pytest.param("research", "script", 600, 2, id="training as long as the script reports steps"),
        pytest.param("research", "script", 960, 1, id="waiting 5 minutes after the last step"),
        pytest.param("research", "command", 600, 0, id="no report of a command"),
    ],
)
def test_state_tells_training_from_waiting_from_a_lost_loss(
    replayed: Prometheus, namespace: str, job_name: str, seconds: int, state: int
) -> None:
    expr = next(target["expr"] for panel, target in targets(load("job")) if panel["title"] == "State")
    (series,) = replayed.query(
        fill(expr, {"namespace": namespace, "job_name": job_name}, seconds=DURATION), time=START + seconds
    )
    assert float(series["value"][1]) == state


@pytest.mark.parametrize(("title", "count"), [("Restarts", 2), ("Failed", 1), ("Errors", 2)])
def test_the_first_event_of_its_kind_is_counted(replayed: Prometheus, title: str, count: int) -> None:
    (series,) = ask(replayed, "operator", title)
    assert float(series["value"][1]) == pytest.approx(count, rel=0.05)


def test_what_an_operator_counted_before_the_first_scrape_is_not_shown_as_new(tmp_path: Path) -> None:
    """As after a restart of Prometheus, whose store ends with its pod. A process that is new itself has nothing old to tell."""
    recording = Recording()
    for pod, age in (("old", 86_400), ("new", -10)):
        where = {"job": "disttrain-operator", "namespace": "disttrain-system", "pod": pod, "instance": f"{pod}:8080"}
        operator = Process(where)
        operator.set("process_start_time_seconds", START - age)
        operator.set("disttrain_operator_jobs_finished_total", 5, result="Failed", reason=pod)
        for since in range(15, DURATION + 1, 15):
            if since == 600:
                operator.set("disttrain_operator_jobs_finished_total", 1, result="Failed", reason="later")
            recording.scrape(operator, START + since)
    with replay(tmp_path, recording.openmetrics()) as server:
        (failed,) = ask(server, "operator", "Failed")
        bars = ask(server, "operator", "Finished jobs")
    assert float(failed["value"][1]) == 5 + 2
    shown = {(series["metric"]["reason"]): sum(numbers(series)) for series in bars}
    assert shown["old"] == 0
    assert shown["new"] == 5
    assert shown["later"] == 2


def test_the_watches_of_an_operator_that_waits_do_not_count(tmp_path: Path) -> None:
    recording = Recording()
    for pod, leads, age in (("first", 1, 12), ("second", 0, 9000)):
        operator = Process({"job": "disttrain-operator", "namespace": "disttrain-system", "pod": pod, "instance": pod})
        operator.set("disttrain_operator_leader", leads)
        operator.set("disttrain_operator_watch_age_seconds", age, resource="pods")
        recording.scrape(operator, END)
    with replay(tmp_path, recording.openmetrics()) as server:
        for title in ("Oldest watch", "Age of the watches"):
            (series,) = ask(server, "operator", title)
            assert numbers(series) == [12], title


@pytest.mark.parametrize(("title", "total"), [("Finished jobs", 3), ("Restarts by cause", 2)])
def test_an_event_is_in_one_bar(replayed: Prometheus, title: str, total: int) -> None:
    bars = [value for series in ask(replayed, "operator", title) for value in numbers(series) if value > 0.5]
    assert sum(map(round, bars)) == total


def test_every_metric_of_the_contract_is_recorded(recording: Recording) -> None:
    assert recording.families == METRICS.keys() | {*OTHERS}


def test_every_metric_of_the_contract_is_shown_somewhere() -> None:
    shown = " ".join(target["expr"] for name in DASHBOARDS for _, target in targets(load(name)))
    unseen = {name for name in METRICS if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", shown)}
    # Throughput is drawn from the counter, which is exact.
    assert unseen == {"disttrain_samples_per_second"}
