"""A real training on this machine, scraped by a real Prometheus: what its processes export fills the dashboard of the job."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from monitoring.grafana import MONITORING, fill, load, targets
from monitoring.server import Prometheus, prometheus

ROOT = MONITORING.parents[1]
PICKED = {"namespace": "default", "job_name": "digits-ps", "rank": ".*"}
MINUTE = 60
WITHOUT_EVENTS = {"Checkpoint duration", "Values of the loss", "Samples left out"}
"""Panels that may have nothing to show in so short a run, or of this job."""


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield int(child)
            yield from descendants(int(child))


def training_processes(pid: int) -> list[dict[str, str]]:
    """The environment of each role; that of a launcher is its process's, too."""
    found = {}
    for child in descendants(pid):
        try:
            pairs = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        environment = dict(pair.partition("=")[::2] for pair in pairs if "=" in pair)
        if "DISTTRAIN_METRICS_PORT" in environment:
            found[environment["DISTTRAIN_METRICS_PORT"]] = environment
    return [*found.values()]


def discovered(process: dict[str, str]) -> dict:
    """The target, as Prometheus finds it on a cluster."""
    role, index = process["DISTTRAIN_ROLE"], process["DISTTRAIN_INDEX"]
    labels = {
        "namespace": PICKED["namespace"],
        "pod_name": f"digits-ps-{role}-{index}",
        "pod_node_name": "here",
        "pod_phase": "Running",
        "pod_container_name": "trainer",
        "pod_container_port_name": "metrics",
        "pod_label_disttrain_dev_job_name": PICKED["job_name"],
        "pod_label_disttrain_dev_role": role,
        "pod_label_disttrain_dev_index": index,
    }
    target = f"127.0.0.1:{process['DISTTRAIN_METRICS_PORT']}"
    return {"targets": [target], "labels": {f"__meta_kubernetes_{name}": value for name, value in labels.items()}}


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, str]]]:
    """Its processes, which train until the tests are done."""
    folder = tmp_path_factory.mktemp("training")
    example = (ROOT / "examples" / "digits-ps.yaml").read_text()
    endless, changes = re.subn(r"epochs: \d+", "epochs: 1000000\n    evaluateEverySteps: 100", example)
    assert changes == 1
    (folder / "job.yaml").write_text(endless)
    command = [Path(sys.executable).with_name("disttrain"), "run", "job.yaml"]
    with (folder / "log").open("wb") as log:
        run = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while len(processes := training_processes(run.pid)) < 5:
            assert run.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield processes
    finally:
        run.terminate()  # not SIGINT: tests that run in the background ignore that
        try:
            assert run.wait(60) == 130, (folder / "log").read_text()
        finally:
            run.kill()


@pytest.fixture(scope="module")
def scraped(training: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Once every process was scraped often enough for a rate."""
    folder = tmp_path_factory.mktemp("scraped")
    config = yaml.safe_load((MONITORING / "prometheus" / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s"}
    config["rule_files"] = []
    (scrape,) = [each for each in config["scrape_configs"] if each["job_name"] == "disttrain-trainer"]
    del scrape["kubernetes_sd_configs"]
    scrape["file_sd_configs"] = [{"files": [str(folder / "targets.json")]}]
    config["scrape_configs"] = [scrape]
    (folder / "targets.json").write_text(json.dumps([discovered(process) for process in training]))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with prometheus(folder, folder / "prometheus.yml") as server:
        eventually(server, 'max(disttrain_step{role="worker"}) > 200')
        eventually(server, f"count(sum_over_time(up[1m]) >= 10) == {len(training)}")
        eventually(server, "max(disttrain_evaluation_step) > 0")
        yield server


def eventually(server: Prometheus, condition: str) -> None:
    """Waits until the query has an answer."""
    deadline = time.monotonic() + 60
    while not server.query(condition, time=int(time.time()) + 1):
        assert time.monotonic() < deadline, f"{condition}; targets: {server.targets()}"
        time.sleep(0.5)


def test_every_process_of_the_job_answers_the_scrape(scraped: Prometheus, training: list[dict[str, str]]) -> None:
    # On a busy machine a scrape may take too long: not every one has to succeed.
    up = scraped.query('max_over_time(up{job="disttrain-trainer"}[10s]) == 1', time=int(time.time()) + 1)
    assert len(up) == len(training) == 5


def test_a_real_training_fills_the_dashboard(scraped: Prometheus) -> None:
    now = int(time.time())
    empty = set()
    for panel, target in targets(load("job")):
        expr = fill(target["expr"], PICKED, seconds=MINUTE, interval=5, scrape=1)
        result = scraped.query_range(expr, start=now - MINUTE, end=now, step=5)
        if not [value for series in result for _, value in series["values"] if value != "NaN"]:
            empty.add(panel["title"])
    assert empty <= WITHOUT_EVENTS


def test_the_samples_of_the_workers_are_those_of_the_masters_steps(scraped: Prometheus) -> None:
    """From the start on, so that the moments between two scrapes and between two reports weigh less and less."""
    samples, steps = 'sum(disttrain_samples_total{role="worker"})', 'max(disttrain_step{role="master"})'
    epoch = "1437 / 23"  # samples and steps of one over the digits
    eventually(scraped, f"abs({samples} / {steps} / ({epoch}) - 1) < 0.02")
    assert scraped.query('disttrain_samples_total{role="master"}', time=int(time.time()) + 1) == [], "counted twice"
