"""The metrics of a pod of several processes are there in time, also when some of them hang."""

import contextlib
import socket
import time
from pathlib import Path

from disttrain.api.names import Role
from disttrain_trainer.runtime.metrics import OF_STEPS, Metrics
from disttrain_trainer.runtime.pod_metrics import PodMetrics, answer
from disttrain_trainer.runtime.process import Process
from unit.trainer.test_termination import CONFIG, exposed

SCRAPE_TIMEOUT = 4.0
"""As deploy/monitoring sets it."""


def test_eight_processes_that_hang_do_not_cost_the_scrape_of_the_ninth(tmp_path: Path) -> None:
    sockets = [tmp_path / str(number) for number in range(9)]
    pod = PodMetrics(sockets)
    with contextlib.ExitStack() as stack:
        for path in sockets[:8]:
            hanging = stack.enter_context(socket.socket(socket.AF_UNIX))
            hanging.bind(str(path))
            hanging.listen()
        answer(Metrics(Process(config=CONFIG, role=Role.WORKER, index=0)), sockets[8])
        began = time.monotonic()
        families = {family.name for family in pod.collect()}
        assert time.monotonic() - began < SCRAPE_TIMEOUT
    assert "disttrain_steps" in families


def test_a_scripts_agent_exposes_nothing_of_steps_that_it_cannot_see() -> None:
    metrics = Metrics(Process(config=CONFIG, role=Role.WORKER, index=0))
    metrics.left_out = OF_STEPS
    names = {line.split("{")[0] for line in exposed(metrics).splitlines() if not line.startswith("#")}
    assert names == {"disttrain_recoveries_total", "disttrain_job_info"}
