"""What happens to a parameter server's shards when something dies, freezes, comes back, or talks nonsense."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import transports
from disttrain.api.policies import Tls
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.errors import PeerLost, Refused, RoundOver, WrongInput
from disttrain_trainer.net import transport
from disttrain_trainer.net.frames import Header, Op
from disttrain_trainer.net.transport import PLAIN, Transport
from training.parameter_servers import (
    ASYNC,
    MOMENTUM,
    SYNC,
    Worker,
    enter,
    in_threads,
    make_client,
    make_config,
    push_header,
    serving,
)
from training.test_parameter_server_async import ONE, vector_model, whole_gradient
from transports import certificate

TESTS = Path(__file__).parents[1]


def soon(condition, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def lost_workers() -> Iterator[list[tuple[object, ...]]]:
    """(shard, worker) of each line of the servers' log that a worker is lost."""
    found: list[tuple[object, ...]] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "lost worker" in record.msg and isinstance(record.args, tuple):
                found.append(record.args[:2])

    log, handler = logging.getLogger("disttrain_trainer.parameter_server.server"), Lines()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


@contextlib.contextmanager
def python(program: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs this program; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def test_a_lost_server_of_a_small_model_is_noticed_while_another_one_waits_for_workers() -> None:
    """One thread asks both servers, and reads what comes first."""
    config = make_config(workers=2, servers=2, consistency=SYNC, optimizer=ONE)
    schedule = Schedule(samples=8, batch_size=4, parts_per_step=2, seed=0, max_steps=10)
    with serving(config) as servers:
        flat = vector_model(64)
        client = enter(make_client(servers, config, rank=0), flat)
        enter(make_client(servers, config, rank=1), vector_model(64))
        client.pull(flat.parameters, step=0)
        client.push(schedule.part(0), whole_gradient(0, 64))
        lost = threading.Timer(0.7, servers[1].drop, (0,))  # both have said meanwhile what they wait for
        lost.start()
        with pytest.raises(PeerLost, match="parameter-server-1"):
            client.pull(flat.parameters, step=1)
        lost.join()


def test_a_worker_killed_in_the_middle_of_a_push_leaves_nothing_behind_and_its_part_is_done_by_another() -> None:
    config = make_config(workers=2, servers=2, consistency=SYNC, optimizer=ONE)
    schedule = Schedule(samples=8, batch_size=4, parts_per_step=2, seed=0, max_steps=10)
    length = 1_000_000
    with serving(config) as servers, lost_workers() as lost:
        flat = vector_model(length)
        client = enter(make_client(servers, config, rank=0), flat)
        client.pull(flat.parameters, step=0)
        client.push(schedule.part(0), whole_gradient(0, length))
        # The worker of part 1 sends all of its gradient to shard 0, and half of it to shard 1.
        with python(f"""
            import os, signal
            from training.parameter_servers import push_header
            from training.test_parameter_server_async import vector_model, whole_gradient
            from disttrain.api.runtime import JobConfig
            from disttrain_trainer.data.schedule import Schedule
            from disttrain_trainer.parameter_server import ShardedClient

            config = JobConfig.model_validate_json({config.model_dump_json(by_alias=True)!r})
            schedule = Schedule(samples=8, batch_size=4, parts_per_step=2, seed=0, max_steps=10)
            flat = vector_model({length})
            client = ShardedClient(
                addresses={[server.address for server in servers]!r},
                config=config, rank=1, incarnation="first", round_number=1, timeout=10,
            )
            client.connect(flat.layout)
            client.pull(flat.parameters, step=0)
            gradient = whole_gradient(1, {length})
            for shard, part in zip(client.connections, (1, 0.5)):
                (view,) = shard.views(gradient)
                header = push_header(client, shard, schedule.part(1))
                shard.link.send(header, [view[: int(len(view) * part)]])
            os.kill(os.getpid(), signal.SIGKILL)
        """) as process:
            assert process.wait(60) == -signal.SIGKILL
        assert soon(lambda: sorted(lost) == [(0, 1), (1, 1)])
        assert [server.state().version for server in servers] == [1, 0]
        assert [server.state().applied.intervals() for server in servers] == [[(0, 2)], [(0, 1)]]

        # Another worker redoes part 1 on version 0, which shard 0 has left already, but keeps.
        other, values = make_client(servers, config, rank=1, incarnation="second"), vector_model(length)
        other.connect(values.layout)
        assert other.pull(values.parameters, step=0) == (0, 0)
        assert torch.equal(values.parameters[0], torch.zeros(length))
        other.push(schedule.part(1), whole_gradient(1, length))
        assert client.pull(flat.parameters, step=1) == (1, 1)
        mean = (whole_gradient(0, length)[0] + whole_gradient(1, length)[0]) / 2
        assert torch.equal(flat.parameters[0], -mean)
        assert [server.state().late_gradients for server in servers] == [1, 0]


SERVER = """
    import sys, threading
    from disttrain.api.runtime import JobConfig
    from pathlib import Path
    from disttrain_trainer.net import transport
    from disttrain_trainer.parameter_server import ShardServer

    config = JobConfig.model_validate_json({config!r})
    server = ShardServer(config=config, index=1, host="127.0.0.1", port=0, transport=transport.of(config, Path({folder!r})))
    server.start()
    server.begin(1, None)
    print(server.address, flush=True)
    threading.Event().wait()
"""


def test_keys_of_a_connection_change_before_they_have_encrypted_too_much_and_no_bit_of_the_training_does(
    tmp_path: Path,
) -> None:
    config = make_config(workers=1, servers=2, optimizer=MOMENTUM)
    schedule = Schedule(samples=400, batch_size=3, parts_per_step=1, seed=0, max_steps=40)

    def trained(transport: Transport) -> tuple[torch.Tensor, list[bool]]:
        spent = []
        with serving(config, transport=transport) as servers:
            flat = vector_model()
            client = enter(make_client(servers, config, transport=transport), flat)
            for index in range(40):
                client.push_pull(schedule.part(index), whole_gradient(index), flat.parameters, index + 1)
                link = client.connections[0].link
                assert link is not None
                spent.append(link.spent)
            client.close()
        return flat.parameters[0].clone(), spent

    plain, never = trained(PLAIN)
    encrypted, spent = trained(transports.certified(tmp_path, records=8))
    assert torch.equal(plain, encrypted)
    assert not any(never)
    assert 5 <= sum(spent) <= 20, "they are spent again and again, and changed each time"


@pytest.mark.parametrize("tls", list(Tls))
def test_a_frozen_server_costs_each_call_its_time_out_and_is_named_and_a_killed_one_is_noticed_at_once(
    tmp_path: Path, tls: Tls
) -> None:
    config = make_config(workers=1, servers=2, consistency=SYNC, optimizer=ONE).model_copy(update={"tls": tls})
    certificate(tmp_path)
    chosen = transport.of(config, tmp_path)
    program = SERVER.format(config=config.model_dump_json(by_alias=True), folder=str(tmp_path))
    schedule = Schedule(samples=8, batch_size=4, parts_per_step=1, seed=0, max_steps=10)
    length = 8_000_000  # more than the sockets' buffers hold
    with serving(config, transport=chosen) as servers, python(program) as process:
        assert process.stdout is not None
        remote = process.stdout.readline().strip()

        class Remote:
            address = remote

        flat = vector_model(length)

        def connected(timeout: float = 1):
            client = make_client([servers[0], Remote()], config, timeout=timeout, transport=chosen)  # type: ignore[list-item]
            client.connect(flat.layout)
            client.initialize(flat.parameters)
            client.pull(flat.parameters)
            return client

        for call in (
            lambda client: client.pull(flat.parameters, step=0),
            lambda client: client.push_pull(schedule.part(0), whole_gradient(0, length), flat.parameters, 1),
            lambda client: client.join(),
        ):
            client = connected()
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)  # the signal takes its time
            begin = time.monotonic()
            with pytest.raises(PeerLost, match=rf"parameter-server-1 \({remote}\): silent for 1 s; waited for"):
                call(client)
            # No wait of the server's end, of 20 and 30 s, has ended it.
            assert 0.9 < time.monotonic() - begin < 15
            process.send_signal(signal.SIGCONT)
            client.close()

        client = connected(timeout=20)
        threading.Timer(0.2, process.kill).start()
        begin = time.monotonic()
        with pytest.raises(PeerLost, match="parameter-server-1") as lost:
            client.pull(flat.parameters, step=5)
        assert "silent" not in str(lost.value)
        assert time.monotonic() - begin < 15


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"uid": "uid-2"}, "job uid-2", id="another job of the same name"),
        pytest.param({"attempt": 2}, "attempt 2", id="another attempt"),
        pytest.param({"optimizer": MOMENTUM}, "configuration", id="another configuration"),
    ],
)
def test_strangers_are_refused_with_a_reason(changes: dict, reason: str) -> None:
    config = make_config()
    with serving(config) as servers:
        client = make_client(servers, make_config(**changes))
        with pytest.raises(Refused, match=reason):
            client.connect(vector_model().layout)


