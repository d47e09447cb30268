"""The waits of a group end when its round ends, whatever a peer does; and what a group computes is bitwise what gloo computes."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import transports
from cluster.processes import wait_for
from training import group_operations, group_rank

ENDLESS = 10**9
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["torch.distributed.fsdp", "torch._dynamo", "disttrain_trainer.parallel.process_group"])


class Rank:
    """A process of group_rank.py."""

    def __init__(self, *what: Any) -> None:
        self._connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=group_rank.run, args=(theirs, *what), daemon=True)
        self.process.start()
        theirs.close()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def command(self, *words: object) -> None:
        self._connection.send(words)

    def answer(self, key: str) -> dict[str, Any]:
        assert self._connection.poll(100), f"no answer {key}"
        found = dict(self._connection.recv())
        assert key in found, found
        return found

    def ended(self) -> dict[str, Any]:
        """What it answers when its round ends."""
        self.command("end")
        return self.answer("broken")

    def count(self) -> dict[str, Any]:
        """Its threads and open files."""
        self.command("count")
        return self.answer("threads")


class Ranks:
    """Ranks with one store."""

    def __init__(self, tls: Path, backend: str, model: str, count: int) -> None:
        """tls: a folder for the certificate."""
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.rendezvous = transports.Rendezvous(transports.certified(tls))
        self._what = backend, model, self.store.port, self.rendezvous.address, tls
        self._round = 0
        self.ranks: list[Rank] = []
        for _ in range(count):
            self.start()

    def start(self) -> Rank:
        """One more rank."""
        rank = Rank(*self._what)
        self.ranks.append(rank)
        rank.answer("ready")
        return rank

    def begin(self, members: list[Rank], *, until: int, source: int = 0) -> None:
        """A round of these ranks."""
        self._round += 1
        for number, rank in enumerate(members):
            rank.command("round", self._round, number, len(members), source, until)
        for rank in members:
            rank.answer("begun")

    def done(self, members: list[Rank]) -> str:
        """The digest of the state, the same on each."""
        (found,) = {rank.answer("done")["digest"] for rank in members}
        return str(found)

    def close(self) -> None:
        for rank in self.ranks:
            rank.process.kill()
            rank.process.join()
        self.rendezvous.close()


@pytest.fixture
def ranks_of(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """Starts ranks, for the time of a test."""
    found: list[Ranks] = []

    def start(*arguments: Any) -> Ranks:
        found.append(Ranks(tmp_path / str(len(found)), *arguments))
        return found[-1]

    yield start
    for ranks in found:
        ranks.close()


BOTH = pytest.mark.parametrize("backend", ["disttrain", "tls"])


@BOTH
@pytest.mark.parametrize("loss", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
@pytest.mark.parametrize("model", ["ddp", "fsdp"])
def test_two_ranks_go_on_exactly_when_the_third_is_lost(
    ranks_of: Callable[..., Ranks], backend: str, model: str, loss: signal.Signals
) -> None:
    ranks = ranks_of(backend, model, 3)
    ranks.begin(ranks.ranks, until=ENDLESS)
    first, lost, last = ranks.ranks
    time.sleep(random.uniform(0.2, 0.6))
    lost.signal(loss)
    time.sleep(0.3)
    broken = [rank.ended() for rank in (first, last)]
    assert all(answer["late"] < 1 for answer in broken), broken
    steps = [answer["step"] for answer in broken]
    assert max(steps) - min(steps) <= 1
    ranks.begin([first, last], until=max(steps) + 20, source=steps.index(max(steps)))
    if loss == signal.SIGSTOP:
        lost.signal(signal.SIGCONT)
        # The master tells it as well: gloo may leave it in a send that was half written when the others closed their ends.
        assert lost.ended()["late"] < 1
    calm = ranks_of("tls" if backend == "tls" else "gloo", model, 3)  # the order of a sum is another one
    calm.begin(calm.ranks, until=max(steps))
    calm.done(calm.ranks)
    both = [calm.ranks[0], calm.ranks[2]]
    calm.begin(both, until=max(steps) + 20)
    assert ranks.done([first, last]) == calm.done(both)


@pytest.mark.parametrize(("backend", "rounds"), [("disttrain", 50), ("tls", 10)])
def test_many_broken_rounds_leave_no_thread_and_no_file_behind(
    ranks_of: Callable[..., Ranks], backend: str, rounds: int
) -> None:
    ranks = ranks_of(backend, "ddp", 1)
    (survivor,) = ranks.ranks
    few = {"threads": 0, "files": 0}
    for number in range(rounds):
        peer = ranks.start()
        ranks.begin([survivor, peer], until=ENDLESS)
        time.sleep(random.uniform(0, 0.05))
        loss = signal.SIGKILL if number % 2 else signal.SIGSTOP
        peer.signal(loss)
        assert survivor.ended()["late"] < 1
        if loss == signal.SIGSTOP:
            peer.signal(signal.SIGKILL)
        if number == 0:
            time.sleep(1)  # a thread that has ended is there for a moment
            few = survivor.count()
    # An operation whose message was half sent ends with gloo's time-out only, and its thread and connection with it.
    last = time.monotonic() + group_rank.TIMEOUT.total_seconds() + 10
    while (found := survivor.count()) != few and time.monotonic() < last:
        time.sleep(0.5)
    assert found == few


@BOTH
def test_a_round_ends_while_its_group_is_made(ranks_of: Callable[..., Ranks], backend: str) -> None:
    ranks = ranks_of(backend, "ddp", 1)
    (rank,) = ranks.ranks
    rank.command("round", 1, 0, 2, 0, ENDLESS)  # the other one never comes
    time.sleep(0.3)
    assert rank.ended()["late"] < 1
    ranks.begin([rank], until=1)
    ranks.done([rank])


def test_a_rank_whose_last_group_was_never_made_meets_a_new_one(ranks_of: Callable[..., Ranks]) -> None:
    ranks = ranks_of("disttrain", "ddp", 2)
    old, new = ranks.ranks
    keys = ranks.store.num_keys()
    old.command("round", 0, 0, 2, 0, ENDLESS)
    wait_for("the rank to say that it is there", lambda: ranks.store.num_keys() > keys, 30)
    assert old.ended()["late"] < 1
    ranks.begin([old, new], until=1)
    ranks.done([old, new])


OPERATIONS = ["collectives", "dtypes", "functional_collectives", "messages", "subgroups", "pipeline", "tensor_parallel"]


@pytest.mark.parametrize("what", OPERATIONS)
def test_operations_give_bitwise_what_gloo_gives_and_so_they_do_under_tls(tmp_path: Path, what: str) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rendezvous = transports.Rendezvous(transports.certified(tmp_path))
    pipes = [SPAWN.Pipe() for _ in range(group_operations.SIZE)]
    processes = [
        SPAWN.Process(
            target=group_operations.run,
            args=(theirs, what, rank, store.port, rendezvous.address, tmp_path),
            daemon=True,
        )
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        for ours, _ in pipes:
            assert ours.poll(100)
            gloo, disttrain, under_tls = ours.recv()
            assert gloo
            assert gloo == disttrain
            if what == "tensor_parallel":  # the weights are no integers, and the order of a sum is another one
                for one, other in zip(gloo, under_tls, strict=True):
                    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-6, rtol=0)
            else:
                assert gloo == under_tls
    finally:
        for process in processes:
            process.kill()
            process.join()
        rendezvous.close()
