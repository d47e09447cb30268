"""A master of parameter servers at a table: what it says is kept, and what the others answer is up to the test."""

from datetime import UTC, datetime
from typing import Any

from configs import config_of
from disttrain.api.names import Role
from disttrain_trainer.checkpoint import resuming
from disttrain_trainer.checkpoint.course import Course
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.checkpoint.store import name_of
from disttrain_trainer.coordinator.parameter_server import ParameterServerCoordinator
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Answer, Member

STEPS = 10
SERVERS = [Member(Role.PARAMETER_SERVER, index) for index in range(2)]
WORKERS = [Member(Role.WORKER, rank) for rank in range(2)]


def shard(server: Member, save: str) -> str:
    return f"shard-{server.rank}-{save}.safetensors"


class Table:
    """A training of two servers and two workers, 10 steps of 2 parts, a checkpoint every 4 steps; sent messages are kept."""

    def __init__(
        self,
        *,
        consistency: str = "Sync",
        volume: bool = True,
        evaluate: bool = False,
        buffers: bool = False,
        steps: int = STEPS,
        every: int = 4,
        slow: bool = False,
        replication: int = 1,
        fewest: int | None = None,
        **trainer: Any,
    ) -> None:
        """slow: the volume is; `find_at_last` reports what was found. fewest: workers of an elastic job. trainer: further fields
        of it."""
        self.buffers = buffers
        self.consistency = consistency
        self.slow = slow
        chosen: dict[str, Any] = {"consistency": consistency, "replication": replication}
        chosen |= {"maxStaleness": 1} if consistency == "BoundedStaleness" else {}
        self.config = config = config_of(
            {
                "strategy": {"type": "ParameterServer", "parameterServer": chosen},
                "parameterServer": {"replicas": 2},
                "worker": {"replicas": 2} | ({"elastic": {"minReplicas": fewest, "maxReplicas": 2}} if fewest else {}),
                "trainer": {
                    "model": "m:m",
                    "dataset": "m:d",
                    "optimizer": {"name": "SGD", "learningRate": 0.1},
                    "batchSize": 8,
                    "maxSteps": steps,
                    **({"evaluate": "m:e"} if evaluate else {}),
                    **trainer,
                },
                "checkpoint": {"volume": {"persistentVolumeClaim": "c"}, "everySteps": every},
            }
        )
        self.now = 0.0
        self.lease: dict[Member, str] = {}
        self.said: list[tuple[Member, MessageType, dict[str, Any]]] = []
        self.on_disk: Manifest | None = None
        self.amended: list[Course] = []
        self.full = False
        """The volume is: nothing can be published."""
        self.lost = False
        """The volume is: not even a folder can be made."""
        self.tracker = Tracker(attempt=1)
        self.applied: dict[Member, set[int]] = {server: set() for server in SERVERS}
        self.round_number = dict.fromkeys(SERVERS, 0)
        self.training = ParameterServerCoordinator(
            sender=self, store=self if volume else None, tracker=self.tracker, config=config, incarnation="m"
        )
        self.training.begin(0)

    # The sender and the checkpoint store.

    def send(self, member: Member, kind: MessageType, **fields: object) -> None:
        self.said.append((member, kind, fields))
        if kind is MessageType.ROUND:
            self.lease[member] = str(fields["stay"])

    def find(self, answer: Answer[Manifest | None]) -> None:
        self.asked = answer
        if not self.slow:
            answer(self.on_disk, 0)

    def find_at_last(self) -> None:
        self.asked(self.on_disk, 0)
        self.serve()

    def prepare(self, step: int, answer: Answer[str | OSError]) -> None:
        answer(OSError(5, "Input/output error") if self.lost else name_of(step), self.now)

    def publish(
        self, *, step: int, parts: int, files: dict[str, str], finished: bool, answer: Answer[Manifest | OSError]
    ) -> None:
        if self.full:
            answer(OSError(28, "No space left on device"), self.now)
            return
        self.on_disk = Manifest(
            job="job", attempt=1, step=step, parts=parts, parts_per_step=2, steps_per_epoch=10, files=files,
            state=resuming.state_of(self.config), data={}, time=datetime(2026, 1, 1, tzinfo=UTC), finished=finished,
        )  # fmt: skip
        answer(self.on_disk, self.now)

    def amend(self, course: Course) -> None:
        self.amended.append(course)

    # The processes.

    def take(self, *kinds: MessageType) -> list[tuple[Member, MessageType, dict[str, Any]]]:
        """What was said since the last time, of these kinds."""
        said, self.said = self.said, []
        return [one for one in said if not kinds or one[1] in kinds]

    def serve(self) -> None:
        """The servers answer all messages, until no more come."""
        while todo := [one for one in self.said if one[0] in SERVERS and one[1] is not MessageType.FINISH]:
            self.said = [one for one in self.said if one not in todo]
            for server, kind, fields in todo:
                if kind in (MessageType.DISCARD, MessageType.REPLICATE):
                    continue  # they are answered with nothing
                answer: dict[str, Any] = {"type": MessageType.STATE, "id": fields.get("id")}
                if kind is MessageType.BEGIN:
                    self.round_number[server] = fields["generation"]
                    self.applied[server] = set(range(self.on_disk.parts)) if fields["file"] and self.on_disk else set()
                if kind is MessageType.SAVE:
                    answer = {
                        "type": MessageType.SAVED,
                        "id": fields["id"],
                        "file": shard(server, fields["id"]),
                        "digest": "x",
                    }
                state = self.state(server)
                if kind is MessageType.SAVE and self.consistency == "Sync":
                    # The version of its file, which no gradient of an unfinished step is in.
                    whole = IndexSet(sorted(self.applied[server])).floor // 2 * 2
                    state["applied"] = [[0, whole]] if whole else []
                self.training.on_message(server, answer | state, 0)

    def work_on(self, worker: Member) -> list[int]:
        """The worker computes a part, if there is one for it; its other messages remain to be answered."""
        others = [one for one in self.said if one[0] != worker]
        got = self.work(worker, 1, ask=1)
        self.said = others + self.said
        return got

    def says(self, worker: Member, **fields: Any) -> None:
        """The worker, which evaluates between two steps, says so."""
        said = {"type": MessageType.EVALUATED, "stay": self.lease[worker], **fields}
        self.training.on_message(worker, said, self.now)

    def evaluate(self, worker: Member, accuracy: float, *, lease: str | None = None) -> None:
        """The worker evaluated the final parameters, with its present lease or with this one."""
        said = {
            "type": MessageType.EVALUATED,
            "stay": lease or self.lease[worker],
            "evaluation": {"accuracy": accuracy},
        }
        self.training.on_message(worker, said, self.now)

    def state(self, server: Member) -> dict[str, Any]:
        applied = [list(interval) for interval in IndexSet(sorted(self.applied[server])).intervals()]
        return {"generation": self.round_number[server], "applied": applied}

    def join(self, *members: Member, **fields: Any) -> None:
        """fields: further ones of the HELLO."""
        for member in members:
            hello = self.state(member) if member in SERVERS else {"samples": 80, "buffers": self.buffers}
            hello |= {"incarnation": f"{'s' if member in SERVERS else 'w'}{member.rank}", **fields}
            self.training.joined(member, hello, 0)
            self.serve()

    def work(self, worker: Member, count: int, *, ask: int = 20) -> list[int]:
        """The worker asks, computes `count` of what it got, and says so; what it got."""
        lease = self.lease[worker]
        self.training.on_message(worker, {"type": MessageType.REQUEST, "stay": lease, "count": ask, "done": []}, 0)
        got = [s for member, _, fields in self.take(MessageType.ASSIGN) if member == worker for s in fields["slices"]]
        for server in SERVERS:
            self.applied[server] |= set(got[:count])
        self.training.on_message(
            worker, {"type": MessageType.REQUEST, "stay": lease, "count": 0, "done": got[:count]}, 0
        )
        return got


def training(**options: Any) -> Table:
    table = Table(**options)
    table.join(*SERVERS, *WORKERS)
    table.take()
    return table


def finish(table: Table) -> None:
    """Works until every part is applied."""
    while table.tracker.step != STEPS:
        for worker in WORKERS:
            if table.tracker.step != STEPS:
                table.work(worker, 20)
                table.serve()