def test_an_older_incarnation_is_sent_away_and_cannot_come_back() -> None:
    config = make_config()
    with serving(config) as servers, lost_workers() as lost:
        layout = vector_model().layout
        old = make_client(servers, config, incarnation="old")
        old.connect(layout)
        new = make_client(servers, config, incarnation="new")
        new.connect(layout)
        with pytest.raises(PeerLost):
            old.join()
        with pytest.raises(Refused, match="replaced by a newer incarnation"):
            make_client(servers, config, incarnation="old").connect(layout)
        new.join()
        again = make_client(servers, config, incarnation="new")
        again.connect(layout)
        again.join()
        assert lost == []


def test_a_worker_with_another_model_is_refused() -> None:
    config = make_config(workers=2)
    with serving(config) as servers:
        make_client(servers, config, rank=0).connect(vector_model(100).layout)
        with pytest.raises(WrongInput, match="names, shapes or dtypes of the parameters differ"):
            make_client(servers, config, rank=1).connect(vector_model(101).layout)


def test_a_new_round_refuses_the_workers_of_the_old_one_and_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    config = make_config(workers=2, servers=2, consistency=ASYNC, optimizer=MOMENTUM)
    schedule = Schedule(samples=80, batch_size=4, parts_per_step=2, seed=0, max_steps=20)
    with serving(config) as servers:
        flat = vector_model()
        client = enter(make_client(servers, config, incarnation="one"), flat, join=True)

        def steps(first: int) -> torch.Tensor:
            for index in range(first, first + 5):
                client.push_pull(schedule.part(index), whole_gradient(index), flat.parameters)
            return flat.parameters[0].clone()

        steps(0)
        saved = [server.save(tmp_path / f"shard-{i}.safetensors") for i, server in enumerate(servers)]
        assert [(s.version, s.applied.floor) for s in saved] == [(5, 5), (5, 5)]
        before = steps(5)
        waiting = make_client(servers, config, rank=1)
        waiting.connect(flat.layout)

        for i, server in enumerate(servers):
            server.begin(2, tmp_path / f"shard-{i}.safetensors")
        with pytest.raises(RoundOver):
            client.pull(flat.parameters)
        with pytest.raises(RoundOver, match="round 1 is over"):
            make_client(servers, config, incarnation="one").connect(flat.layout)
        client = make_client(servers, config, incarnation="one", round_number=2)
        client.connect(flat.layout)
        assert client.initialized
        client.join()
        assert client.pull(flat.parameters) == (5, 5)
        assert torch.equal(steps(5), before)


