"""Plays five jobs and an operator, and writes their metrics down in OpenMetrics, for `promtool tsdb create-blocks-from`.

Deterministic: 20 minutes at the scrape interval of 5 s. The job `digits` (4 workers, 2 servers, bounded staleness) loses a
worker at minute 5, has a slow worker from 8 to 12, and loses a server at 14, which takes it back to a checkpoint. `chars` (data
parallel, 3 workers) has no servers; the loss of `diverged` is NaN from minute 15. `script` reports what it does until minute 10, and
hangs from then on; `command` never reports. What it is not: a model of training; only the shapes of the metrics are true.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from monitoring.contract import BUCKETS, METRICS, OPERATOR_METRICS, PHASES, TARGET, TRAINER

OTHERS = ("up", "process_start_time_seconds")
"""Recorded too: of the scrape, and of every Python process that does not leave it out."""

START = 1_767_225_720  # 2026-01-01T00:02:00Z: within one block of two hours
SCRAPE = 5
DURATION = 20 * 60
END = START + DURATION

SCRIPT_SAMPLES, SCRIPT_HANGS = 80, 600
"""Samples a second of the job `script`, and the second from which it does no more."""

STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STALENESS_BUCKETS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)
CHECKPOINT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
SECONDS_BUCKETS = (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800)
RECONCILE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 15)
BUCKETS_OF = {
    "disttrain_step_duration_seconds": STEP_BUCKETS,
    "disttrain_ps_staleness_steps": STALENESS_BUCKETS,
    "disttrain_checkpoint_duration_seconds": CHECKPOINT_BUCKETS,
    "disttrain_operator_reconcile_duration_seconds": RECONCILE_BUCKETS,
    "disttrain_operator_startup_seconds": SECONDS_BUCKETS,
    "disttrain_operator_recovery_seconds": SECONDS_BUCKETS,
}

Labels = tuple[tuple[str, str], ...]


def _labels(labels: Mapping[str, str]) -> Labels:
    return tuple(sorted(labels.items()))


@dataclass
class Process:
    """One scraped process: its own counters, which are lost with it."""

    target: dict[str, str]
    values: dict[tuple[str, Labels], float] = field(default_factory=lambda: defaultdict(float))
    observed: dict[tuple[str, Labels], list[float]] = field(default_factory=lambda: defaultdict(list))
    sums: dict[tuple[str, Labels], float] = field(default_factory=lambda: defaultdict(float))
    up: bool = True

    def set(self, name: str, value: float, /, **labels: str) -> None:
        self.values[name, _labels(labels)] = value

    def add(self, name: str, value: float, **labels: str) -> None:
        self.values[name, _labels(labels)] += value

    def observe(self, name: str, value: float, **labels: str) -> None:
        key = (name, _labels(labels))
        self.expect(name, **labels)
        self.observed[key][
            next((i for i, bound in enumerate(BUCKETS_OF[name]) if value <= bound), len(BUCKETS_OF[name]))
        ] += 1
        self.sums[key] += value

    def expect(self, name: str, **labels: str) -> None:
        """The histogram is exported before its first observation."""
        self.observed.setdefault((name, _labels(labels)), [0.0] * (len(BUCKETS_OF[name]) + 1))

    def restart(self) -> None:
        self.values.clear()
        self.observed.clear()
        self.sums.clear()

    def samples(self) -> Iterator[tuple[str, str, dict[str, str], float]]:
        """family, series, labels, value"""
        for (name, labels), value in self.values.items():
            yield name, name, dict(labels), value
        for (name, labels), counts in self.observed.items():
            total = 0.0
            for bound, count in zip((*map(float, BUCKETS_OF[name]), math.inf), counts, strict=True):
                total += count
                yield name, f"{name}_bucket", dict(labels) | {"le": "+Inf" if bound == math.inf else f"{bound}"}, total
            yield name, f"{name}_count", dict(labels), total
            yield name, f"{name}_sum", dict(labels), self.sums[name, labels]


class Recording:
    """Samples over time, by family."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = defaultdict(list)
        self.truth: dict[tuple[str, Labels], dict[int, float]] = defaultdict(dict)
        """(series, labels) -> time -> value: what a query has to find again."""

    def scrape(self, process: Process, now: int) -> None:
        self._sample("up", "up", process.target, now, 1.0 if process.up else 0.0)
        if process.up:
            for family, series, labels, value in process.samples():
                self._sample(family, series, process.target | labels, now, value)

    def _sample(self, family: str, series: str, labels: dict[str, str], now: int, value: float) -> None:
        if family not in OTHERS:
            metric = METRICS[family]
            own = (OPERATOR_METRICS.keys() >= {family} and TARGET) or TRAINER
            unknown = set(labels) - own - metric.labels - {"le"}
            missing = metric.labels - set(labels)
            if unknown or missing:
                raise ValueError(f"{family}: labels {sorted(unknown)} too much, {sorted(missing)} missing")
        text = ",".join(f'{name}="{word}"' for name, word in sorted(labels.items()))
        self._lines[family].append(f"{series}{{{text}}} {value!r} {now}")
        self.truth[series, _labels(labels)][now] = value

    @property
    def families(self) -> frozenset[str]:
        return frozenset(self._lines)

    def openmetrics(self) -> str:
        lines = []
        for family, samples in self._lines.items():
            kind = METRICS[family].kind if family in METRICS else "gauge"
            lines.append(f"# TYPE {family.removesuffix('_total') if kind == 'counter' else family} {kind}")
            lines += samples
        return "\n".join([*lines, "# EOF", ""])


