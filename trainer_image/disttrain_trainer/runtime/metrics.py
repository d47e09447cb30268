"""The metrics of a training process.

A loop only adds to plain numbers; they become Prometheus families at a scrape, so that a step of 0.3 ms pays nothing for them.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from disttrain.api.names import Role
from disttrain_trainer.runtime import logs
from disttrain_trainer.runtime.process import Process

log = logs.get_logger(__name__)

PHASES = ("data", "forward", "backward", "communicate", "optimize", "checkpoint")
LOSS = "Mean loss of the last steps: at the master of all workers, at a worker of what it computed itself."
STEP = "Steps of the job that are done; at a worker of parameter servers the step of the part that it computed last."
SAMPLES_PER_SECOND = (
    "Samples per second: at the master of all workers, over the last 10 s; at a worker its own, over its last report. "
    "It falls when nothing moves."
)
GRADIENT_NORM = (
    "Euclidean norm of the gradient that an update was made of, before the optimizer: of the mean loss of a whole step, "
    "or, with servers that do not wait for all workers, of one part. With consistency Sync the master reports it."
)
STEPS = (
    "Steps, or with parameter servers parts of steps, that this process computed, those that were done again included."
)
SAMPLES = "Samples that this process computed, at the master those that a script reported; samples that were computed again included."
RECOVERIES = "How often the processes formed again after a fault, and at the master also how often a worker's parts went to others."
LOST_STEPS = "Steps that were done and then lost to a fault, so that they had to be done again."
DROPPED_SAMPLES = (
    "Samples that trainer.lastBatch Drop has left out: of each epoch that is done those that fill no whole batch."
)
BYTES = (
    "Bytes of gradients, parameters and buffers that this process exchanges with parameter servers, or with other workers: of each "
    "collective operation the least that it needs, such as 2 B (n - 1) / n for an all-reduce of B bytes over n workers."
)
GOODPUT = (
    "Where the time of this master went: starting (before its first step), productive (steps done for the first time), "
    "redone (steps that were lost and done again), stalled. status.goodput is made of it."
)
STEP_PHASES = (
    "Time in each phase of the steps. All but checkpoint add up to disttrain_step_duration_seconds_sum; communicate is also "
    "the wait for other workers."
)
STEP_DURATION = "Duration of a step, or with parameter servers of a part of one, the waits for other workers included."
LATE_GRADIENTS = "Gradients that were not applied, because another copy of their part was applied already."
STALENESS = (
    "Versions of the shard between the parameters that a gradient was computed of and those that it was applied to."
)
EVALUATION = "Numbers of the newest evaluation on the test data, by the names that trainer.evaluate gives them; the master reports them."
EVALUATION_STEP = "Step of the parameters of the newest evaluation; the master reports it."
CHECKPOINT_DURATION = "Duration of writing a checkpoint, or a server's shard of it."
VALUE = (
    "Mean of a named value that trainer.loss returns, over the last steps: at the master of all workers, at a worker of what it computed "
    "itself."
)
LABELS = ("namespace", "job_name", "role", "rank")

STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds."""
STALENESS_BUCKETS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)
"""Steps."""
CHECKPOINT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Seconds."""


OF_STEPS = frozenset(
    {"disttrain_steps", "disttrain_samples", "disttrain_lost_steps", "disttrain_communication_bytes"}
    | {"disttrain_step_phase_seconds", "disttrain_step_duration_seconds", "disttrain_checkpoint_duration_seconds"}
)
"""Families about steps. A process that computes no steps, such as a script's agent, leaves them out; it must not report them as 0."""
NOT_OF_WORKERS = frozenset({"disttrain_lost_steps"})
"""Only the master knows which steps of the job were lost."""
NOT_OF_SERVERS = frozenset({"disttrain_steps", "disttrain_samples", "disttrain_lost_steps", "disttrain_recoveries"})
"""A parameter server computes no steps, and the master counts the recoveries."""