def test_a_checkpoint_in_the_middle_of_a_synchronous_step_is_of_the_step_before(tmp_path: Path) -> None:
    config = make_config(workers=2, servers=2, optimizer=MOMENTUM)
    schedule = Schedule(samples=80, batch_size=4, parts_per_step=2, seed=0, max_steps=20)
    with serving(config) as servers:
        flat = vector_model()
        client = enter(make_client(servers, config), flat)
        for index in range(3):
            client.push(schedule.part(index), whole_gradient(index))
        saved = [server.save(tmp_path / f"{server.address}.safetensors") for server in servers]
        assert [(s.version, s.applied.intervals()) for s in saved] == [(1, [(0, 2)])] * 2
        assert [server.state().applied.intervals() for server in servers] == [[(0, 3)]] * 2
        client.push(schedule.part(3), whole_gradient(3))
        client.pull(flat.parameters, step=2)
        before = flat.parameters[0].clone()

        for server in servers:
            server.begin(2, tmp_path / f"{server.address}.safetensors")
        client = make_client(servers, config, round_number=2)
        client.connect(flat.layout)
        for index in (3, 2):
            client.push(schedule.part(index), whole_gradient(index))
        assert client.pull(flat.parameters, step=2) == (2, 2)
        assert torch.equal(flat.parameters[0], before)