@dataclass
class Worker:
    process: Process
    rank: int
    seconds: float
    """Of own work in a step."""
    owed: float = 0.0
    """Time of the scrape interval that belongs to a step in work."""


class Job:
    """A job that trains, with the faults of its plan."""

    def __init__(
        self, namespace: str, name: str, *, workers: int, servers: int, batch: int, seconds: float, seed: int
    ) -> None:
        self.random = random.Random(seed)
        self.name, self.batch = name, batch
        self.common = {"job": "disttrain-trainer", "namespace": namespace, "job_name": name}
        self.master = self._process("master", 0, "master")
        self.servers = [self._process("parameter-server", i, f"ps-{i}") for i in range(servers)]
        self.workers = [Worker(self._process("worker", i, f"worker-{i}"), i, seconds) for i in range(workers)]
        self.parts_done = 0.0
        self.checkpoint = 0
        self.gone_until: dict[int, int] = {}
        self.paused_until = 0
        self.stall = 0.0
        for bucket in BUCKETS:
            self.master.set("disttrain_goodput_seconds_total", 0, bucket=bucket)
        self.strategy = "ParameterServer" if servers else "DataParallel"
        for process in self.processes:
            self._begin(process)

    def _begin(self, process: Process) -> None:
        """What a trainer exports from its start."""
        counts = {"master": ("recoveries", "lost_steps"), "worker": ("recoveries", "steps", "samples")}
        for name in counts.get(process.target["role"], ()):
            process.set(f"disttrain_{name}_total", 0)
        if process.target["role"] != "master":  # which computes nothing
            for direction in ("sent", "received"):
                process.set("disttrain_communication_bytes_total", 0, direction=direction)
            process.expect("disttrain_checkpoint_duration_seconds")
        if process.target["role"] == "worker":
            process.expect("disttrain_step_duration_seconds")
            for phase in PHASES:
                process.set("disttrain_step_phase_seconds_total", 0, phase=phase)
        if process.target["role"] == "parameter-server":
            process.set("disttrain_ps_late_gradients_total", 0)
            process.expect("disttrain_ps_staleness_steps")
        process.set("disttrain_job_info", 1, strategy=self.strategy, attempt="1", world_size=str(len(self.workers)))

    def _process(self, role: str, index: int, short: str) -> Process:
        pod = f"{self.name}-{short if role != 'master' else 'master-0'}"
        where = {"pod": pod, "instance": f"{pod}:9400", "node": f"node-{index % 2}"}
        return Process(self.common | {"role": role, "rank": str(index)} | where)

    @property
    def step(self) -> int:
        return int(self.parts_done // len(self.workers))

    @property
    def processes(self) -> list[Process]:
        return [self.master, *self.servers, *(worker.process for worker in self.workers)]

    def lose_worker(self, rank: int, now: int, seconds: int) -> None:
        self.workers[rank].process.up = False
        self.gone_until[rank] = now + seconds
        self.master.add("disttrain_recoveries_total", 1)

    def lose_server(self, index: int, now: int, seconds: int) -> None:
        """Everything goes back to the checkpoint."""
        self.servers[index].restart()
        self._begin(self.servers[index])
        for process in (self.master, *(worker.process for worker in self.workers)):
            process.add("disttrain_recoveries_total", 1)
        self.master.add("disttrain_lost_steps_total", self.step - self.checkpoint)
        self.parts_done = self.checkpoint * len(self.workers)
        self.paused_until = now + seconds

    def tick(self, now: int) -> None:
        for rank, back in list(self.gone_until.items()):
            if now >= back:
                del self.gone_until[rank]
                self.workers[rank].process.restart()
                self._begin(self.workers[rank].process)
                self.workers[rank].process.up = True
        if now < self.paused_until or now < START + 20:
            self.master.add(
                "disttrain_goodput_seconds_total", SCRAPE, bucket="starting" if now < START + 20 else "stalled"
            )
        else:
            for worker in self.workers:
                if worker.process.up:
                    self._train(worker)
            self.master.add("disttrain_goodput_seconds_total", SCRAPE * 0.97, bucket="productive")
            self.master.add("disttrain_goodput_seconds_total", SCRAPE * 0.03, bucket="redone")
        self._report(now)

    def _train(self, worker: Worker) -> None:
        process, rand = worker.process, self.random
        worker.owed += SCRAPE
        while True:
            work = worker.seconds * rand.uniform(0.9, 1.2)
            wait = 0.25 * worker.seconds * rand.uniform(0.7, 2.0) + (0.25 if rand.random() < 0.01 else 0)
            if worker.owed < work + wait:
                return
            worker.owed -= work + wait
            self.parts_done += 1
            shares = {"data": 0.08 * work, "forward": 0.32 * work, "backward": 0.55 * work, "optimize": 0.05 * work}
            for phase in PHASES:
                process.add(
                    "disttrain_step_phase_seconds_total",
                    shares.get(phase, wait if phase == "communicate" else 0),
                    phase=phase,
                )
            process.observe("disttrain_step_duration_seconds", work + wait)
            process.add("disttrain_steps_total", 1)
            process.add("disttrain_samples_total", self.batch / len(self.workers))
            for direction in ("sent", "received"):
                process.add(
                    "disttrain_communication_bytes_total", 203_000 * rand.uniform(0.99, 1.01), direction=direction
                )
            for server in self.servers:
                server.observe("disttrain_ps_staleness_steps", rand.choices((0, 1, 2, 3, 4), (20, 42, 25, 10, 3))[0])
                server.add("disttrain_ps_late_gradients_total", 1 if rand.random() < 0.004 else 0)
                for direction in ("sent", "received"):
                    server.add("disttrain_communication_bytes_total", 203_000 / len(self.servers), direction=direction)

    def _report(self, now: int) -> None:
        step = self.step
        if step - self.checkpoint >= 200:
            self.checkpoint = step // 200 * 200
            for writer in self.servers or [self.workers[0].process]:
                writer.observe("disttrain_checkpoint_duration_seconds", self.random.uniform(0.3, 1.4))
            for worker in self.workers:
                if worker.process.up:
                    worker.process.add("disttrain_step_phase_seconds_total", 0.4, phase="checkpoint")
        self.master.set("disttrain_checkpoint_last_step", self.checkpoint)
        self.master.set("disttrain_samples_dropped_total", 32 * (step * self.batch // 60_000))
        if step:
            self.master.set("disttrain_value", 1 - math.exp(-step / 700), name="accuracy")
        if self.checkpoint:
            self.master.set("disttrain_evaluation", 1 - math.exp(-self.checkpoint / 800), name="accuracy")
            self.master.set("disttrain_evaluation_step", self.checkpoint)
        self.master.set("disttrain_step", step)
        self.master.set("disttrain_epoch", 1 + step * self.batch // 60_000)
        for server in self.servers:
            server.set("disttrain_ps_version", step)
        for worker in self.workers:
            process = worker.process
            if process.up:
                process.set("disttrain_step", step)
                if self.servers:
                    process.set("disttrain_ps_version", step)
                process.set("disttrain_epoch", 1 + step * self.batch // 60_000)
                if step:
                    noise = self.random.gauss(0, 0.03)
                    process.set("disttrain_loss", 0.08 + 2.22 * math.exp(-step / 1200) * (1 + noise) + abs(noise) * 0.2)
                    process.set(
                        "disttrain_gradient_norm", 0.4 + 3 * math.exp(-step / 900) * self.random.uniform(0.7, 1.5)
                    )
                    process.set("disttrain_samples_per_second", self.batch / len(self.workers) / (worker.seconds * 1.4))


class Program:
    """A job that is a script, which may report, or a command: its agents know of no step, and its master of what is reported."""

    def __init__(self, name: str, *, workers: int, agents: bool) -> None:
        self.common = {"job": "disttrain-trainer", "namespace": "research", "job_name": name}
        self.master = self._process("master", 0)
        self.workers = [self._process("worker", index) for index in range(workers)]
        for process in self.workers:
            process.up = agents  # a command serves no metrics
        self.exporters = [self.master, *(self.workers if agents else [])]
        for process in self.exporters:
            process.set("disttrain_recoveries_total", 0)
            process.set("disttrain_job_info", 1, strategy="DataParallel", attempt="1", world_size=str(workers))
        self.master.set("disttrain_lost_steps_total", 0)

    def _process(self, role: str, index: int) -> Process:
        pod = f"{self.common['job_name']}-{role}-{index}"
        where = {"pod": pod, "instance": f"{pod}:9400", "node": f"node-{index % 2}"}
        return Process(self.common | {"role": role, "rank": str(index)} | where)

    @property
    def processes(self) -> list[Process]:
        return [self.master, *self.workers]

    def report(self, step: int, samples: int) -> None:
        """Through session.report, on all ranks together."""
        master = self.master
        master.set("disttrain_step", step)
        master.set("disttrain_loss", 0.1 + 2.2 * math.exp(-step / 100))
        master.add("disttrain_samples_total", samples)
        master.set("disttrain_samples_per_second", samples / SCRAPE)

    def spend(self, bucket: str) -> None:
        for each in BUCKETS:
            self.master.add("disttrain_goodput_seconds_total", SCRAPE if each == bucket else 0, bucket=each)


class Operator:
    """Two replicas, of which one leads."""

    def __init__(self) -> None:
        self.random = random.Random(11)
        self.leader, self.other = (
            Process(
                {
                    "job": "disttrain-operator",
                    "namespace": "disttrain-system",
                    "pod": f"disttrain-operator-{name}",
                    "instance": f"{name}:8080",
                    "node": "node-0",
                }
            )
            for name in ("7d9f-x2k", "7d9f-q8m")
        )
        for process in (self.leader, self.other):
            process.set("disttrain_operator_leader", 1 if process is self.leader else 0)
            process.set("disttrain_operator_reconcile_errors_total", 0)
            process.set("disttrain_operator_queue_depth", 0)
            process.set("process_start_time_seconds", START - 7200)
        self.done = 0

    def tick(self, now: int) -> None:
        rand, leader, since = self.random, self.leader, now - START
        for resource, period in (("disttrainjobs", 17), ("pods", 7), ("configmaps", 60)):
            # Only of the leader: the other one watches nothing but the Lease.
            leader.set("disttrain_operator_watch_age_seconds", since % period, resource=resource)
            leader.add("disttrain_operator_resync_drift_total", 0, resource=resource)
        for _ in range(rand.randrange(3, 12)):
            leader.observe("disttrain_operator_reconcile_duration_seconds", rand.lognormvariate(-4.6, 0.9))
        leader.add("disttrain_operator_reconcile_errors_total", 1 if since in (305, 850) else 0)
        leader.set("disttrain_operator_queue_depth", max(0, int(rand.gauss(0.5, 1.2))))
        requests = {
            ("get", "pods", "200"): 3,
            ("patch", "disttrainjobs", "200"): 2,
            ("create", "pods", "201"): 7 if since in (10, 305, 850) else 0,
            ("create", "pods", "409"): 1 if since == 310 else 0,
            ("delete", "pods", "200"): 1 if since in (305, 850) else 0,
        }
        for (verb, resource, code), count in requests.items():
            if count:  # a series with labels appears with its first event, as in prometheus_client
                leader.add("disttrain_operator_api_requests_total", count, verb=verb, resource=resource, code=code)
        if since in (60, 200, 500, 900):
            for phase, seconds in (("schedule", 0.8), ("ready", 3.1), ("train", 2.4)):
                leader.observe("disttrain_operator_startup_seconds", seconds * rand.uniform(0.8, 1.3), phase=phase)
        for when, result, reason in (
            (400, "Complete", "AllWorkersSucceeded"),
            (700, "Complete", "AllWorkersSucceeded"),
            (1000, "Failed", "NaNLoss"),
        ):
            if since == when:
                leader.add("disttrain_operator_jobs_finished_total", 1, result=result, reason=reason)
                self.done += result == "Complete"
        for when, role, reason, seconds in (
            (330, "worker", "OOMKilled", 24.0),
            (850, "parameter-server", "Error", 12.0),
        ):
            if since == when:
                leader.add("disttrain_operator_restarts_total", 1, role=role, reason=reason)
                leader.observe("disttrain_operator_recovery_seconds", seconds, role=role)
        states = {
            "Training": 2 if since >= 20 else 0,
            "Starting": 2 if since < 20 else int(200 <= since < 240),
            "Restarting": int(300 <= since < 330 or 840 <= since < 855),
            "Suspended": 1,
            "Complete": self.done,
            "Failed": int(since >= 1000),
            "Pending": int(500 <= since < 560),
        }
        for state, count in states.items():
            for process in (leader, self.other):
                process.set("disttrain_operator_jobs", count, state=state)


def play() -> Recording:
    recording = Recording()
    digits = Job("demo", "digits", workers=4, servers=2, batch=64, seconds=0.11, seed=7)
    chars = Job("research", "chars", workers=3, servers=0, batch=96, seconds=0.35, seed=8)
    diverged = Job("research", "diverged", workers=1, servers=0, batch=32, seconds=0.5, seed=9)
    script = Program("script", workers=2, agents=True)
    command = Program("command", workers=2, agents=False)
    operator = Operator()
    for since in range(0, DURATION + 1, SCRAPE):
        now = START + since
        if since == 310:
            digits.lose_worker(1, now, 25)
        if since in (480, 720):
            digits.workers[3].seconds = 0.2 if since == 480 else 0.11
        if since == 850:
            digits.lose_server(0, now, 12)
        for job in (digits, chars, diverged):
            job.tick(now)
            if job is diverged and since >= 900:
                job.workers[0].process.set("disttrain_loss", math.nan)
            for process in job.processes:
                recording.scrape(process, now)
        if since >= 30:
            if since <= SCRIPT_HANGS:
                script.report(since // 10 - 2, SCRIPT_SAMPLES * SCRAPE)
            script.spend("productive" if since <= SCRIPT_HANGS else "stalled")
        for program in (script, command):
            for process in program.processes:
                recording.scrape(process, now)
        operator.tick(now)
        recording.scrape(operator.leader, now)
        recording.scrape(operator.other, now)
    return recording
