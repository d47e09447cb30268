"""The operators of a life: the real parts of the controller in simulated processes, one after another as they die.

The Lease is played: one operator leads; another one takes over when the leader is away for as long as a Lease lasts, and the former leader
may act for some seconds more.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

from disttrain.controller.cache import Key
from disttrain.controller.parts import Parts
from disttrain.controller.progress import Master, Unreadable
from disttrain.controller.settings import Settings
from disttrain.kube.api import OPTIONAL, ApiError, Body, Resource
from simulation.controller.api_server import ApiServer, Change
from simulation.controller.client import Client, Requests, Wrote
from simulation.controller.cluster import Cluster
from simulation.controller.faults import WATCHED, Fault
from simulation.controller.watch import Watch
from simulation.controller.world import Process, World

RESTART_SECONDS = 1.0
"""Until the kubelet has started another process."""
RESYNC_SECONDS = 60.0


class Operator:
    """One replica: its processes follow one another."""

    def __init__(
        self,
        name: str,
        world: World,
        server: ApiServer,
        cluster: Cluster,
        choices: random.Random,
        *,
        faults: Sequence[Fault],
        namespaces: tuple[str, ...],
        befall: Callable[[Fault], None],
        wrote: Callable[["Operator"], Wrote],
        refuse: Callable[[str, Resource, str, Body], ApiError | None],
        trace: Callable[[str], None],
    ) -> None:
        self.name, self.namespaces = name, namespaces
        self._world, self._server, self._cluster, self._choices = world, server, cluster, choices
        self._wrote, self._refuse, self._trace = wrote(self), refuse, trace
        self._befall = befall
        self.requests = Requests(list(faults))
        self.active = False
        """Whether it has a process, or will have the next one."""
        self.process: Process | None = None
        self.parts: Parts | None = None
        self._watches: dict[Resource, Watch] = {}
        self._processes = 0

    def lead(self) -> None:
        """Begins to act."""
        self.active = True
        self._start()

    def resign(self) -> None:
        """Ends for good."""
        self.active = False
        if self.process is not None:
            self._trace(f"{self.process.name} ends")
            self.process.kill()
            self._watches.clear()

    def crash(self) -> None:
        """Its process is gone; another one follows."""
        if self.process is None or not self.process.alive:
            return
        self._trace(f"{self.process.name} dies")
        self.process.kill()
        self._watches.clear()
        self._world.after(RESTART_SECONDS, self._start)

    def changed(self, resource: Resource, change: Change) -> None:
        if (watch := self._watches.get(resource)) is not None:
            watch.changed(change)

    def suffer(self, fault: Fault) -> None:
        """A fault of one of its watches."""
        if fault.resource is not None and (watch := self._watches.get(fault.resource)) is not None:
            watch.suffer(fault)

    def reconnect(self) -> None:
        """The API server closes every watch."""
        for watch in self._watches.values():
            watch.begin_again()

    def queue_all(self) -> None:
        """Every job is looked at again."""
        if self.parts is not None and self.process is not None:
            self.process.call_soon(self.parts.intake.queue_all)

    def _knows_end(self, namespace: str, child: Body) -> bool:
        """Whether its cache has the end of the job that a new child is of."""
        references = child["metadata"].get("ownerReferences") or ()
        if self.parts is None or not references:
            return False
        entry = self.parts.cache.jobs.get(Key(namespace, references[0]["name"]))
        return entry is not None and entry.uid == references[0]["uid"] and "completionTime" in entry.value.status

    def _start(self) -> None:
        if not self.active or (self.process is not None and self.process.alive):
            return
        self._processes += 1
        self.process = Process(self._world, f"{self.name}{self._processes}")
        self._trace(f"{self.process.name} starts")
        self.process.call_soon(self._begin, self.process)

    def _begin(self, process: Process) -> None:
        api = Client(
            self._server,
            process,
            self.requests,
            self._choices,
            crash=self.crash,
            befall=self._befall,
            knows_end=self._knows_end,
            wrote=self._wrote,
            refuse=self._refuse,
            trace=self._trace,
        )
        settings = Settings(
            namespaces=self.namespaces, trainer_image="example.org/trainer:1", workers=4, status_write_seconds=2.0
        )
        parts = self.parts = Parts(
            settings,
            api,
            self._fetch,
            clock=process.clock,
            restored=lambda _: self.crash(),
            jitter=self._choices.random,
        )
        process.main = asyncio.create_task(self._run(process, parts))  # type: ignore[attr-defined]

    async def _run(self, process: Process, parts: Parts) -> None:
        await parts.resync.first()
        if not process.alive:
            return
        parts.begin_passes()
        parts.watch_health.broken.set()
        for resource in (*WATCHED, *(OPTIONAL - self._server.absent)):
            self._watches[resource] = Watch(
                self._server, process, parts.intake, resource, self.namespaces, self._choices
            )
        await asyncio.gather(parts.resync.run(RESYNC_SECONDS), parts.events.run())

    async def _fetch(self, master: Master) -> bytes:
        await asyncio.sleep(0.005)
        report: Any = self._cluster.report(master.namespace, master.pod)
        if report is None:
            raise Unreadable("nothing listens there")
        return report
