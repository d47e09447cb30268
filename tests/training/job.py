"""A job as real processes on loopback: started, killed, frozen and replaced the way the operator and `disttrain run` do it.

    with Job(folder=tmp_path, spec=digits(strategy=...)) as job:
        job.start()
        job.until(lambda progress: progress.step >= 20)
        job.kill(Role.WORKER, 0)
        progress = job.complete()

Processes are forked from a server that has imported torch once, so that one starts in 30 ms and not in 3 s; `program=True` starts
`python -m disttrain_trainer` instead. What must happen in the middle of a training happens while it is held (`held`, `Job.let_go`), not
while it runs. `in_place`: as in a pod, workers and servers have a launcher, which restarts its process in place.
Not here: plan.decide; what counts as a retry is the table of the design, in `RETRYABLE`.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cluster.processes import wait_for
from configs import config_of
from disttrain.api import environment
from disttrain.api.job import Metadata
from disttrain.api.names import MODEL_FILE, Role, checkpoint_dir
from disttrain.api.policies import Tls
from disttrain.api.runtime import Addresses, Progress
from disttrain.api.termination import Termination
from transports import certificate

os.environ.setdefault("OMP_NUM_THREADS", "1")

RETRYABLE = frozenset({int(environment.ExitCode.PEER_LOST), *(128 + number for number in range(1, 65))})
Key = tuple[Role, int]
Model = dict[str, torch.Tensor]

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "disttrain_trainer.entry",
        "disttrain_trainer.strategies.parameter_server",
        "disttrain_trainer.parameter_server.role",
        "disttrain_trainer.strategies.collective",
        "disttrain_trainer.strategies.sharded",
        "disttrain_trainer.strategies.group_rank",
        "torch._dynamo",  # DistributedDataParallel imports it when it is made, and that takes longer than torch
    ]
)


def digits(**changes: Any) -> dict[str, Any]:
    """The spec of a digits job, with these fields changed: strategy, trainer (merged), worker, parameterServer, checkpoint."""
    trainer = {
        "model": "disttrain_trainer.examples.digits:model",
        "dataset": "disttrain_trainer.examples.digits:dataset",
        "loss": "disttrain_trainer.examples.digits:loss",
        "evaluate": "disttrain_trainer.examples.digits:evaluate",
        "optimizer": {"name": "SGD", "learningRate": 0.1, "momentum": 0.9},
        "batchSize": 64,
        "epochs": 10,
    } | changes.pop("trainer", {})
    return {
        "strategy": {"type": "DataParallel"},
        "worker": {"replicas": 2},
        "trainer": {name: value for name, value in trainer.items() if value is not None},
        **changes,
    }


MUTUAL: dict[str, Any] = {"network": {"tls": "Mutual"}}
"""The field of a spec that encrypts the traffic."""


def served(consistency: str, *, servers: int = 2, staleness: int | None = None) -> dict[str, Any]:
    """The fields of a spec that make it one with parameter servers."""
    chosen: dict[str, Any] = {"consistency": consistency}
    if staleness is not None:
        chosen["maxStaleness"] = staleness
    return {
        "strategy": {"type": "ParameterServer", "parameterServer": chosen},
        "parameterServer": {"replicas": servers},
    }


def held(**trainer: Any) -> dict[str, Any]:
    """The trainer's fields of a digits job whose workers compute no part of the step that `Job.hold` names, nor of later ones."""
    return {"loss": "held_loss:loss", **trainer}


HELD_LOSS = """
import time
from pathlib import Path
import torch
from disttrain_trainer.examples import digits
from disttrain_trainer.data.chance import mix

# Parts by what the trainer seeds each one with; in a pipeline each micro-batch.
NUMBER = {seed: number for number in range(1 << 12) for seed in (mix(0, number), *(mix(mix(0, number), micro) for micro in range(4)))}

def held_parts():  # how many parts the training may compute, and how many a step has
    try:
        return map(int, Path("hold").read_text().split())
    except FileNotFoundError:
        return 1 << 40, 0

def loss(model, batch):
    number = NUMBER[torch.initial_seed() & ((1 << 64) - 1)]
    free, step = held_parts()
    if free - 2 * step <= number < free:
        # So that a report is due after it, and the master knows. Of two steps: a worker that falls behind may compute no part of the last.
        time.sleep(0.15)
    while number >= free:
        time.sleep(0.005)
        free, step = held_parts()
    return digits.loss(model, batch)
"""


