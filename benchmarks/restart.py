"""How long a lost training process is away: forked again by its pod's launcher, against started again as a new pod's would be; in turns.

    python benchmarks/restart.py            # a table: seconds from kill -9 to the next step of that worker, and the memory of a pod
    python benchmarks/restart.py --servers  # seconds from kill -9 of a parameter server with a copy to the workers' next steps

"noticed" are the seconds of that, in place, from the moment at which another worker sees the loss: its round ends. The target for a model
that is cut over the workers is 5.

New: the worker's first process is killed and started at once. A cluster adds the back-off (1 s), the scheduler, the kubelet and the
volumes to that, a local run the back-off. In place: the training process is killed, and nothing else is done.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.api import environment
from disttrain.api.names import Role
from disttrain.api.runtime import Addresses, JobConfig
from disttrain.api.spec import DistTrainJobSpec

WAIT_SECONDS = 300.0
EXAMPLES = "disttrain_trainer.examples"
_NOTICED = re.compile(rb"round \d+ (ended|is over)")
"""What a surviving rank logs."""


@dataclass(frozen=True)
class Kind:
    """A strategy, with workers of one process each."""

    strategy: dict[str, Any]
    workers: int = 2
    servers: int = 0
    fewest: int | None = None
    """Workers with which an elastic job goes on."""


def _cut(*, tensor: int = 1, data: int = 1, sharding: str | None = None) -> Kind:
    strategy: dict[str, Any] = {"type": "Hybrid" if data > 1 else "ModelParallel", "modelParallel": {"tensor": tensor}}
    if sharding is not None:
        strategy["dataParallel"] = {"sharding": sharding}
    return Kind(strategy, tensor * data)


KINDS = {
    "DataParallel": Kind({"type": "DataParallel"}),
    "ParameterServer": Kind({"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}}, servers=1),
    "FullyShard": Kind({"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}),
    "HybridShard": Kind(
        {"type": "DataParallel", "dataParallel": {"sharding": "HybridShard", "shardSize": 2}}, workers=4
    ),
    "tensor": _cut(tensor=2),
    "data-tensor": _cut(tensor=2, data=2),
}

REPLICATED = Kind({"type": "ParameterServer", "parameterServer": {"consistency": "Sync", "replication": 2}}, servers=2)


class Pods:
    """The processes of a job that has no end. The last worker is the one that is lost."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        module = f"{EXAMPLES}.charlm" if "modelParallel" in kind.strategy else f"{EXAMPLES}.digits"
        spec: dict[str, Any] = {
            "strategy": kind.strategy,
            **({"parameterServer": {"replicas": kind.servers}} if kind.servers else {}),
            "worker": {"replicas": kind.workers},
            "trainer": {
                "model": f"{module}:model",
                "dataset": f"{module}:dataset",
                "loss": f"{module}:loss",
                "optimizer": {"name": "SGD", "learningRate": 0.01},
                "batchSize": 64,
                "maxSteps": 100_000_000,
            },
        }
        job = DistTrainJobSpec.model_validate(spec)
        control, rendezvous, self._metrics, *ports = (_free_port() for _ in range(3 + kind.servers))
        self._config = JobConfig(
            namespace="benchmark",
            name="restart",
            uid="none",
            attempt=1,
            strategy=job.strategy,
            trainer=job.trainer,
            workers=kind.workers,
            min_workers=kind.fewest,
            parameter_servers=kind.servers,
            addresses=Addresses(
                control=f"127.0.0.1:{control}",
                rendezvous=f"127.0.0.1:{rendezvous}",
                parameter_servers=tuple(f"127.0.0.1:{port}" for port in ports),
            ),
        )
        self._folder = folder
        self._last = kind.workers - 1
        self._has_rounds = not kind.servers
        self._processes: list[subprocess.Popen[bytes]] = []
        self._start(Role.MASTER, 0)
        self._copies = 0
        self._servers = [self._start(Role.PARAMETER_SERVER, index) for index in range(kind.servers)]
        for index in range(self._last):
            self._start(Role.WORKER, index)
        self._victim = self._start(Role.WORKER, self._last)
        self._await_step()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def in_place(self) -> tuple[float, float]:
        """Seconds from the end of the training process to its successor's first step; and those of them since the loss was noticed."""
        log = self._folder / "log"
        before = log.stat().st_size
        began = time.perf_counter()
        os.kill(self._training_process(), signal.SIGKILL)
        noticed = began  # parameter servers go on without a word
        while self._has_rounds and noticed == began and time.perf_counter() < began + WAIT_SECONDS:
            if _NOTICED.search(log.read_bytes()[before:]):
                noticed = time.perf_counter()
            time.sleep(0.002)
        self._await_step()
        now = time.perf_counter()
        return now - began, now - noticed

    def new(self) -> float:
        """The same of the first process, which is started again at once."""
        began = time.perf_counter()
        self._victim.kill()
        self._victim.wait()
        self._victim = self._start(Role.WORKER, self._last)
        self._await_step()
        return time.perf_counter() - began

    def without_server(self, index: int) -> float:
        """Seconds from the end of a server's process to the third step of a worker: the first two may have been under way."""
        self._await_copies()
        pid = self._training_process(self._servers[index].pid)
        before = self._steps()
        began = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        while self._steps() < before + 3:
            time.sleep(0.002)
        return time.perf_counter() - began

    def _await_copies(self) -> None:
        """Returns when both shards have got a copy once more."""
        self._copies += 2
        deadline = time.monotonic() + WAIT_SECONDS
        while (self._folder / "log").read_text().count("has a copy on") < self._copies:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no copies within {WAIT_SECONDS:g} s")
            time.sleep(0.01)

    def memory(self) -> tuple[float, float]:
        """MiB that the launcher has for itself, and those of it and the training process together."""
        launcher, process = (_mib(pid) for pid in (self._victim.pid, self._training_process()))
        return launcher["Private_Dirty"] + launcher["Private_Clean"], launcher["Pss"] + process["Pss"]

    def _training_process(self, pid: int | None = None) -> int:
        """Of a pod by the number of its first process; of the worker that is lost."""
        pid = pid or self._victim.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _start(self, role: Role, index: int) -> "subprocess.Popen[bytes]":
        lost = (role, index) == (Role.WORKER, self._last)
        variables = {
            environment.JOB: self._config.encode(),
            environment.ROLE: role.value,
            environment.INDEX: str(index),
            environment.POD_UID: f"{role.value}-{index}-{len(self._processes)}",
            environment.PARENT_PID: str(os.getpid()),
            "OMP_NUM_THREADS": "1",
            **({environment.METRICS_PORT: str(self._metrics)} if lost else {}),
        }
        with (self._folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "disttrain_trainer"],
                env=os.environ | variables,
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)
        return process

    def _await_step(self) -> None:
        """Returns when the last worker has made a step. One that was lost does not answer, and its successor has made none at first."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            if self._steps():
                return
            time.sleep(0.005)
        raise TimeoutError(f"no step within {WAIT_SECONDS:g} s\n{(self._folder / 'log').read_text()[-4000:]}")

    def _steps(self) -> float:
        """Steps of the last worker's process; 0 when it does not answer."""
        found = None
        with contextlib.suppress(OSError):
            address = f"http://127.0.0.1:{self._metrics}/metrics"
            with urllib.request.urlopen(address, timeout=WAIT_SECONDS) as answer:
                text = answer.read().decode()
            found = re.search(r"^disttrain_step_duration_seconds_count\{.*\} (\S+)$", text, re.M)
        return float(found[1]) if found else 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _mib(pid: int) -> dict[str, float]:
    """The sums of /proc/PID/smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: float(rest.split()[0]) / 1024 for name, _, rest in (line.partition(":") for line in lines)}


def _lose_servers(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pods = Pods(Path(folder), REPLICATED)
        try:
            # The one that was filled last serves no shard: the other one does.
            seconds = [pods.without_server(number % 2) for number in range(rounds)]
        finally:
            pods.close()
    print(f"server with a copy: {rounds} losses, median {statistics.median(seconds):.2f} s, most {max(seconds):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="losses of each kind")
    parser.add_argument("--strategies", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--servers", action="store_true", help="servers with copies are lost, one after the other")
    options = parser.parse_args()
    if options.servers:
        _lose_servers(options.rounds)
        return
    print(
        f"{'strategy':<17} {'in place s':>10} {'noticed s':>9} {'new s':>7} {'new/in place':>12} {'launcher MiB':>12} {'pod MiB':>8}"
    )
    for strategy in options.strategies:
        with tempfile.TemporaryDirectory() as folder:
            pods = Pods(Path(folder), KINDS[strategy])
            try:
                own, both = pods.memory()
                seconds = [(*pods.in_place(), pods.new()) for _ in range(options.rounds)]
            finally:
                pods.close()
        in_place, noticed, new = (statistics.median(column) for column in zip(*seconds, strict=True))
        print(
            f"{strategy:<17} {in_place:>10.2f} {noticed:>9.2f} {new:>7.2f} {new / in_place:>12.1f} {own:>12.0f} {both:>8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
