"""What each figure of a training claims, held against a count that does not come from the training itself."""

import json
import os
import signal
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.processes import wait_for
from disttrain.api import environment
from disttrain.api.names import API_VERSION, KIND, Role
from local_runs.command import Started, environment_of
from training.job import Job, served

MINE = """
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

SAMPLES, SIZE = 96, 101
DATA = torch.randn(SAMPLES, SIZE, generator=torch.Generator().manual_seed(7))

class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE))
        self.bias = nn.Parameter(torch.zeros(1))

def model(config):
    return Linear()

def dataset(config, split):
    return TensorDataset(DATA)

def loss(model, batch):
    time.sleep(0.002)
    (x,) = batch
    return (x @ model.weight).mean() + 2 * model.bias.sum()

def evaluate(model, config):
    while not Path("go").exists() and len(config) > 2:
        time.sleep(0.02)
    return {"accuracy": 1.0}
"""
TRAINER = {
    "model": "mine:model",
    "dataset": "mine:dataset",
    "loss": "mine:loss",
    "evaluate": "mine:evaluate",
    "optimizer": {"name": "SGD", "learningRate": 0.0001},
}
SAMPLES, EPOCHS, WORKERS = 96, 20, 2
Figures = dict[str, dict[str, float]]
"""By the name of the sample, and by what else its labels say."""


def figures(port: int) -> Figures:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found: Figures = defaultdict(dict)
    for sample in (sample for family in families for sample in family.samples):
        labels = {name: value for name, value in sample.labels.items() if name in ("phase", "bucket", "direction")}
        found[sample.name]["".join(labels.values())] = sample.value
    return found


class Watched(Job):
    """A job of which every process has a metrics port."""

    def __init__(self, *, folder: Path, fields: dict[str, Any], trainer: dict[str, Any]) -> None:
        (folder / "mine.py").write_text(MINE)
        spec = {"worker": {"replicas": WORKERS}, **fields, "trainer": {**TRAINER, **trainer}}
        super().__init__(folder=folder, spec=spec)
        self._ports: dict[tuple[Role, int], int] = defaultdict(self.free_port)

    def environment(self, role: Role, index: int) -> dict[str, str]:
        if role is Role.MASTER:
            return super().environment(role, index)
        return super().environment(role, index) | {environment.METRICS_PORT: str(self._ports[role, index])}

    def figures(self, role: Role, index: int = 0) -> Figures:
        return figures(self.metrics_port if role is Role.MASTER else self._ports[role, index])

    def until_figures(self, what: str, right: Callable[[Figures], bool], role: Role, index: int = 0) -> Figures:
        def found() -> Figures | None:
            figures = self.figures(role, index)
            return figures if right(figures) else None

        return wait_for(what, found, 30, every=0.05)


STRATEGIES = [
    pytest.param({"strategy": {"type": "DataParallel"}}, id="DataParallel"),
    pytest.param(served("Sync"), id="Sync"),
    pytest.param(served("Async"), id="Async"),
]


