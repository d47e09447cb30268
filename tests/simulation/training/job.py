"""A whole training with parameter servers in simulated time, and what goes wrong in it. The seed decides everything.

    PYTHONPATH=tests python -m simulation.training.job SEED

replays one schedule and prints what happened in it.

Which process fails: any, at any moment, by a crash or by SIGTERM, alone or all at once; a worker or server also by being replaced while it
still runs, as on a node that the cluster does not reach. Another process takes its place. Which connection: any, with what is under way.
Which write: that of a folder, a file or a manifest. After the last fault the job ends in bounded time.

Of some jobs the workers change in number: at any moment one gets SIGTERM and none takes its place, or one that was away joins.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from random import Random
from typing import cast

from configs import config_of
from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain.api.strategy import Consistency, ParameterServerStrategy
from disttrain_trainer.coordinator.parameter_server import RETURN_SECONDS
from disttrain_trainer.net.peers import Member
from simulation.training.master import Master
from simulation.training.oracle import Oracle, Violation
from simulation.training.server import Server
from simulation.training.shard_host import ShardHost
from simulation.training.timeline import Connection, Timeline
from simulation.training.volume import Volume
from simulation.training.worker import Worker

CALM_SECONDS = 200.0
"""Simulated seconds after the last fault in which a job must end."""
MAX_EVENTS = 200_000
GRACE = 30.0
"""Seconds between SIGTERM and the end of a process that was not released."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things take in this schedule, about, in seconds: any of them may be slower than any other."""

    control: float
    """A message of a control connection."""
    data: float
    """A message between worker and server."""
    requests: float
    """Whatever a thread does before it goes on."""
    orders: float
    """A server's way to an order of the master."""
    disk: float
    compute: float
    start: float
    """A process's start."""


ROLL_BACKS = 50
"""More than any schedule needs: one that is forgotten with all processes comes again."""


def _pace(chance: Random) -> Pace:
    def one(*scales: float) -> float:
        return chance.choice(scales)

    return Pace(
        control=one(0.0005, 0.01, 0.2),
        data=one(0.0005, 0.01, 0.1),
        requests=one(0.0002, 0.002, 0.02),
        orders=one(0.0005, 0.02, 0.3),
        disk=one(0.001, 0.05, 0.5),
        compute=one(0.002, 0.02, 0.2),
        start=one(0.01, 0.3, 2.0),
    )


@lru_cache
def _config(
    *,
    consistency: str,
    staleness: int,
    servers: int,
    workers: int,
    parts: int,
    steps: int,
    every: int,
    keep: int,
    evaluates: bool,
    fewest: int | None,
    replication: int,
    roll_backs: int,
    script: bool,
) -> JobConfig:
    chosen: dict[str, object] = {"consistency": consistency, "replication": replication}
    chosen |= {"maxStaleness": staleness} if consistency == "BoundedStaleness" else {}
    return config_of(
        {
            "strategy": {"type": "ParameterServer", "parameterServer": chosen},
            "parameterServer": {"replicas": servers},
            "worker": {"replicas": workers}
            | ({"elastic": {"minReplicas": fewest, "maxReplicas": workers}} if fewest is not None else {}),
            "trainer": {
                **({"script": {"file": "train.py"}} if script else {"model": "m:m", "dataset": "m:d"}),
                "optimizer": {"name": "SGD", "learningRate": 0.1},
                "batchSize": 2 * parts,
                "partsPerStep": parts,
                "maxSteps": steps,
                **({"evaluate": "m:e"} if evaluates else {}),
                **({"nanPolicy": {"rollBacks": roll_backs}} if roll_backs else {}),
            },
            "checkpoint": {"volume": {"persistentVolumeClaim": "c"}, "everySteps": every, "keep": keep},
        }
    )


