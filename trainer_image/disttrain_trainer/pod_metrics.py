"""The metrics of a pod with several training processes, for the one port of the pod.

Each process answers on a socket file; their parent, which counts nothing itself, asks all of them at each scrape. Not here: what is
counted, and the port (metrics.py).
"""

import logging
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds for a process's answer: Prometheus gives up the whole pod after 10."""


class PodMetrics(Collector):
    """What all processes of the pod say, as one process would: each family once. Their ranks keep the samples apart."""

    def __init__(self) -> None:
        self.sockets: Sequence[Path] = ()

    def collect(self) -> Iterable[Metric]:
        """The families, for prometheus_client."""
        families: dict[str, Metric] = {}
        for path in self.sockets:
            for family in text_string_to_metric_families(_ask(path)):
                families.setdefault(family.name, Metric(family.name, family.documentation, family.type)).samples.extend(
                    family.samples
                )
        return families.values()


def answer(metrics: Collector, path: Path) -> None:
    """Answers whoever connects to the socket file with the exposition, in a thread. A failure is said once, and nothing else."""
    registry = CollectorRegistry()
    registry.register(metrics)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen()
    except OSError as error:
        log.warning("metrics cannot be answered at %s: %s; the training goes on without", path, error)
        return

    def serve() -> None:
        while True:
            try:
                asking, _ = listener.accept()
                with asking:
                    asking.settimeout(PATIENCE)
                    asking.sendall(generate_latest(registry))
            except Exception:  # one scrape is lost, not those after it
                log.debug("a scrape was not answered", exc_info=True)
                time.sleep(0.1)

    threading.Thread(target=serve, name="metrics", daemon=True).start()


def _ask(path: Path) -> str:
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(PATIENCE)
            asking.connect(str(path))
            with asking.makefile("rb") as reading:
                return reading.read().decode()
    except OSError:  # it starts, has ended, or hangs: the others are still worth a look
        return ""