class Histogram:
    """Counts of observations up to each bound; one thread observes."""

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as the exposition format has them."""
        result, count = [], 0
        for bound, number in zip((*map(str, self._bounds), "+Inf"), list(self._counts), strict=True):
            count += number
            result.append((bound, float(count)))
        return result


@dataclass(frozen=True, slots=True)
class Rate:
    """Samples of the newest report of a loop, and the time that they took."""

    samples: int
    seconds: float
    end: float
    """Of time.perf_counter."""

    def per_second(self, now: float) -> float:
        """Samples per second. It falls when the next report takes longer than this one: a loop that stands still has no speed."""
        return self.samples / max(self.seconds, now - self.end, 1e-9)


class Metrics(Collector):
    """What a process counts. A collector of prometheus_client."""

    def __init__(self, process: Process) -> None:
        config = process.config
        self._labels = (config.namespace, config.name, str(process.role.value), str(process.rank))
        self._role = process.role
        self._info = (config.strategy.type.value, str(config.attempt), str(config.world_size))
        self.loss: float | None = None
        self.values: dict[str, float] = {}
        """By name, see VALUE."""
        self.step: int | None = None
        """Steps done, where the process knows."""
        self.epoch: int | None = None
        self.steps = 0
        """Steps that this process computed."""
        self.samples = 0
        self.samples_per_second: Rate | float | None = None
        self.gradient_norm: float | None = None
        self.step_seconds = Histogram(STEP_BUCKETS)
        self.phase_seconds = dict.fromkeys(PHASES, 0.0)
        self.bytes_sent = 0
        self.bytes_received = 0
        self.version: int | None = None
        self.staleness = Histogram(STALENESS_BUCKETS)
        self.late_gradients = 0
        self.checkpoint_seconds = Histogram(CHECKPOINT_BUCKETS)
        self.checkpoint_step: int | None = None
        self.evaluation: dict[str, float] = {}
        self.evaluation_step: int | None = None
        self.recoveries = 0
        self.lost_steps = 0
        self.dropped_samples: int | None = None
        """At the master of a job that drops some."""
        self.goodput_seconds: dict[str, float] = {}
        self.left_out: frozenset[str] = {
            Role.WORKER: NOT_OF_WORKERS,
            Role.PARAMETER_SERVER: NOT_OF_SERVERS,
        }.get(process.role, frozenset())
        """Families of which this process knows nothing."""
        self.before_scrape: Callable[[], None] = lambda: None
        """Brings what is counted elsewhere up to date."""

    def collect(self) -> Iterator[Metric]:
        """The families, for prometheus_client."""
        self.before_scrape()
        return (family for family in self._families() if family.name not in self.left_out)

    def _families(self) -> Iterator[Metric]:
        rate = self.samples_per_second
        speed = rate.per_second(time.perf_counter()) if isinstance(rate, Rate) else rate
        for name, text, value in (
            ("disttrain_loss", LOSS, self.loss),
            ("disttrain_step", STEP, self.step),
            ("disttrain_epoch", "Epoch in work, from 1.", self.epoch),
            ("disttrain_samples_per_second", SAMPLES_PER_SECOND, speed),
            ("disttrain_gradient_norm", GRADIENT_NORM, self.gradient_norm),
            (
                "disttrain_ps_version",
                "Optimizer steps that the parameters of the shard have behind them.",
                self.version,
            ),
            ("disttrain_checkpoint_last_step", "Step of the newest complete checkpoint.", self.checkpoint_step),
            ("disttrain_evaluation_step", EVALUATION_STEP, self.evaluation_step),
        ):
            if value is not None:
                gauge = GaugeMetricFamily(name, text, labels=LABELS)
                gauge.add_metric(self._labels, value)
                yield gauge
        if self.values:
            named = GaugeMetricFamily("disttrain_value", VALUE, labels=(*LABELS, "name"))
            for name, value in self.values.items():
                named.add_metric((*self._labels, name), value)
            yield named
        if self.evaluation:
            family = GaugeMetricFamily("disttrain_evaluation", EVALUATION, labels=(*LABELS, "name"))
            for name, value in list(self.evaluation.items()):
                family.add_metric((*self._labels, name), value)
            yield family
        yield self._counter("disttrain_steps", STEPS, self.steps)
        yield self._counter("disttrain_samples", SAMPLES, self.samples)
        yield self._counter("disttrain_recoveries", RECOVERIES, self.recoveries)
        yield self._counter("disttrain_lost_steps", LOST_STEPS, self.lost_steps)
        if self.dropped_samples is not None:
            yield self._counter("disttrain_samples_dropped", DROPPED_SAMPLES, self.dropped_samples)
        yield self._split("disttrain_communication_bytes", BYTES, "direction",
                          {"sent": self.bytes_sent, "received": self.bytes_received})  # fmt: skip
        if self.goodput_seconds:
            yield self._split("disttrain_goodput_seconds", GOODPUT, "bucket", self.goodput_seconds)
        if self._role is Role.WORKER:
            yield self._split("disttrain_step_phase_seconds", STEP_PHASES, "phase", self.phase_seconds)
            yield self._histogram("disttrain_step_duration_seconds", STEP_DURATION, self.step_seconds)
        if self._role is Role.PARAMETER_SERVER:
            yield self._counter("disttrain_ps_late_gradients", LATE_GRADIENTS, self.late_gradients)
            text = STALENESS
            yield self._histogram("disttrain_ps_staleness_steps", text, self.staleness)
        text = CHECKPOINT_DURATION
        yield self._histogram("disttrain_checkpoint_duration_seconds", text, self.checkpoint_seconds)
        info = GaugeMetricFamily(
            "disttrain_job_info", "What the job is.", labels=(*LABELS, "strategy", "attempt", "world_size")
        )
        info.add_metric((*self._labels, *self._info), 1)
        yield info

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _split(self, name: str, text: str, label: str, values: dict[str, float] | dict[str, int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=(*LABELS, label))
        for key, value in list(values.items()):
            family.add_metric((*self._labels, key), value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, buckets=histogram.buckets(), sum_value=histogram.total)
        return family
