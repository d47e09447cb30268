"""The metrics of a training process, and the port that serves them; the master's port has /progress too.

A loop only adds to plain numbers; they become Prometheus families when somebody asks, so that a step of 0.3 ms pays nothing for them.
Not here: torch, and what the numbers mean for the job (the operator reads /progress).
"""

import logging
import socket
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from disttrain.api.names import Role
from disttrain_trainer.listening import listen
from disttrain_trainer.process import Process

log = logging.getLogger(__name__)

PHASES = ("data", "forward", "backward", "communicate", "optimize", "checkpoint")
RECOVERIES = "Worlds that were formed again after a fault, and workers whose slices went to others."
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
"""Families about steps, which who computes none, such as a script's agent, must not say are none."""


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


class Metrics(Collector):
    """What a process counts. A collector of prometheus_client."""

    def __init__(self, process: Process) -> None:
        config = process.config
        self._labels = (config.namespace, config.name, str(process.role.value), str(process.rank))
        self._role = process.role
        self._info = (config.strategy.type.value, str(config.attempt), str(config.world_size))
        self.loss: float | None = None
        self.step: int | None = None
        """Steps done, where the process knows."""
        self.epoch: int | None = None
        self.steps = 0
        """Steps that this process computed."""
        self.samples = 0
        self.samples_per_second: float | None = None
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
        self.recoveries = 0
        self.lost_steps = 0
        self.goodput_seconds: dict[str, float] = {}
        self.left_out: frozenset[str] = frozenset()
        """Families of which this process knows nothing."""
        self.before_scrape: Callable[[], None] = lambda: None
        """Brings what is counted elsewhere up to date."""

    def collect(self) -> Iterator[Metric]:
        """The families, for prometheus_client."""
        self.before_scrape()
        return (family for family in self._families() if family.name not in self.left_out)

    def _families(self) -> Iterator[Metric]:
        for name, text, value in (
            ("disttrain_loss", "Mean loss of the last steps.", self.loss),
            ("disttrain_step", "Global steps done.", self.step),
            ("disttrain_epoch", "Epoch in work, from 1.", self.epoch),
            ("disttrain_samples_per_second", "Samples per second, over the last seconds.", self.samples_per_second),
            ("disttrain_gradient_norm", "Norm of the last reported gradient.", self.gradient_norm),
            ("disttrain_ps_version", "Optimiser steps behind a shard's parameters.", self.version),
            ("disttrain_checkpoint_last_step", "Step of the newest complete checkpoint.", self.checkpoint_step),
        ):
            if value is not None:
                gauge = GaugeMetricFamily(name, text, labels=LABELS)
                gauge.add_metric(self._labels, value)
                yield gauge
        yield self._counter("disttrain_steps", "Steps that this process computed.", self.steps)
        yield self._counter("disttrain_samples", "Samples that this process computed.", self.samples)
        yield self._counter("disttrain_recoveries", RECOVERIES, self.recoveries)
        yield self._counter("disttrain_lost_steps", "Steps that were lost to a fault and done again.", self.lost_steps)
        yield self._split("disttrain_communication_bytes", "Bytes of parameters and gradients.", "direction",
                          {"sent": self.bytes_sent, "received": self.bytes_received})  # fmt: skip
        if self.goodput_seconds:
            yield self._split("disttrain_goodput_seconds", "Where the time went.", "bucket", self.goodput_seconds)
        if self._role is Role.WORKER:
            yield self._split(
                "disttrain_step_phase_seconds", "Time in each part of a step.", "phase", self.phase_seconds
            )
            yield self._histogram("disttrain_step_duration_seconds", "Duration of a step.", self.step_seconds)
        if self._role is Role.PARAMETER_SERVER:
            yield self._counter(
                "disttrain_ps_late_gradients", "Gradients of slices that counted already.", self.late_gradients
            )
            text = "Versions between a gradient's parameters and those it changed."
            yield self._histogram("disttrain_ps_staleness_steps", text, self.staleness)
        text = "Duration of writing a checkpoint."
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket, handler: type[BaseHTTPRequestHandler]) -> None:
        # Not bound here: HTTPServer asks DNS for its own name then, which can take seconds.
        super().__init__(listener.getsockname()[:2], handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener

    def handle_error(self, request: object, client_address: object) -> None:
        # Prometheus gave up: nothing for a user to read.
        log.debug("a scrape was not answered", exc_info=True)  # noqa: LOG014 - called while the exception is handled


def serve(metrics: Collector, *, host: str, port: int, progress: Callable[[], str] | None = None) -> None:
    """Serves /metrics, and /progress where there is one, in a thread. A port that is taken is said once, and nothing else."""
    registry = CollectorRegistry()
    registry.register(metrics)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer(CONTENT_TYPE_LATEST, generate_latest(registry))
            elif path == "/progress" and progress is not None:
                self._answer("application/json", progress().encode())
            else:
                self.send_error(404)

        def _answer(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        server = _Server(listen(host or None, port), Handler)
    except OSError as error:
        log.warning("metrics cannot be served on port %d: %s; the training goes on without", port, error.strerror)
        return
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
