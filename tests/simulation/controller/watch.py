"""The watch of one process over one kind, as kopf gives it to the operator: a list first, then each change in order, some time later."""

import random
from collections.abc import Sequence

from disttrain.api.names import LABEL_JOB_NAME
from disttrain.controller.intake import Intake
from disttrain.controller.resync import SELECTORS
from disttrain.kube.api import Body, Resource
from simulation.controller.api_server import ApiServer, Change
from simulation.controller.faults import Fault, Kind
from simulation.controller.world import Process

INACTIVE_SECONDS = 70.0
"""After which a watch without news begins again, as handlers.py configures it."""
BEGIN_SECONDS = 0.05


class Watch:
    """Hands the changes of one kind to the intake of a process."""

    def __init__(
        self,
        server: ApiServer,
        process: Process,
        intake: Intake,
        resource: Resource,
        namespaces: Sequence[str],
        choices: random.Random,
    ) -> None:
        self._server, self._process, self._intake = server, process, intake
        self._resource, self._namespaces, self._choices = resource, namespaces, choices
        self._selected = bool(SELECTORS[resource])
        self._known: set[str] = set()
        """uids of the objects that it has reported as existing."""
        self._last = 0.0
        """When its newest event arrives: none overtakes another."""
        self._lost_until = 0.0
        self._repeats = 0
        self._mute = True
        self._begin()

    def changed(self, change: Change) -> None:
        """The API server has a new version of an object of this kind."""
        if self._mute or not self._process.alive:
            return
        if (event := self._event(change)) is None:
            return
        if self._process.world.now < self._lost_until:
            return
        self._deliver(event)
        if self._repeats:
            self._repeats -= 1
            self._deliver(event)

    def suffer(self, fault: Fault) -> None:
        """A fault begins."""
        match fault.kind:
            case Kind.DROP:
                self._lost_until = self._process.world.now + fault.seconds
            case Kind.DUPLICATE:
                self._repeats += 1 + int(fault.seconds) % 4
            case Kind.DELAY:
                self._last = max(self._last, self._process.world.now + fault.seconds)
            case Kind.REPLAY:
                for change in list(self._server.since(self._resource, self._server.version - 10))[:-1]:
                    if event := self._event(change):
                        self._deliver(event)
                for change in self._server.since(self._resource, self._server.version - 10):
                    if event := self._event(change):
                        self._deliver(event)
            case Kind.MUTE:
                self._mute = True
                self._process.world.after(INACTIVE_SECONDS, self._begin)
            case Kind.GONE:
                self.begin_again()

    def begin_again(self) -> None:
        """The connection is gone."""
        self._mute = True
        self._process.world.after(BEGIN_SECONDS, self._begin)

    def _begin(self) -> None:
        if not self._process.alive:
            return
        self._mute = False
        bodies, _ = self._server.list(self._resource, None, selector=SELECTORS[self._resource])
        self._known = set()
        for body in bodies:
            if self._mine(body):
                self._known.add(body["metadata"]["uid"])
                self._deliver({"type": None, "object": body})

    def _event(self, change: Change) -> Body | None:
        """What the watch says of it; None: nothing. An object that loses the label of the selector is reported as deleted."""
        if not self._mine(change.body):
            return None
        uid = change.body["metadata"]["uid"]
        wanted = not self._selected or LABEL_JOB_NAME in (change.body["metadata"].get("labels") or {})
        if change.type == "DELETED" or not wanted:
            if uid not in self._known:
                return None
            self._known.discard(uid)
            return {"type": "DELETED", "object": change.body}
        self._known.add(uid)
        return {"type": change.type, "object": change.body}

    def _mine(self, body: Body) -> bool:
        return not self._namespaces or body["metadata"]["namespace"] in self._namespaces

    def _deliver(self, event: Body) -> None:
        world = self._process.world
        self._last = max(self._last, world.now + 0.002 + 0.01 * self._choices.random())
        self._process.call_at(self._last, self._intake.take, self._resource, event)
