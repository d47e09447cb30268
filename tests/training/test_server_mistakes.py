"""A parameter server that fails of itself ends and is replaced; a worker that does ends nothing but its connection."""

import socket
from pathlib import Path

import pytest

from cluster.processes import wait_for
from disttrain.api.names import Role
from disttrain_trainer.data.slices import Schedule
from disttrain_trainer.errors import CRASHED, GenerationOver, PeerLost
from training.job import Job, checkpoints, digits, manifests, served
from training.parameter_servers import ASYNC, make_client, make_config, serving
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
        assert job.supervise() == 0, job.logs()
        assert job.restarts == {(Role.PARAMETER_SERVER, 0): 1}
        assert "generation 2 begins at step 80" in job.log(Role.MASTER)
    assert manifests(tmp_path / "checkpoints")[-1]["step"] == 230


def test_a_failure_of_the_shard_is_told_and_nobody_reads_or_saves_what_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(consistency=ASYNC)
    schedule = Schedule(samples=8, batch_size=4, world_size=1, seed=0, max_steps=2)
    failures: list[Exception] = []
    with serving(config, on_failure=failures.append) as (server,):
        flat = vector_model()
        worker, other = make_client([server], config), make_client([server], config, rank=1)
        for client in (worker, other):
            client.connect(flat.layout)
            client.initialize(flat.parameters)
            client.join()
        with monkeypatch.context() as patch:
            patch.setattr(server._generation._shard, "absorb", lambda *_, **__: 1 // 0)
            with pytest.raises(PeerLost):
                worker.push(schedule.slice(0), whole_gradient(0))
        with pytest.raises(GenerationOver):
            other.pull(flat.parameters)
        with pytest.raises(RuntimeError, match="generation 1 is over"):
            server.save(tmp_path / "shard")
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
        wait_for("its threads to see the ends", lambda: len(server._connections) <= 1, 10)
    assert failures == []
