"""The metrics of a pod with several training processes, for the one port of the pod.

Each process answers on a socket file; one more, which counts nothing itself, asks all of them at each scrape.
"""

import socket
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)

SCRAPE_SECONDS = 2.0
"""Seconds for the answers of all processes together: Prometheus gives up the whole pod after the scrape_timeout, 4 as we ship it."""


class PodMetrics(Collector):
    """What all processes of the pod say, as one process would: each family once. Their ranks keep the samples apart."""

    def __init__(self, sockets: Sequence[Path]) -> None:
        self._sockets = tuple(sockets)

    def collect(self) -> Iterable[Metric]:
        """The families, for prometheus_client."""
        families: dict[str, Metric] = {}
        sockets, deadline = self._sockets, time.monotonic() + SCRAPE_SECONDS
        with ThreadPoolExecutor(max(1, len(sockets))) as pool:
            answers = list(pool.map(lambda path: _ask(path, deadline), sockets))
        for text in answers:
            for family in text_string_to_metric_families(text):
                families.setdefault(family.name, Metric(family.name, family.documentation, family.type)).samples.extend(
                    family.samples
                )
        return families.values()


def answer(metrics: Collector, path: Path) -> None:
    """Answers every connection to the socket file with the exposition, in a thread. A failure is logged once and has no other effect."""
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
                    asking.settimeout(SCRAPE_SECONDS)
                    asking.sendall(generate_latest(registry))
            except Exception:  # one scrape is lost, not those after it
                log.debug("a scrape was not answered", exc_info=True)
                time.sleep(0.1)

    threading.Thread(target=serve, name="metrics", daemon=True).start()


def _ask(path: Path, deadline: float) -> str:
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(SCRAPE_SECONDS)
            asking.connect(str(path))
            answer = b""
            while True:
                asking.settimeout(max(0.001, deadline - time.monotonic()))
                data = asking.recv(65536)
                if not data:
                    return answer.decode()
                answer += data
    except OSError:  # it starts, has ended, or hangs: the others are still worth a look
        return ""