def test_a_worker_that_waits_when_the_round_ends_gets_an_error() -> None:
    config = make_config(workers=2, servers=1)
    with serving(config) as servers:
        flat = vector_model()
        client = enter(make_client(servers, config), flat)
        threading.Timer(0.2, servers[0].begin, (2,)).start()
        with pytest.raises(RoundOver, match="round 1 is over"):
            client.pull(flat.parameters, step=1)


def test_a_server_that_never_comes_is_named() -> None:
    config = make_config(servers=2, startup_timeout=0.3)
    with serving(config) as servers, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.close()

        class SilentServer:
            address = f"127.0.0.1:{port}"

        client = make_client([servers[0], SilentServer()], config)  # type: ignore[list-item]
        with pytest.raises(PeerLost, match=rf"parameter-server-1 \(127.0.0.1:{port}\): .*; tried to connect for 0.3 s"):
            client.connect(vector_model().layout)


def test_a_call_ends_when_another_thread_closes_the_client() -> None:
    config = make_config(workers=2, servers=2)
    with serving(config) as servers:
        flat = vector_model()
        client = enter(make_client(servers, config), flat)
        threading.Timer(0.2, client.close, kwargs={"goodbye": False}).start()
        begin = time.monotonic()
        with pytest.raises(PeerLost, match="waited for the parameters"):
            client.pull(flat.parameters, step=1)
        assert time.monotonic() - begin < 8, "the client's time-out has ended it"
        client.close()
        with pytest.raises(PeerLost, match="this client was closed"):
            client.pull(flat.parameters, step=1)


def test_a_worker_that_dies_while_it_waits_is_noticed() -> None:
    config = make_config(workers=2, servers=2)
    with serving(config) as servers, lost_workers() as lost:
        flat = vector_model()
        client = enter(make_client(servers, config, rank=1), flat)
        threading.Timer(0.2, client.close, kwargs={"goodbye": False}).start()
        with pytest.raises(PeerLost):
            client.pull(flat.parameters, step=1)
        assert soon(lambda: sorted(lost) == [(0, 1), (1, 1)], 8)
        assert soon(lambda: all(server.state().workers == () for server in servers))


def test_a_worker_may_come_before_its_servers_and_before_the_round() -> None:
    config = make_config(workers=1, servers=1)
    with serving(config, begin=False) as servers:
        threading.Timer(0.6, servers[0].begin, (1,)).start()
        client = make_client(servers, config, timeout=0.2)
        client.connect(vector_model().layout)
        client.join()


def test_a_wait_that_runs_out_names_what_is_missing() -> None:
    config = make_config(workers=3, servers=1, startup_timeout=0.3)
    schedule = Schedule(samples=30, batch_size=3, parts_per_step=3, seed=0, max_steps=10)
    with serving(config) as servers:
        flat = vector_model()
        client = enter(make_client(servers, config, timeout=1), flat)
        with pytest.raises(PeerLost, match=r"waited 0.3 s for step 0 to be complete: part 0, 2 is missing"):
            client.push_pull(schedule.part(1), whole_gradient(1), flat.parameters, 1)


def test_garbage_on_the_port_disturbs_no_worker() -> None:
    config = make_config(workers=1, servers=1, peer_timeout=0.5)
    schedule = Schedule(samples=400, batch_size=3, parts_per_step=1, seed=0, max_steps=100)
    with serving(config) as servers:
        host, _, port = servers[0].address.rpartition(":")
        flat = vector_model()
        client = enter(make_client(servers, config), flat)
        huge = Header(op=Op.HELLO, nbytes=1 << 60).encode()
        early = Header(op=Op.PUSH, index=1, samples=1, batch_samples=1, nbytes=400).encode()
        answers = []
        for index, garbage in enumerate(
            (b"GET / HTTP/1.1\r\n" + b"x" * 100, os.urandom(5000), huge, early, b"", b"DTPS")
        ):
            with socket.create_connection((host, int(port))) as sock:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(garbage)
                    sock.settimeout(3)
                    answers.append(sock.recv(4096))
                assert client.push_pull(schedule.part(index), whole_gradient(0), flat.parameters, index + 1) == (
                    index + 1,
                )
        assert any(b"does not speak DistTrain" in answer for answer in answers)
        assert any(b"more than 4194304" in answer for answer in answers)
        assert any(b"begins with HELLO" in answer for answer in answers)
        assert soon(lambda: servers[0].connections == 1)


