"""What Prometheus gets from a training that runs: every rank of every pod, counted as it happens."""

import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from cluster.processes import wait_for
from disttrain.api import environment
from disttrain.api.names import Role
from disttrain_trainer.examples import digits as example
from training.job import Job, digits, served

ENDLESS = {"epochs": 100_000}
Samples = dict[tuple[str, str], float]
"""By name, and rank with direction, phase or bucket where there is one."""


class Scraped(Job):
    """A job whose worker 0 has a metrics port."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.port = self.free_port()

    def environment(self, role: Role, index: int) -> dict[str, str]:
        env = super().environment(role, index)
        return env | ({environment.METRICS_PORT: str(self.port)} if (role, index) == (Role.WORKER, 0) else {})

    def scrape(self, port: int, label: str = "direction") -> Samples:
        """By name, and rank with this label's value. Fails when a family is there twice, which Prometheus would refuse."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        names = [family.name for family in families]
        assert len(names) == len(set(names)), names
        return {
            (sample.name, sample.labels["rank"] + sample.labels.get(label, "")): sample.value
            for family in families
            for sample in family.samples
        }


def test_a_pod_of_two_processes_shows_both_and_the_bytes_of_their_sums(tmp_path: Path) -> None:
    job = Scraped(folder=tmp_path, spec=digits(worker={"replicas": 1}, trainer=ENDLESS))
    job.config = job.config.model_copy(update={"processes_per_worker": 2})
    with job:
        job.start()
        job.until(lambda progress: progress.step > 200)
        first, then = job.scrape(job.port), job.scrape(job.port)
    parameters = list(example.model({}).parameters())
    gradients = sum(parameter.nbytes for parameter in parameters)
    for rank in "01":
        steps = first["disttrain_steps_total", rank]
        for direction in ("sent", "received"):
            moved = first["disttrain_communication_bytes_total", rank + direction]
            # An all-reduce of two moves the gradients once a step, beside the notes; the state was handed over once, at the beginning.
            assert (steps - 1) * gradients < moved < (steps + 2) * (1.1 * gradients + 500) + 4 * gradients
            assert then["disttrain_communication_bytes_total", rank + direction] >= moved


def test_waiting_for_the_sums_is_communication_and_no_sample_is_counted_twice(tmp_path: Path) -> None:
    with Scraped(folder=tmp_path, spec=digits(trainer=ENDLESS)) as job:
        job.start()
        job.until(lambda progress: progress.step > 50)
        worker, master = job.scrape(job.port, "phase"), job.scrape(job.metrics_port, "bucket")
    assert worker["disttrain_step_phase_seconds_total", "0communicate"] > 0
    assert worker["disttrain_samples_total", "0"] > 0
    assert not [name for name, _ in master if name.startswith(("disttrain_samples_total", "disttrain_steps_total"))]
    assert ("disttrain_goodput_seconds_total", "0productive") in master


def test_a_script_that_reports_nothing_shows_nothing_and_one_that_does_is_counted_by_the_master(tmp_path: Path) -> None:
    text = """
import os, signal
from disttrain_trainer import session
open("up", "w").close()
while not os.path.exists("go"): signal.sigtimedwait([signal.SIGUSR1], 0.05)
session.report(step=5, loss=0.5, samples=40)
while True: signal.pause()
"""
    (tmp_path / "train.py").write_text(text)
    trainer = {"script": {"file": "train.py"}}
    spec = {"strategy": {"type": "DataParallel"}, "trainer": trainer, "worker": {"replicas": 1}}
    with Scraped(folder=tmp_path, spec=spec) as job:
        job.start()
        job.until(lambda _: (tmp_path / "up").exists())
        assert {name for name, _ in job.scrape(job.port)} == {"disttrain_job_info", "disttrain_recoveries_total"}
        silent = {name for name, _ in job.scrape(job.metrics_port, "bucket")}
        assert not silent & {
            "disttrain_step",
            "disttrain_loss",
            "disttrain_samples_total",
            "disttrain_goodput_seconds_total",
        }
        (tmp_path / "go").touch()
        job.until(lambda progress: progress.step == 5)
        master = job.scrape(job.metrics_port, "bucket")
        assert (master["disttrain_step", "0"], master["disttrain_loss", "0"]) == (5, 0.5)
        assert master["disttrain_samples_total", "0"] == 40


def test_torchs_store_listens_where_the_job_says_and_nowhere_else(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=digits(trainer=ENDLESS)) as job:
        job.start()
        job.until(lambda progress: progress.generation == 1)
        port = f":{int(job.config.addresses.rendezvous.rpartition(':')[2]):04X}"
        rows = [line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()]
    assert [row[1] for row in rows if row[1].endswith(port) and row[3] == "0A"] == [f"0100007F{port}"]


def test_a_worker_of_parameter_servers_counts_its_bytes_as_they_move_and_the_master_a_lost_worker(
    tmp_path: Path,
) -> None:
    with Scraped(folder=tmp_path, spec=digits(**served("Async", servers=1), trainer=ENDLESS)) as job:
        job.start()
        job.until(lambda progress: progress.world_size == 2)

        def moved(more_than: float) -> float | None:
            found = job.scrape(job.port)
            sent, received = (
                found.get(("disttrain_communication_bytes_total", way), 0) for way in ("0sent", "0received")
            )
            return sent if min(sent, received) > more_than else None

        # It is one of two as soon as the master wants it, and speaks with the server then.
        before = wait_for("its bytes", lambda: moved(0), 30)
        assert job.scrape(job.metrics_port)["disttrain_recoveries_total", "0"] == 0
        job.kill(Role.WORKER, 1)
        job.until(lambda progress: progress.world_size == 1, tolerate=True)
        assert job.scrape(job.metrics_port)["disttrain_recoveries_total", "0"] == 1
        wait_for("more of its bytes", lambda: moved(before), 30)