@pytest.mark.parametrize("fields", STRATEGIES)
def test_the_counters_of_a_whole_training_are_its_samples_its_steps_and_its_time(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    with Watched(folder=tmp_path, fields=fields, trainer={"batchSize": 16, "epochs": EPOCHS}) as job:
        job.start()
        steps = EPOCHS * SAMPLES // 16
        job.until(lambda progress: progress.step == steps)

        def total(workers: list[Figures], name: str) -> float:
            return sum(worker[name][""] for worker in workers)

        def all_counted() -> list[Figures] | None:
            found = [job.figures(Role.WORKER, index) for index in range(WORKERS)]
            samples = total(found, "disttrain_samples_total")
            assert samples <= EPOCHS * SAMPLES, "no sample is counted twice"
            return found if samples == EPOCHS * SAMPLES else None

        workers = wait_for("all samples to be counted", all_counted, 30, every=0.05)
        assert total(workers, "disttrain_steps_total") == steps * WORKERS
        for worker in workers:
            assert worker["disttrain_step_duration_seconds_count"][""] == worker["disttrain_steps_total"][""]
            phases, whole = (
                worker["disttrain_step_phase_seconds_total"],
                worker["disttrain_step_duration_seconds_sum"][""],
            )
            assert sum(phases.values()) - phases["checkpoint"] == pytest.approx(whole, rel=0.05)
            assert phases["forward"] > 0.002 * worker["disttrain_steps_total"][""], "the loss sleeps 2 ms"
            assert 0 < worker["disttrain_step"][""] <= steps, "of the part that it computed last"
            assert 0 < worker["disttrain_epoch"][""] <= EPOCHS
            assert worker["disttrain_recoveries_total"][""] == 0
            assert "disttrain_lost_steps_total" not in worker, "only the master knows"
        master = job.figures(Role.MASTER)
        assert (master["disttrain_step"][""], master["disttrain_epoch"][""]) == (steps, EPOCHS)
        assert master["disttrain_lost_steps_total"][""] == master["disttrain_recoveries_total"][""] == 0
        if job.config.parameter_servers:
            server = job.figures(Role.PARAMETER_SERVER)
            assert not server.keys() & {
                "disttrain_steps_total",
                "disttrain_samples_total",
                "disttrain_lost_steps_total",
            }
            versions = steps if "Sync" in str(fields) else steps * WORKERS
            assert server["disttrain_ps_version"][""] == versions
            assert server["disttrain_ps_staleness_steps_count"][""] == steps * WORKERS
        (tmp_path / "go").touch()
        assert job.supervise() == 0


@pytest.mark.parametrize("clip", [{}, {"maxGradientNorm": 0.01}], ids=["", "clipped"])
@pytest.mark.parametrize("fields", STRATEGIES[:2])
def test_the_gradient_norm_is_that_of_the_gradient_of_the_whole_step_before_the_clip(
    tmp_path: Path, fields: dict[str, Any], clip: dict[str, Any]
) -> None:
    space: dict[str, Any] = {}
    exec(MINE, space)
    whole = float((space["DATA"].mean(0).square().sum() + 4).sqrt())  # of the mean over all samples; the bias has 2
    trainer = {"batchSize": SAMPLES, "epochs": 100_000, **clip}
    with Watched(folder=tmp_path, fields=fields, trainer=trainer) as job:
        job.start()
        who = Role.MASTER if job.config.parameter_servers else Role.WORKER
        figures = job.until_figures("a gradient norm", lambda figures: "disttrain_gradient_norm" in figures, who)
        assert figures["disttrain_gradient_norm"][""] == pytest.approx(whole, rel=1e-4)
        if job.config.parameter_servers:
            assert "disttrain_gradient_norm" not in job.figures(Role.WORKER), "it knows the gradient of its part only"


def test_a_worker_that_stands_still_has_no_speed(tmp_path: Path) -> None:
    fields = {"strategy": {"type": "DataParallel"}}
    with Watched(folder=tmp_path, fields=fields, trainer={"batchSize": 16, "epochs": 100_000}) as job:
        job.start()
        rate = "disttrain_samples_per_second"
        before = job.until_figures("a speed", lambda figures: bool(figures[rate]), Role.WORKER)[rate][""]
        job.kill(Role.WORKER, 1, signal.SIGSTOP)
        job.until_figures("no speed", lambda figures: figures[rate][""] < before / 5, Role.WORKER)


def test_status_and_prometheus_say_the_same_of_where_the_time_went(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    spec = {**served("Sync"), "worker": {"replicas": WORKERS}, "trainer": {**TRAINER, "batchSize": 16, "epochs": 150}}
    job = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "figures"}, "spec": spec}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    started = Started(tmp_path, "job.yaml", "-o", "json")
    try:
        master = started.pid("master-0")
        port = int(environment_of(master)[environment.METRICS_PORT])

        def done() -> Figures | None:
            found = figures(port)
            return found if found["disttrain_step"].get("") == 150 * SAMPLES // 16 else None

        wait_for("the first steps", lambda: figures(port)["disttrain_step"].get("", 0) > 50, 60, every=0.1)
        os.kill(started.pid("worker-1"), signal.SIGKILL)
        wait_for("the last step", done, 60, every=0.1)
        prometheus = figures(port)["disttrain_goodput_seconds_total"]
    finally:
        (tmp_path / "go").touch()
        finished = started.finish()
    status = finished.job["status"]
    reported = {bucket: status["goodput"]["master"][f"{bucket}Seconds"] for bucket in prometheus}
    assert reported == pytest.approx(prometheus, abs=2), "the evaluation was not over when Prometheus looked"
    goodput = {name: value for name, value in status["goodput"].items() if name.endswith("Seconds")}
    began, ended = (datetime.fromisoformat(status[name]) for name in ("startTime", "completionTime"))
    assert sum(goodput.values()) == (ended - began).total_seconds(), "every second is in one bucket"
    # The time without a master, before it and between its end and the job's, is that of the state.
    assert {bucket: goodput[f"{bucket}Seconds"] for bucket in ("redone", "stalled")} == {
        bucket: reported[bucket] for bucket in ("redone", "stalled")
    }
    assert goodput["productiveSeconds"] >= reported["productive"]
