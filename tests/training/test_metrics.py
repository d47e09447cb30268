"""What Prometheus gets from a training that runs: every rank of every pod, counted as it happens."""

import socket
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from disttrain.api import environment
from disttrain.api.names import Role
from disttrain_trainer.examples import digits as example
from training.job import Job, digits, served

ENDLESS = {"epochs": 100_000}
Samples = dict[tuple[str, str], float]
"""By name and rank, and direction where there is one."""


class Scraped(Job):
    """A job whose worker 0 has a metrics port."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    def environment(self, role: Role, index: int) -> dict[str, str]:
        env = super().environment(role, index)
        return env | ({environment.METRICS_PORT: str(self.port)} if (role, index) == (Role.WORKER, 0) else {})

    def scrape(self, port: int) -> Samples:
        """Fails when a family is there twice, which Prometheus would refuse."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        names = [family.name for family in families]
        assert len(names) == len(set(names)), names
        return {
            (sample.name, sample.labels["rank"] + sample.labels.get("direction", "")): sample.value
            for family in families
            for sample in family.samples
        }


def test_a_pod_of_two_processes_shows_both_and_the_bytes_of_each_step_at_once(tmp_path: Path) -> None:
    job = Scraped(folder=tmp_path, spec=digits(worker={"replicas": 1}, trainer=ENDLESS))
    job.config = job.config.model_copy(update={"processes_per_worker": 2})
    with job:
        job.start()
        job.until(lambda progress: progress.step > 50)
        found = job.scrape(job.port)
    gradients = sum(parameter.nbytes for parameter in example.model({}).parameters())
    for rank in "01":
        steps = found["disttrain_steps_total", rank]
        for direction in ("sent", "received"):
            steps_then, rest = divmod(found["disttrain_communication_bytes_total", rank + direction], gradients)
            assert rest == 0
            assert steps / 2 < steps_then <= steps


def test_a_worker_of_parameter_servers_counts_its_bytes_as_they_move_and_the_master_a_lost_worker(
    tmp_path: Path,
) -> None:
    with Scraped(folder=tmp_path, spec=digits(**served("Async", servers=1), trainer=ENDLESS)) as job:
        job.start()
        job.until(lambda progress: progress.step > 50 and progress.world_size == 2)
        found = job.scrape(job.port)
        for direction in ("0sent", "0received"):
            assert found["disttrain_communication_bytes_total", direction] > 0
        assert job.scrape(job.metrics_port)["disttrain_recoveries_total", "0"] == 0
        job.kill(Role.WORKER, 1)
        job.until(lambda progress: progress.world_size == 1, tolerate=True)
        assert job.scrape(job.metrics_port)["disttrain_recoveries_total", "0"] == 1
        now = job.scrape(job.port)
        assert (
            now["disttrain_communication_bytes_total", "0sent"] > found["disttrain_communication_bytes_total", "0sent"]
        )
