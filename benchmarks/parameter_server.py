"""A synchronous parameter-server step against its peers and its limit.

    python benchmarks/parameter_server.py [--rounds 12] [--steps 5] [--mib 32] [--compute 0] [--tls | --copies]

Two workers exchange the gradients and parameters of a model of 32 MiB, each process with one thread for arithmetic, over loopback:

- ours: two servers; push, sum in part order, SGD, pull; as in a local run, over Unix sockets
- ours TCP: the same over TCP, as between machines
- all_reduce: torch.distributed over gloo, the same bytes, and no optimiser
- rpc: a parameter server of two processes on torch.distributed.rpc over TCP, push, sum, SGD, pull
- bare: the traffic of ours (the same processes, threads, connections, bytes and kind of memory, and each answer after all questions),
  with no sum, no optimiser and no protocol: the limit

With --copies, ours with a copy of each shard on the other server (replication: 2) against ours without: each update goes to the copy, too,
before a worker hears of it.

With --tls, ours under TLS (network.tls Mutual) against ours over TCP without, and beside it the bare traffic under TLS. A step of training
computes, too: --compute has each worker do arithmetic for so many milliseconds before it pushes.

All are set up first, and then take turns, so that whatever else the machine does hits each of them. Compare ratios, not times.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import rpc

from disttrain import certificates
from disttrain.api.job import Metadata
from disttrain.api.policies import Tls
from disttrain.api.runtime import Addresses, JobConfig
from disttrain.api.strategy import Strategy
from disttrain.api.trainer import Trainer
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.model.flat import bytes_of
from disttrain_trainer.net import transport
from disttrain_trainer.net.connection import LOCAL_BUFFER
from disttrain_trainer.net.connection import Connection as Wire
from disttrain_trainer.parameter_server import FlatModel, ShardedClient, ShardServer
from disttrain_trainer.runtime.memory import zeros
from disttrain_trainer.runtime.sockets import split_address

WORKERS = SERVERS = 2
RATE = 0.1

Step = Callable[[], object]
"""One step of one worker."""


def work_of(seconds: float) -> Step:
    """Arithmetic that takes so long on an idle core: always the same amount."""
    one, other, taken = torch.randn(128, 128), torch.randn(128, 128), []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(20):
            one @ other
        taken.append((time.perf_counter() - began) / 20)
    count = round(seconds / min(taken))

    def work() -> None:
        for _ in range(count):
            one @ other

    return work


# Ours.


def our_config(tls: Path | None = None, *, copies: bool = False) -> JobConfig:
    trainer = {"model": "a:b", "dataset": "a:c", "maxSteps": 1, "optimizer": {"name": "SGD", "learningRate": RATE}}
    return JobConfig(
        namespace="default",
        name="benchmark",
        uid="benchmark",
        attempt=1,
        strategy=Strategy.model_validate(
            {
                "type": "ParameterServer",
                "parameterServer": {"consistency": "Sync", "replication": 2 if copies else 1},
            }
        ),
        trainer=Trainer.model_validate(trainer),
        workers=WORKERS,
        parameter_servers=SERVERS,
        tls=Tls.DISABLED if tls is None else Tls.MUTUAL,
        addresses=Addresses(control="localhost:1", rendezvous="localhost:2"),
    )


def our_transport(config: JobConfig, tls: Path | None, *, tcp: bool) -> transport.Transport:
    return transport.PLAIN_TCP if tcp else transport.of(config, tls)


def our_server(
    index: int,
    control: Connection,
    elements: int,
    *,
    tls: Path | None = None,
    copies: bool = False,
    tcp: bool = False,
) -> None:
    config = our_config(tls, copies=copies)
    reached = our_transport(config, tls, tcp=tcp)
    server = ShardServer(config=config, index=index, host="127.0.0.1", port=0, transport=reached)
    server.start()
    server.begin(1, None)
    control.send(server.address)
    if copies:
        onto = (index + 1) % SERVERS
        server.replicate(index, onto, control.recv()[onto], lambda _, complete: control.send(complete))
    control.recv()


def our_worker(
    index: int,
    addresses: Sequence[str],
    elements: int,
    *,
    tls: Path | None = None,
    compute: float = 0,
    copies: bool = False,
    tcp: bool = False,
) -> Step:
    config, busy = our_config(tls, copies=copies), work_of(compute)
    flat = FlatModel(torch.nn.ParameterList([torch.zeros(elements)]))
    schedule = Schedule(samples=2, batch_size=2, parts_per_step=WORKERS, seed=0, max_steps=1_000_000)
    parameters, gradient = flat.parameters, flat.gradients()
    gradient[0].fill_(1)
    client = ShardedClient(
        addresses=addresses,
        config=config,
        rank=index,
        incarnation=f"worker-{index}",
        round_number=1,
        timeout=30,
        transport=our_transport(config, tls, tcp=tcp),
    )
    client.connect(flat.layout)
    client.initialize(parameters)
    client.pull(parameters, step=0)
    steps = iter(range(1_000_000))

    def step() -> None:
        busy()
        number = next(steps)
        client.push_pull(schedule.part(number * WORKERS + index), gradient, parameters, number + 1)

    return step


# torch.distributed.rpc.


class RpcShard:
    """The shard of one RPC server, as PyTorch's tutorial on batched RPC has it."""

    instance: "RpcShard"

    def __init__(self, elements: int) -> None:
        self.parameters = torch.zeros(elements)
        self.total = torch.zeros(elements)
        self.arrived = 0
        self.lock = threading.Lock()
        self.done: torch.futures.Future[torch.Tensor] = torch.futures.Future()

    @staticmethod
    @rpc.functions.async_execution
    def push_pull(gradient: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        self = RpcShard.instance
        with self.lock:
            self.total.add_(gradient, alpha=1 / WORKERS)
            self.arrived += 1
            done = self.done
            if self.arrived == WORKERS:
                self.parameters.add_(self.total, alpha=-RATE)
                self.total.zero_()
                self.arrived, self.done = 0, torch.futures.Future()
                done.set_result(self.parameters)
        return done


def rpc_start(name: str, rank: int, store: str) -> None:
    os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{store}", num_worker_threads=4, _transports=["uv"], _channels=["mpt_uv", "basic"]
    )
    rpc.init_rpc(name, rank=rank, world_size=WORKERS + SERVERS, rpc_backend_options=options)