@pytest.mark.parametrize("name", ["WELCOME is not for a server", "0 of 0 samples", "bytes of payload"])
def test_a_worker_that_breaks_the_protocol_loses_its_connection_and_no_other_worker_does(name: str) -> None:
    config = make_config(workers=2, servers=1, consistency=ASYNC)
    with serving(config) as servers:
        flat = vector_model()
        good, bad = (enter(make_client(servers, config, rank=rank), flat, join=True) for rank in range(2))
        link = bad.connections[0].link
        assert link is not None
        link.send(
            {
                "WELCOME is not for a server": Header(op=Op.WELCOME),
                "0 of 0 samples": Header(op=Op.PUSH),
                "bytes of payload": Header(op=Op.PUSH, samples=1, batch_samples=1, nbytes=3),
            }[name],
            [memoryview(b"abc")] if "payload" in name else [],
        )
        with pytest.raises(Refused, match=name):
            bad.connections[0].receive(Op.DONE)
        good.pull(flat.parameters)


def test_a_gradient_for_a_step_that_has_not_begun_is_refused() -> None:
    config = make_config(workers=1, servers=1)
    schedule = Schedule(samples=30, batch_size=3, parts_per_step=1, seed=0, max_steps=10)
    with serving(config) as servers:
        flat = vector_model()
        client = enter(make_client(servers, config), flat)
        with pytest.raises(Refused, match="part 4 is of step 4, but this shard is at 0"):
            client.push(schedule.part(4), whole_gradient(4))


def test_training_goes_on_bit_for_bit_while_workers_come_and_go(tmp_path: Path) -> None:
    """Parts of workers that die are done by the next free worker: a synchronous training does not depend on who computes."""
    steps = 30
    config = make_config(workers=3, servers=2, optimizer=MOMENTUM)
    schedule = Schedule(samples=40, batch_size=12, parts_per_step=3, seed=3, max_steps=steps)

    def run(deaths: frozenset[int]) -> torch.Tensor:
        todo = list(range(schedule.total_parts))
        lock = threading.Lock()
        dying = set(deaths)
        final = []
        with serving(config) as servers:

            def work(rank: int) -> None:
                worker, client = Worker(), None
                while True:
                    with lock:
                        if not todo:
                            break
                        index = todo.pop(0)
                    if client is None:
                        client = enter(make_client(servers, config, rank=rank), worker.flat)
                    work = schedule.part(index)
                    client.pull(worker.flat.parameters, step=work.step)
                    gradient = worker.gradient(work)
                    if index in dying:
                        with lock:
                            dying.remove(index)
                            todo.insert(0, index)
                        # It dies when it has pushed to the first shard alone, or to none.
                        if index % 2:
                            shard = client.connections[0]
                            shard.send(
                                push_header(client, shard, work), shard.views(gradient) if gradient is not None else []
                            )
                            shard.receive(Op.DONE)
                        client.close(goodbye=False)
                        client = None
                        continue
                    client.push(work, gradient)
                if client is not None:
                    client.pull(worker.flat.parameters, step=steps)
                    final.append(worker.flat.parameters[0])
                    client.close()

            in_threads([lambda rank=rank: work(rank) for rank in range(3)])
        return final[0]

    assert torch.equal(run(frozenset()), run(frozenset(range(4, 90, 5))))


def test_idle_connections_take_a_bounded_number_of_a_servers_files_and_keep_no_worker_away() -> None:
    config = make_config(workers=1, servers=1, consistency=SYNC, optimizer=ONE)
    with serving(config) as (server,), contextlib.ExitStack() as stack:
        host, port = server.address.split(":")
        idle = [stack.enter_context(socket.create_connection((host, int(port)), timeout=5)) for _ in range(200)]
        assert soon(lambda: server.connections <= 64 + 1)
        idle[0].settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert idle[0].recv(1) == b"", "the oldest is closed"
        client = make_client([server], config)
        client.connect(vector_model().layout)
        client.close()