def checkpoints(every: int, *, keep: int = 3) -> dict[str, Any]:
    """The field of a spec that asks for checkpoints."""
    return {"checkpoint": {"volume": {"persistentVolumeClaim": "claim"}, "everySteps": every, "keep": keep}}


@dataclass(eq=False)
class _Started:
    """A process of the job."""

    process: Any
    termination: Path
    log: Path

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def sentinel(self) -> int:
        return int(self.process.sentinel) if hasattr(self.process, "sentinel") else self.pidfd

    def __post_init__(self) -> None:
        self.pidfd = -1 if hasattr(self.process, "sentinel") else os.pidfd_open(self.pid)

    def code(self, timeout: float) -> int:
        """The exit code, 128 + n after signal n. TimeoutError when it runs on."""
        if isinstance(self.process, subprocess.Popen):
            try:
                code = self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise TimeoutError from None
        else:
            self.process.join(timeout)
            code = self.process.exitcode
            if code is None:
                raise TimeoutError
        return 128 - code if code < 0 else code


class Job:
    """The processes of one attempt. A context: what still runs at its end is killed."""

    def __init__(
        self,
        *,
        folder: Path,
        spec: dict[str, Any],
        peer_timeout: float = 10,
        startup_timeout: float = 60,
        attempt: int = 1,
        uid: str = "11111111-2222-3333-4444-555555555555",
        program: bool = False,
        in_place: bool = False,
        env: dict[str, str] | None = None,
        claim: Path | None = None,
        name: str = "job",
    ) -> None:
        """claim: a folder that several jobs share, in which this one has a folder of its own, as on a cluster."""
        self._held: list[socket.socket] = []
        config = config_of(
            spec,
            name=name,
            uid=uid,
            attempt=attempt,
            startup_timeout_seconds=startup_timeout,
            peer_timeout_seconds=peer_timeout,
        )
        control, rendezvous, metrics, *servers = (self.free_port() for _ in range(3 + config.parameter_servers))
        keeping = config.workers if config.data is not None and config.data.replication > 1 else 0
        addresses = Addresses(
            control=f"127.0.0.1:{control}",
            rendezvous=f"127.0.0.1:{rendezvous}",
            parameter_servers=tuple(f"127.0.0.1:{port}" for port in servers),
            copies=tuple(f"127.0.0.1:{self.free_port()}" for _ in range(keeping)),
        )
        self.config = config.model_copy(update={"addresses": addresses})
        self.folder = folder
        self.metrics_port = metrics
        own = claim / Path(checkpoint_dir(name, uid)).name if claim else folder / "checkpoints"
        self.checkpoints = own if config.checkpoint else None
        (folder / "held_loss.py").write_text(HELD_LOSS)
        self._tls = None
        if config.tls is Tls.MUTUAL:
            self._tls = certificate(
                folder / "tls", Metadata(name=name, namespace=config.namespace, uid=uid), attempt=attempt
            )
        self.processes: dict[Key, _Started] = {}
        self.restarts: dict[Key, int] = {}
        self._program = program
        self._in_place = in_place
        self._env = env or {}
        self._count = 0

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for key in list(self.processes):
            with contextlib.suppress(ProcessLookupError):
                self.kill(key[0], key[1])
            self.processes[key].code(10)
        for held in self._held:
            held.close()

    def free_port(self) -> int:
        """A port of loopback for one process of this job, which no other process gets before the end of the job.

        Held by a socket that is bound and never listens: a program that sets SO_REUSEADDR, as every server does, can listen all the same.
        """
        held = socket.socket()
        # Port 0 with SO_REUSEADDR may be given a port that another such socket holds: ask without, then set it for those who join.
        held.bind(("127.0.0.1", 0))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.append(held)
        return int(held.getsockname()[1])

    def hold(self, step: int) -> None:
        """The workers of a `held` training stop at this step. Call it before `start`, or while they stop at an earlier one."""
        size, new = self.config.parts_per_step, self.folder / "hold.new"
        new.write_text(f"{step * size} {size}")
        new.replace(self.folder / "hold")

    def until_held(self, step: int, *, checkpoint: int | None = None) -> Progress:
        """The progress when the training has stopped there, and has a checkpoint of that step or a later one."""
        return self.until(
            lambda p: (
                p.step == step
                and (checkpoint is None or bool(p.last_checkpoint and p.last_checkpoint.step >= checkpoint))
            )
        )

    def let_go(self) -> None:
        """The training goes on."""
        (self.folder / "hold").unlink()

    @property
    def keys(self) -> list[Key]:
        """Every process that the job wants."""
        return [
            (Role.MASTER, 0),
            *((Role.PARAMETER_SERVER, index) for index in range(self.config.parameter_servers)),
            *((Role.WORKER, index) for index in range(self.config.workers)),
        ]

    def start(self) -> None:
        """Starts every process."""
        for role, index in self.keys:
            self.start_one(role, index)

    def start_one(self, role: Role, index: int = 0) -> None:
        """Starts a process, or its replacement."""
        self._count += 1
        name = f"{role.value}-{index}.{self._count}"
        termination, log = self.folder / f"{name}.termination", self.folder / f"{name}.log"
        env = self.environment(role, index) | {environment.TERMINATION_LOG: str(termination)}
        log.touch()  # a forked process opens it only later, and may be asked about before
        process: Any
        if self._program:
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "disttrain_trainer"],
                    env={**os.environ, **env, environment.PARENT_PID: str(os.getpid())},
                    cwd=self.folder,
                    stderr=file,
                    stdout=file,
                )
        else:
            process = _forks.Process(target=_run, args=(env, str(log), str(self.folder)), name=name)
            process.start()
        self.processes[role, index] = _Started(process, termination, log)

    def environment(self, role: Role, index: int) -> dict[str, str]:
        """What the operator sets in the process's environment."""
        env = {
            environment.JOB: self.config.model_dump_json(by_alias=True, exclude_none=True),
            environment.ROLE: role.value,
            environment.INDEX: str(index),
            environment.ATTEMPT: str(self.config.attempt),
            **self._env,
        }
        if self._tls is not None:
            env[environment.TLS_DIR] = str(self._tls)
        if role is Role.WORKER and self.config.addresses.copies:
            env[environment.COPIES_DIR] = str(self.copies(index))
        if self._in_place:
            env[environment.POD_UID] = f"{role.value}-{index}.{self._count}"
        if role is Role.MASTER:
            env[environment.METRICS_PORT] = str(self.metrics_port)
        if self.checkpoints is not None:
            env[environment.CHECKPOINT_DIR] = str(self.checkpoints)
        return env

    def copies(self, worker: int) -> Path:
        """The disk of a worker, for its copies of the data."""
        return self.folder / "copies" / f"worker-{worker}"

    def kill(self, role: Role, index: int = 0, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal: SIGKILL, SIGTERM, SIGSTOP, SIGCONT."""
        os.kill(self.processes[role, index].pid, number)

    def inner(self, role: Role, index: int = 0) -> list[int]:
        """The training processes that the launcher of an `in_place` job has started."""
        pid = self.processes[role, index].pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill_inner(self, role: Role, index: int = 0, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal to the training process of an `in_place` job, once it is there; its number."""
        (pid,) = wait_for("the training process", lambda: self.inner(role, index), 30)
        os.kill(pid, number)
        return pid

    def wait(self, role: Role, index: int = 0, *, timeout: float = 60) -> int:
        """The exit code of a process, 128 + n after signal n. TimeoutError, with its log, when it runs on."""
        try:
            return self.processes[role, index].code(timeout)
        except TimeoutError:
            raise TimeoutError(f"{role.value}-{index} runs on after {timeout} s\n{self.log(role, index)}") from None

    def supervise(self, *, timeout: float = 60) -> int:
        """Replaces what fails with a retryable code, until the master ends; its exit code, or the first one that is final."""
        deadline = time.monotonic() + timeout
        watched = dict(self.processes)
        while True:
            left = deadline - time.monotonic()
            ended = wait_for_any([started.sentinel for started in watched.values()], max(0, left))
            if not ended:
                raise TimeoutError(f"the job runs on after {timeout} s\n{self.logs()}")
            for key, started in list(watched.items()):
                if started.sentinel not in ended:
                    continue
                del watched[key]
                code = started.code(1)
                if code in RETRYABLE:
                    self.restarts[key] = self.restarts.get(key, 0) + 1
                    self.start_one(*key)
                    watched[key] = self.processes[key]
                elif code or key[0] is Role.MASTER:
                    return code

    def train(self, *, timeout: float = 60) -> Progress:
        """Starts every process, and sees the job to its end."""
        self.start()
        return self.complete(timeout=timeout)

    def complete(self, *, timeout: float = 60) -> Progress:
        """Sees the job to its end, which must be a good one; the last progress."""
        code = self.supervise(timeout=timeout)
        assert code == 0, self.logs()
        progress = self.termination(Role.MASTER).progress
        assert progress is not None
        return progress

    def progress(self) -> Progress | None:
        """What the master says now; None when it cannot be asked."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/progress", timeout=5) as answer:
                return Progress.model_validate_json(answer.read())
        except OSError:
            return None

    def metrics(self) -> str:
        """The master's metrics, in the exposition format."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    def until(self, condition: Callable[[Progress], bool], *, timeout: float = 60, tolerate: bool = False) -> Progress:
        """The first progress for which the condition holds, as the operator would see it. TimeoutError, with all logs.

        tolerate: a process that has failed is expected; otherwise it is an AssertionError.
        """
        deadline = time.monotonic() + timeout
        pause = threading.Event()
        while time.monotonic() < deadline:
            progress = self.progress()
            if progress is not None and condition(progress):
                return progress
            for (role, index), started in self.processes.items():
                if not tolerate and wait_for_any([started.sentinel], 0) and (code := started.code(1)):
                    raise AssertionError(f"{role.value}-{index} ended with code {code}\n{self.logs()}")
            pause.wait(0.005)
        raise TimeoutError(f"not within {timeout} s; the last progress: {self.progress()}\n{self.logs()}")

    def termination(self, role: Role, index: int = 0) -> Termination:
        """The termination message of a process that has ended."""
        path = self.processes[role, index].termination
        return Termination.decode(path.read_text()) if path.exists() else Termination()

    @property
    def model(self) -> Model:
        """The trained model, of a job with checkpoints."""
        assert self.checkpoints is not None
        return load_file(self.checkpoints / MODEL_FILE)

    def log(self, role: Role, index: int = 0) -> str:
        """What the newest process of this name wrote to standard error."""
        return self.processes[role, index].log.read_text(errors="replace")

    def logs(self) -> str:
        """What all of them wrote, those that were replaced included."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')}" for path in sorted(self.folder.glob("*.log"))
        )


def trained(folder: Path, spec: dict[str, Any], *, files: Mapping[str, str] | None = None, **options: Any) -> Model:
    """The model of a training that nothing disturbs. files: those of its folder, text by name. options: of Job."""
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    with Job(folder=folder, spec=spec, **options) as job:
        job.train()
    return job.model


def same(one: Model, other: Model) -> bool:
    """Whether two models have the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def manifests(folder: Path) -> list[dict[str, Any]]:
    """The manifests of a checkpoint folder, oldest first."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("step-*/manifest.json"))]


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors of a rank's checkpoint of this step."""
    (file,) = (folder / "checkpoints" / f"step-{step:08d}").glob("state-*.safetensors")
    return load_file(file)


def final_parameters(folder: Path, step: int) -> torch.Tensor:
    """The parameters of one dtype in the servers' checkpoint of this step, as a worker has them."""
    manifest = json.loads((folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    shards = sorted(name for name in manifest["files"] if name.startswith("shard-"))
    found = [load_file(folder / "checkpoints" / f"step-{step:08d}" / name)["0.parameters"] for name in shards]
    return torch.cat(found)


def _run(env: dict[str, str], log: str, folder: str) -> None:
    """A forked process becomes a training process; of one that has to fail, the folder's fault.py says how."""
    from disttrain_trainer.entry import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(env)
    os.environ[environment.PARENT_PID] = str(os.getppid())
    os.chdir(folder)
    if Path("fault.py").exists():
        exec(Path("fault.py").read_text(), {"__name__": "fault"})
    sys.exit(main([]))
