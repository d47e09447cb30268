"""A parameter server that fails of itself ends and is replaced; a worker that does ends nothing but its connection."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.processes import wait_for
from disttrain.api.course import NanPolicy
from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.errors import CRASHED, PeerLost, RoundOver, UserError
from disttrain_trainer.net.messages import Message, MessageType
from disttrain_trainer.parameter_server.role import Server
from disttrain_trainer.parameter_server.shard import Shard
from disttrain_trainer.parameter_server.shard_file import ShardFile
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from training.job import Job, checkpoints, digits, manifests, served
from training.parameter_servers import ASYNC, SYNC, enter, make_client, make_config, serving
from training.test_parameter_server_async import vector_model, whole_gradient

FAULT = """
import os
from pathlib import Path

if os.environ.get("DISTTRAIN_ROLE") == "parameter-server" and not Path("failed").exists():
    from disttrain_trainer.parameter_server.shard import Shard

    absorb = Shard.absorb

    def failing(self, *arguments, **named):
        if self.version == 100:
            Path("failed").touch()
            raise MemoryError("no room for a step")
        return absorb(self, *arguments, **named)

    Shard.absorb = failing
"""
"""A sitecustomize, which Python imports at its start: the first server process has no memory for step 101."""


def test_a_server_without_memory_ends_and_its_replacement_goes_on(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    spec = digits(**served("Sync", servers=1), **checkpoints(40), worker={"replicas": 1})
    with Job(folder=tmp_path, spec=spec, program=True, env={"PYTHONPATH": str(tmp_path)}) as job:
        job.start()
        assert job.wait(Role.PARAMETER_SERVER) == CRASHED, job.logs()
        assert (
            job.log(Role.PARAMETER_SERVER).count("cannot go on, and is to be replaced: MemoryError: no room for a step")
            == 1
        )
        assert job.termination(Role.PARAMETER_SERVER).message == "MemoryError: no room for a step"
        job.complete()
        assert job.restarts == {(Role.PARAMETER_SERVER, 0): 1}
        assert "round 2 begins at step 80" in job.log(Role.MASTER)
    assert manifests(tmp_path / "checkpoints")[-1]["step"] == 230


def test_a_failure_of_the_shard_is_reported_and_what_it_left_is_neither_read_nor_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(consistency=ASYNC)
    schedule = Schedule(samples=8, batch_size=4, parts_per_step=1, seed=0, max_steps=2)
    failures: list[Exception] = []
    with serving(config, on_failure=failures.append) as (server,):
        flat = vector_model()
        worker, other = make_client([server], config), make_client([server], config, rank=1)
        for client in (worker, other):
            client.connect(flat.layout)
            client.initialize(flat.parameters)
            client.join()
        with monkeypatch.context() as patch:
            patch.setattr(Shard, "absorb", lambda *_, **__: 1 // 0)
            with pytest.raises(PeerLost):
                worker.push(schedule.part(0), whole_gradient(0))
        with pytest.raises(RoundOver):
            other.pull(flat.parameters)
        with pytest.raises(RuntimeError, match="round 1 is over"):
            server.save(tmp_path / "shard")
        wait_for("the failure to be reported, after its connection is closed", lambda: failures, 5)
    assert [type(failure) for failure in failures] == [ZeroDivisionError]


def test_what_a_peer_does_wrong_is_no_failure_of_the_server() -> None:
    config = make_config(consistency=ASYNC)
    failures: list[Exception] = []
    with serving(config, on_failure=failures.append) as (server,):
        host, _, port = server.address.rpartition(":")
        for said in (b"GET / HTTP/1.1\r\n" + b"x" * 100, b"DTPS", b""):
            with socket.create_connection((host, int(port))) as sock:
                sock.sendall(said)
        flat = vector_model()
        client = make_client([server], config)
        client.connect(flat.layout)
        client.close(goodbye=False)
        make_client([server], config).connect(flat.layout)
        wait_for("its threads to see the ends", lambda: server.connections <= 1, 10)
    assert failures == []


class FakeControl:
    """A control connection that keeps what the server says."""

    def __init__(self) -> None:
        self.said: list[Message] = []
        self.changed = threading.Condition()

    def start(self) -> None:
        pass

    def check(self) -> None:
        pass

    def send(self, kind: MessageType, **fields: Any) -> bool:
        with self.changed:
            self.said.append({"type": kind, **fields})
            self.changed.notify_all()
        return True

    def received(self, kind: MessageType, **fields: Any) -> Message:
        """The next message of this kind with these fields."""

        def found() -> Message | None:
            fitting = [m for m in self.said if m["type"] is kind and fields.items() <= m.items()]
            return fitting[0] if fitting else None

        with self.changed:
            assert self.changed.wait_for(found, 20), f"no {kind} with {fields} in {self.said}"
            message = found()
            assert message is not None
            self.said.remove(message)
            return message


def role_config() -> JobConfig:
    config = make_config(workers=2, consistency=ASYNC)
    addresses = config.addresses.model_copy(update={"parameter_servers": ("127.0.0.1:0",)})
    return config.model_copy(update={"addresses": addresses})


@contextmanager
def role(folder: Path, config: JobConfig | None = None) -> Iterator[tuple[Server, FakeControl, list[BaseException]]]:
    """The role of a server, asynchronous, with its control connection, and what it ended with."""
    process = Process(config=config or role_config(), role=Role.PARAMETER_SERVER, index=0, checkpoint_dir=folder)
    server, control, ended = Server(process, Metrics(process)), FakeControl(), []

    def run() -> None:
        try:
            server.run(control)  # type: ignore[arg-type]
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield server, control, ended
    server.on_message({"type": MessageType.FINISH})
    thread.join(20)
    assert not thread.is_alive()


def test_an_order_to_begin_that_comes_a_second_time_is_answered_and_nothing_else(tmp_path: Path) -> None:
    # The first master died with its order in the queue, and the second one gave the same.
    with role(tmp_path) as (server, control, ended):
        for round_number in (2, 2, 1):
            server.on_message({"type": MessageType.BEGIN, "generation": round_number, "file": None})
            assert control.received(MessageType.STATE)["generation"] == 2
        assert ended == []


def test_a_lost_worker_is_dropped_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = threading.Event()
    save = ShardFile.save

    def slow(self: ShardFile, path: Path) -> str:
        assert written.wait(20)
        return save(self, path)

    monkeypatch.setattr(ShardFile, "save", slow)
    with role(tmp_path) as (server, control, ended):
        server.on_message({"type": MessageType.BEGIN, "generation": 1, "file": None})
        control.received(MessageType.STATE)
        flat = vector_model()
        enter(make_client([server.server], role_config()), flat)
        server.on_message({"type": MessageType.SAVE, "id": "m.1", "folder": "step-00000001", "step": 1})
        server.on_message({"type": MessageType.DROP, "id": 7, "ranks": [0, 1]})
        assert control.received(MessageType.STATE, id=7)["applied"] == []
        assert server.server.state().workers == ()
        written.set()
        assert control.received(MessageType.SAVED, id="m.1")["file"] == "shard-0-m.1.safetensors"
        assert ended == []
    assert (tmp_path / "step-00000001" / "shard-0-m.1.safetensors").exists()


def test_parameters_that_are_not_finite_are_reported_and_not_written(tmp_path: Path) -> None:
    with role(tmp_path) as (server, control, ended):
        server.on_message({"type": MessageType.BEGIN, "generation": 1, "file": None})
        control.received(MessageType.STATE)
        flat = vector_model()
        flat.parameters[0][17] = torch.nan
        client = enter(make_client([server.server], role_config()), flat)
        server.on_message({"type": MessageType.SAVE, "id": "m.1", "folder": "step-00000004", "step": 4})
        control.received(MessageType.NAN, step=4)
        wait_for("the server to end", lambda: bool(ended), 20)
        client.close()
    (error,) = ended
    assert isinstance(error, UserError)
    assert str(error).startswith("a parameter is not finite at step 4: lower trainer.optimizer.learningRate")
    assert list(tmp_path.iterdir()) == []


def test_with_roll_backs_left_it_asks_the_master_whether_parameters_that_are_not_finite_end_the_job(
    tmp_path: Path,
) -> None:
    config = make_config(workers=2, consistency=SYNC)
    trainer = config.trainer.model_copy(update={"nan_policy": NanPolicy(rollBacks=1)})
    config = config.model_copy(update={"addresses": role_config().addresses, "trainer": trainer})
    with role(tmp_path, config) as (server, control, ended):
        server.on_message({"type": MessageType.BEGIN, "generation": 1, "file": None})
        control.received(MessageType.STATE)
        flat = vector_model()
        flat.parameters[0][17] = torch.nan
        client = enter(make_client([server.server], config), flat)
        server.on_message({"type": MessageType.SAVE, "id": "m.1", "folder": "step-00000000", "step": 0})
        said = control.received(MessageType.NAN, id="m.1")
        server.on_message({"type": MessageType.STATE, "id": 1})
        control.received(MessageType.STATE, id=1)
        assert ended == []
        server.on_message({"type": MessageType.NAN, "reason": said["reason"]})
        wait_for("the server to end", lambda: bool(ended), 20)
        client.close()
    (error,) = ended
    assert isinstance(error, UserError)
    assert str(error).startswith("a parameter is not finite at step 0: lower trainer.optimizer.learningRate")