def rpc_server(index: int, control: Connection, elements: int) -> None:
    RpcShard.instance = RpcShard(elements // SERVERS)
    control.send("")
    rpc_start(f"server-{index}", WORKERS + index, control.recv())
    control.recv()


def rpc_worker(index: int, addresses: Sequence[str], elements: int, store: str) -> Step:
    rpc_start(f"worker-{index}", index, store)
    parameters, gradients = torch.zeros(elements), torch.ones(elements).chunk(SERVERS)
    parts = parameters.chunk(SERVERS)

    def step() -> None:
        replies = [
            rpc.rpc_async(f"server-{i}", RpcShard.push_pull, args=(gradient,)) for i, gradient in enumerate(gradients)
        ]
        for part, reply in zip(parts, replies, strict=True):
            part.copy_(reply.wait())

    return step


# gloo's all_reduce.


def gloo_worker(index: int, addresses: Sequence[str], elements: int, store: str) -> Step:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=WORKERS)
    gradient = torch.ones(elements)
    return lambda: dist.all_reduce(gradient)


# The bare traffic.


class BareSocket:
    """A plain socket with what makes it fastest here, which is what ours does, too."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LOCAL_BUFFER)
        self._socket = sock
        self.send = sock.sendall

    def receive_into(self, view: memoryview) -> None:
        if not self._socket.recv_into(view, len(view), socket.MSG_WAITALL):
            raise ConnectionError


def bare_server(index: int, control: Connection, elements: int, *, tls: Path | None = None) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    control.send(f"127.0.0.1:{listener.getsockname()[1]}")
    start = threading.Barrier(WORKERS)

    def serve(sock: socket.socket) -> None:
        end: BareSocket | Wire = BareSocket(sock)
        if tls is not None:
            end = transport.of(our_config(tls), tls).accept(sock, timeout=3600)
            end.handshake(within=30)
        buffer = bytes_of(zeros(elements // SERVERS, torch.float32))
        with suppress(OSError):
            while True:
                end.receive_into(buffer)
                start.wait()
                end.send(buffer)

    for _ in range(WORKERS):
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
    control.recv()


def bare_worker(
    index: int, addresses: Sequence[str], elements: int, *, tls: Path | None = None, compute: float = 0
) -> Step:
    size, busy = 4 * elements // SERVERS, work_of(compute)
    sends, receives = (bytes_of(zeros(elements, torch.float32)) for _ in range(2))
    ends: list[BareSocket | Wire] = []
    for address in addresses:
        if tls is None:
            ends.append(BareSocket(socket.create_connection(split_address(address))))
        else:
            ends.append(transport.of(our_config(tls), tls).dial(address, timeout=3600, within=30))
    starts = [threading.Semaphore(0) for _ in ends]
    done = threading.Semaphore(0)

    def exchange(number: int) -> None:
        part = slice(number * size, (number + 1) * size)
        while True:
            starts[number].acquire()
            ends[number].send(sends[part])
            ends[number].receive_into(receives[part])
            done.release()

    for number in range(len(ends)):
        threading.Thread(target=exchange, args=(number,), daemon=True).start()

    def step() -> None:
        busy()
        for start in starts:
            start.release()
        for _ in ends:
            done.acquire()

    return step


# The race.


def serve(target: Callable[..., None], index: int, control: Connection, elements: int) -> None:
    torch.set_num_threads(1)
    with suppress(EOFError, KeyboardInterrupt):
        target(index, control, elements)
    os._exit(0)


def work(build: Callable[..., Step], control: Connection, arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    with suppress(EOFError, KeyboardInterrupt):
        step = build(*arguments)
        step()
        control.send(None)
        while True:
            steps = control.recv()
            begin = time.perf_counter()
            for _ in range(steps):
                step()
            control.send((time.perf_counter() - begin) / steps)
    os._exit(0)


class Contender:
    """The processes of one way to do it."""

    def __init__(
        self,
        *,
        elements: int,
        worker: Callable[..., Step],
        server: Callable[..., None] | None = None,
        store: str | None = None,
        copies: bool = False,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.rpc"])
        self._servers: list[Connection] = []
        self._workers: list[Connection] = []
        self._pids: list[int] = []
        addresses: list[str] = []
        if server is not None:
            for index in range(SERVERS):
                ours, theirs = context.Pipe()
                self._start(context.Process(target=serve, args=(server, index, theirs, elements), daemon=True))
                addresses.append(ours.recv())
                if store is not None:
                    ours.send(store)
                self._servers.append(ours)
        for control in self._servers if copies else ():
            control.send(addresses)
        for index in range(WORKERS):
            ours, theirs = context.Pipe()
            arguments = (index, addresses, elements, *([] if store is None else [store]))
            self._start(context.Process(target=work, args=(worker, theirs, arguments), daemon=True))
            self._workers.append(ours)
        for control in self._workers:
            control.recv()
        for control in self._servers if copies else ():
            if not control.recv():
                raise ConnectionError("a copy was lost")

    def run(self, steps: int) -> tuple[float, float]:
        """Seconds of a step by the clock, for the slowest worker, and of CPU time, for all processes together."""
        before = self._cpu()
        for control in self._workers:
            control.send(steps)
        return max(control.recv() for control in self._workers), (self._cpu() - before) / steps

    def _start(self, process: BaseProcess) -> None:
        process.start()
        self._pids.append(process.pid or 0)

    def _cpu(self) -> float:
        ticks = 0
        for pid in self._pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="steps of each in a round")
    parser.add_argument("--mib", type=int, default=32, help="size of the model")
    parser.add_argument("--compute", type=float, default=0, help="ms of arithmetic before each push (of ours and bare)")
    parser.add_argument("--tls", action="store_true", help="ours and bare, plain and under TLS")
    parser.add_argument("--copies", action="store_true", help="ours with and without copies of the shards")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        contenders = starters(arguments, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in contenders}
        cpu = dict.fromkeys(contenders, 0.0)
        for _ in range(arguments.rounds):
            for name, contender in contenders.items():
                seconds, work_seconds = contender.run(arguments.steps)
                times[name].append(seconds)
                cpu[name] += work_seconds / arguments.rounds
    compute = f", {arguments.compute:g} ms of compute" if arguments.compute else ""
    print(
        f"{WORKERS} workers, {SERVERS} servers, {arguments.mib} MiB{compute}; {arguments.rounds} rounds of {arguments.steps} steps each"
    )
    first, targets = ("TLS", {"ours": 2.0, "bare TLS": 1.3}) if arguments.tls else ("ours", TARGETS)
    if arguments.copies:
        first, targets = "copies", {"ours": 1.25}
    print(f"{'':12}{'best ms':>10}{'median ms':>11}{'CPU ms':>8}{f'{first} / it: best':>17}{'median':>8}{'target':>9}")
    for name, measured in times.items():
        best, median = min(measured), statistics.median(measured)
        ratios = [ours / theirs for ours, theirs in zip(times[first], measured, strict=True)]
        line = f"{name:12}{best * 1e3:10.1f}{median * 1e3:11.1f}{cpu[name] * 1e3:8.0f}"
        if name in targets:
            line += f"{min(times[first]) / best:17.2f}{statistics.median(ratios):8.2f}{'<= ' + str(targets[name]):>9}"
        print(line)


TARGETS = {"all_reduce": 0.9, "rpc": 1.0, "bare": 1.3}


def starters(arguments: argparse.Namespace, folder: Path) -> dict[str, Contender]:
    """Those who take part, started."""
    elements, compute = arguments.mib * (1 << 18), arguments.compute / 1e3

    def ours(worker: Callable[..., Step], server: Callable[..., None], tls: Path | None = None) -> Contender:
        return Contender(
            elements=elements, worker=partial(worker, tls=tls, compute=compute), server=partial(server, tls=tls)
        )

    if arguments.copies:
        copied = Contender(
            elements=elements,
            worker=partial(our_worker, compute=compute, copies=True),
            server=partial(our_server, copies=True),
            copies=True,
        )
        return {"ours": ours(our_worker, our_server), "copies": copied}
    tcp = ours(partial(our_worker, tcp=True), partial(our_server, tcp=True))
    if arguments.tls:
        job = Metadata(name="benchmark", namespace="default", uid="benchmark")
        for name, content in certificates.of_attempt(job, 1, now=datetime.now(UTC)).items():
            (folder / name).write_bytes(content)
        return {
            "ours": tcp,
            "TLS": ours(our_worker, our_server, folder),
            "bare": ours(bare_worker, bare_server),
            "bare TLS": ours(bare_worker, bare_server, folder),
        }
    return {
        "ours": ours(our_worker, our_server),
        "ours TCP": tcp,
        "all_reduce": Contender(elements=elements, worker=gloo_worker, store=f"{folder}/gloo"),
        "rpc": Contender(elements=elements, worker=rpc_worker, server=rpc_server, store=f"{folder}/rpc"),
        "bare": ours(bare_worker, bare_server),
    }


if __name__ == "__main__":
    main()