class Job:
    """One schedule."""

    def __init__(self, seed: int, *, trace: Callable[[str], None] | None = None) -> None:
        self.chance = chance = Random(seed)
        self._trace = trace
        self.timeline = Timeline(chance)
        self.pace = _pace(chance)
        self.has_volume = chance.random() < 0.9
        self.buffers = chance.random() < 0.5
        self.keeps_model = chance.random() < 0.3
        self.evaluates = chance.random() < 0.4
        workers = chance.choice((1, 2, 2, 3, 4))
        # Of their own, so that the other schedules stay as they are.
        self._resizing = resizing = Random(-1 - seed)
        self._fewest = resizing.choice((None, None, 1, max(1, workers - 1)))
        self._resizes = 0 if self._fewest is None else resizing.randint(0, 6)
        self._away: set[Member] = set()
        """Workers that the job does without for now."""
        self._of_copies = copies = Random(f"copies of {seed}")
        self.of_norms = Random(f"norms of {seed}")
        self.copying: list[Connection] = []
        """Connections to copies, also those that have ended."""
        self._copy_cuts = copies.choice((0, 0, 1, 3))
        consistency, staleness = chance.choice(("Sync", "Async", "BoundedStaleness")), chance.randrange(3)
        servers = chance.choice((1, 2, 2, 3))
        replication = copies.choice((1, 2)) if servers > 1 else 1
        poison = Random(f"poison of {seed}")
        is_poisoned = replication == 1 and poison.random() < 0.3
        self.is_script = not (is_poisoned or self.evaluates) and Random(f"script of {seed}").random() < 0.4
        """The loop is a script's."""
        self.config = _config(
            script=self.is_script,
            consistency=consistency,
            staleness=staleness,
            servers=servers,
            replication=replication,
            roll_backs=ROLL_BACKS if is_poisoned else 0,
            workers=workers,
            parts=chance.choice((workers, workers, 1, 2, 3, 5)),
            steps=chance.randint(2, 8),
            every=chance.randint(1, 4),
            keep=chance.randint(1, 3),
            evaluates=self.evaluates,
            fewest=self._fewest,
        )
        strategy, checkpoint = self.config.strategy.parameter_server, self.config.checkpoint
        assert strategy is not None
        assert checkpoint is not None
        assert self.config.trainer.max_steps is not None
        self.strategy: ParameterServerStrategy = strategy
        self.sync = strategy.consistency is Consistency.SYNC
        self.clips = self.sync and servers > 1 and self.of_norms.random() < 0.5
        """Each step waits for the norm of its gradient."""
        self.every = checkpoint.every_steps
        self.steps = self.config.trainer.max_steps
        self.every_part = (1 << self.steps * self.config.parts_per_step) - 1
        parts_in_all = self.steps * self.config.parts_per_step
        self.poisoned = {poison.randrange(parts_in_all) for _ in range(poison.randint(1, 2))} if is_poisoned else set()
        """Parts whose loss is not finite."""
        self.volume = Volume()
        self.oracle = Oracle(self)
        self.master: Master | None = None
        self._processes: dict[Member, Server | Worker | None] = {}
        self._members = [Member(Role.PARAMETER_SERVER, index) for index in range(self.config.parameter_servers)]
        self._members += [Member(Role.WORKER, rank) for rank in range(self.config.world_size)]
        self._started = 0
        self._faults = chance.choice((0, 1, 2, 3, 5, 8))
        self._often = chance.choice((0.001, 0.003, 0.01, 0.03))
        """How many faults there are for each event, while some are left."""
        self._last_fault = 0.0
        self._exited: set[Member] = set()
        self.done = False

    def run(self) -> None:
        """To the end of the job. Raises Violation."""
        self._start_master()
        for member in self._members:
            self._start(member)
        for _ in range(MAX_EVENTS):
            self.timeline.step()
            if self.done:
                return
            if self._faults and self.chance.random() < self._often:
                self._fault()
            if self._copy_cuts and self.copying and self._of_copies.random() < self._often:
                self._cut_copy()
            if self._resizes and self._resizing.random() < self._often:
                self._resize()
            if self.timeline.now > self._last_fault + CALM_SECONDS:
                break
        raise Violation(
            f"the job did not end: it is {self.timeline.now:.0f} s old, the last fault was at {self._last_fault:.0f} s"
        )

    def trace(self, text: str, *arguments: object) -> None:
        if self._trace is not None:
            self._trace(f"{self.timeline.now:9.4f} {text % arguments}")

    def server(self, index: int) -> Server | None:
        """The process that listens as this server."""
        process = self._processes.get(Member(Role.PARAMETER_SERVER, index))
        return process if isinstance(process, Server) else None

    def is_present(self, process: Worker) -> bool:
        """Whether the process runs, and no other one has its place."""
        return process.alive and self._processes.get(process.member) is process

    def is_back(self, process: Worker) -> bool:
        """Whether the master knows the worker, or must wait for it: the master before that one may have assigned parts to it."""
        master = self.master
        if master is None or self.timeline.now < master.began_at + RETURN_SECONDS:
            return True
        return master.control.connection(process.member) is not None

    def primary(self, shard: int, round_number: int) -> ShardHost | None:
        """The shard as its primary in this round has it; None while it has none, or another server holds a later copy of it."""
        servers = [self.server(index) for index in range(self.config.parameter_servers)]
        held = [one.held for one in servers if one is not None and one.held.round_number == round_number]
        holders = [(one.term, one.is_primary, of) for of in held for one in of.holdings if one.shard == shard]
        _, is_primary, of = max(holders, default=(0, False, None), key=lambda holder: holder[:2])
        return cast("ShardHost", of.served(shard)) if is_primary and of is not None else None

    # The lives of processes.

    def ended(self, process: Server | Worker) -> None:
        """A process ended, but not because the job is done: another one takes its place."""
        self.trace("%s (%s) ends", process.member, process.incarnation)
        process.kill()
        if self._processes.get(process.member) is process:
            self._processes[process.member] = None
            if process.member not in self._away:
                self.timeline.soon(self._absence(), partial(self._start, process.member))

    def finished(self, process: Server | Worker) -> None:
        """A process knows that the job is done."""
        self.trace("%s (%s) is done", process.member, process.incarnation)
        process.kill()
        if self._processes.get(process.member) is process:
            self._processes[process.member] = None
            self._exited.add(process.member)

    def master_ended(self, master: Master) -> None:
        if self.master is master:
            self.trace("the master ends")
            master.kill()
            self.master = None
            self.timeline.soon(self._absence(), self._start_master)

    def master_finished(self, master: Master) -> None:
        self.done = self.done or self.master is master

    def _absence(self) -> float:
        return self.chance.choice((0.02, 0.3, 2.0))

    def _incarnation(self) -> str:
        self._started += 1
        return f"i{self._started}"

    def _start(self, member: Member) -> None:
        build = Server if member.role is Role.PARAMETER_SERVER else Worker
        process = self._processes[member] = build(self, member.rank, self._incarnation())
        self.trace("%s (%s) starts", member, process.incarnation)
        process.start()

    def _start_master(self) -> None:
        self.oracle.master_started()
        self.master = Master(self, self._incarnation())
        self.trace("the master (%s) starts", self.master.incarnation)
        self.master.start()

    # What goes wrong.

    def fault_of_the_volume(self) -> None:
        """Raises OSError now and then."""
        if self._faults and self.chance.random() < 0.1:
            self._spend("a write fails")
            raise OSError(28, "No space left on device")

    def _spend(self, what: str, *arguments: object) -> None:
        self._faults -= 1
        self._last_fault = self.timeline.now
        self.trace(f"fault: {what}", *arguments)

    def _fault(self) -> None:
        kinds = (
            self._crash_one, self._crash_server, self._crash_master, self._crash_all, self._cut_control, self._cut_data,
            self._replace, self._terminate, self._terminate_master,
        )  # fmt: skip
        self.chance.choice(kinds)()

    def _running(self) -> list[Server | Worker]:
        return [process for process in self._processes.values() if process is not None]

    def _one(self) -> Server | Worker | None:
        running = self._running()
        return self.chance.choice(running) if running else None

    def _crash_one(self) -> None:
        if (process := self._one()) is not None:
            self._spend("%s crashes", process.member)
            self.ended(process)

    def _crash_server(self) -> None:
        if (server := self.server(self.chance.randrange(self.config.parameter_servers))) is not None:
            self._spend("%s crashes", server.member)
            self.ended(server)

    def _crash_master(self) -> None:
        # Without a volume nothing tells another master that the job is done.
        if self.master is not None and not (self.master.coordinator.ended and not self.has_volume):
            self._spend("the master crashes")
            self.master_ended(self.master)

    def _crash_all(self) -> None:
        if self.chance.random() < 0.3 and self._started_all and not self._exited:
            self._crash_master()
            for process in self._running():
                self.ended(process)

    @property
    def _started_all(self) -> bool:
        return len(self._processes) == len(self._members)

    def _cut_control(self) -> None:
        process = self._one()
        if process is not None and process.control.connection is not None:
            self._spend("the control connection of %s breaks", process.member)
            process.control.connection.cut()

    def _cut_data(self) -> None:
        process = self._one()
        if isinstance(process, Worker) and process.client is not None:
            self._spend("a connection of %s to a server breaks", process.member)
            process.client.cut(self.chance.randrange(self.config.parameter_servers))

    def _cut_copy(self) -> None:
        self._copy_cuts -= 1
        self._last_fault = self.timeline.now
        self.trace("fault: a connection to a copy breaks")
        self._of_copies.choice(self.copying).cut()

    def _replace(self) -> None:
        """Another process takes the place of one that still runs; that one ends some time later."""
        if (process := self._one()) is not None:
            self._spend("%s is replaced while it runs", process.member)
            process.control.replaced()
            self._start(process.member)
            self.timeline.soon(GRACE / 10, partial(self._end_at_last, process))

    def _terminate(self) -> None:
        if (process := self._one()) is not None:
            self._spend("%s gets SIGTERM", process.member)
            self.timeline.after(GRACE, partial(self._end_at_last, process))
            process.control.leave()

    def _terminate_master(self) -> None:
        master = self.master
        if master is not None and not master.coordinator.ended:
            self._spend("the master gets SIGTERM")
            self.timeline.after(GRACE, partial(self.master_ended, master))
            master.terminate()

    def _resize(self) -> None:
        """A worker leaves for good, or one that is away joins."""
        chance = self._resizing
        workers = [process for process in self._running() if isinstance(process, Worker)]
        assert self._fewest is not None
        if self._away and (chance.random() < 0.5 or self.config.workers - len(self._away) <= self._fewest):
            member = min(self._away)
            if self._processes[member] is None and member not in self._exited:
                self._away.discard(member)
                self._resizes -= 1
                self._last_fault = self.timeline.now
                self.trace("%s is wanted again", member)
                self._start(member)
        elif workers and self.config.workers - len(self._away) > self._fewest:
            worker = chance.choice(workers)
            if worker.member not in self._away:
                self._away.add(worker.member)
                self._resizes -= 1
                self._last_fault = self.timeline.now
                self.trace("%s is to leave", worker.member)
                self.timeline.after(GRACE, partial(self._end_at_last, worker))
                worker.control.leave()

    def _end_at_last(self, process: Server | Worker) -> None:
        if process.alive:
            self.ended(process)


def command(seed: int) -> str:
    """Replays a schedule."""
    return f"PYTHONPATH=tests python -m simulation.training.job {seed}"


def run(seed: int) -> None:
    """One schedule. Raises Violation with the command that replays it."""
    try:
        Job(seed).run()
    except Exception as error:
        raise Violation(f"schedule {seed}: {type(error).__name__}: {error}\nreplay: {command(seed)}") from error


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="          log: %(message)s", stream=sys.stdout)
    job = Job(int(sys.argv[1]), trace=print)
    print(job.config, job.pace, f"volume: {job.has_volume}, buffers: {job.buffers}", sep="\n")
    job.run()
    print(f"the job is done after {job.timeline.now:.1f} s")


if __name__ == "__main__":
    main()
