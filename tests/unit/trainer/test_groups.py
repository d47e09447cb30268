"""How groups of ranks come together at the master of parameter servers, and which rank hears what."""

from typing import Any

from configs import config_of
from disttrain.api.names import Role
from disttrain_trainer.coordinator.formations import Formation, Step
from disttrain_trainer.coordinator.grouped import GroupedCoordinator
from disttrain_trainer.coordinator.progress import Tracker
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Member

RANKS = [Member(Role.WORKER, rank) for rank in range(4)]
SERVERS = [Member(Role.PARAMETER_SERVER, index) for index in range(2)]
AWAITS, READY, REQUEST = ({"type": kind} for kind in (MessageType.AWAITS_GROUP, MessageType.READY, MessageType.REQUEST))
DATA = {"samples": 40, "fingerprint": None, "order": "feistel-8"}


class Table:
    """Two groups of two ranks and two servers, which answer every question at once."""

    def __init__(self, name: str = "m") -> None:
        config = config_of(
            {
                "strategy": {
                    "type": "Hybrid",
                    "modelParallel": {"tensor": 2},
                    "parameterServer": {"consistency": "Sync"},
                },
                "parameterServer": {"replicas": 2},
                "worker": {"replicas": 4},
                "trainer": {
                    "model": "m:m",
                    "dataset": "m:d",
                    "optimizer": {"name": "SGD", "learningRate": 0.1},
                    "batchSize": 8,
                    "maxSteps": 10,
                },
            }
        )
        self.said: list[tuple[Member, MessageType, dict[str, Any]]] = []
        self.dropped: list[Any] = []
        self.round = 0
        self.tracker = Tracker(attempt=1)
        self.training = GroupedCoordinator(
            sender=self, store=None, tracker=self.tracker, config=config, incarnation=name
        )
        self.training.open(0)
        self.training.begin(0)

    def send(self, member: Member, kind: MessageType, **fields: Any) -> None:
        self.said.append((member, kind, fields))

    def answer(self) -> None:
        """The servers do, until nothing is asked any more."""
        while asked := [one for one in self.said if one[0] in SERVERS]:
            self.said = [one for one in self.said if one not in asked]
            for server, kind, fields in asked:
                self.round = fields.get("generation", self.round)
                if kind is MessageType.DROP:
                    self.dropped.append(fields["ranks"])
                state = {"type": MessageType.STATE, "id": fields.get("id"), **self.state()}
                self.training.on_message(server, state, 1)

    def state(self) -> dict[str, Any]:
        return {"generation": self.round, "applied": [], "ahead": 0}

    def take(self, kind: MessageType) -> list[tuple[int, dict[str, Any]]]:
        """What ranks were told of this kind; the rest of what was said to them is forgotten."""
        self.answer()
        said, self.said = self.said, []
        return [(member.rank, fields) for member, what, fields in said if what is kind]

    def say(self, rank: int, message: dict[str, Any], **fields: Any) -> None:
        self.training.on_message(RANKS[rank], message | fields, 1)

    def train(self) -> dict[int, str]:
        """All come, and both groups get a round; their leases."""
        for server in SERVERS:
            self.training.joined(server, self.state(), 0)
        for rank in range(4):
            self.training.joined(RANKS[rank], {}, 0)
            self.say(rank, AWAITS)
        names = {rank: fields["formation"] for rank, fields in self.take(MessageType.FORM)}
        assert names[0] == names[2 - 1] != names[2] == names[3]
        for rank in (0, 2):
            self.say(rank, READY, formation=names[rank], buffers=False, keeps_model=False, **DATA)
        rounds = self.take(MessageType.ROUND)
        assert [rank for rank, _ in rounds] == [0, 2], "the first rank of each group is a worker"
        return {rank: fields["stay"] for rank, fields in rounds}

    def parts(self, rank: int, lease: str, *, done: list[int] | None = None) -> list[int]:
        self.say(rank, REQUEST, stay=lease, count=1, done=done or [])
        return [part for to, fields in self.take(MessageType.ASSIGN) if to == rank for part in fields["slices"]]


def test_a_group_is_one_worker_and_has_one_part_of_a_step() -> None:
    table = Table()
    leases = table.train()
    assert table.tracker.world_size == 4
    assert (table.parts(0, leases[0]), table.parts(2, leases[2])) == ([0], [1])


def test_a_lost_rank_costs_its_group_a_process_group_and_the_other_only_its_lease() -> None:
    table = Table()
    leases = table.train()
    assert (table.parts(0, leases[0]), table.parts(2, leases[2])) == ([0], [1])
    table.training.lost(RANKS[3], 2)
    said = list(table.said)
    assert [member.rank for member, kind, _ in said if kind is MessageType.DISSOLVE] == [2]
    over = [(member.rank, fields["stay"]) for member, kind, fields in said if kind is MessageType.REFORM]
    assert over == [(0, leases[0]), (1, leases[0])], "each rank hears which lease is over"
    table.answer()
    assert table.dropped == [[2, 3]] * len(SERVERS), "the servers forget both ranks of the group"
    table.say(0, READY, formation="m.0.1", buffers=False, keeps_model=False, **DATA)
    [(_, fields)] = table.take(MessageType.ROUND)
    assert table.parts(0, fields["stay"]) == [0]
    assert table.parts(0, fields["stay"], done=[0]) == [1], "the part of the lost group is computed by the other one"
    table.training.joined(RANKS[3], {}, 3)
    table.say(2, AWAITS)
    assert table.take(MessageType.FORM) == [], "the new process makes its model first"
    table.say(3, AWAITS)
    assert [rank for rank, _ in table.take(MessageType.FORM)] == [2, 3]


def test_a_message_of_a_group_that_is_over_changes_nothing() -> None:
    table = Table()
    leases = table.train()
    table.training.lost(RANKS[3], 2)
    table.take(MessageType.DISSOLVE)
    table.say(2, READY, formation="m.1.2", buffers=False, keeps_model=False, **DATA)
    table.say(2, REQUEST, stay=leases[2], count=1, done=[])
    assert table.take(MessageType.ROUND) == []


def test_a_new_master_finds_groups_as_they_are() -> None:
    table = Table("n")
    table.round = 4
    for server in SERVERS:
        table.training.joined(server, table.state(), 0)
    for rank in (1, 2, 3, 0):
        hello = {"formation": f"m.{rank // 2}.1"} | ({**DATA, "buffers": False} if rank in (0, 2) else {})
        table.training.joined(RANKS[rank], hello, 0)
    said = list(table.said)
    assert not [one for one in said if one[1] in (MessageType.FORM, MessageType.DISSOLVE)]
    assert sorted(rank for rank, _ in table.take(MessageType.ROUND)) == [0, 2]


def test_a_new_master_ends_a_group_of_which_one_process_is_new() -> None:
    table = Table("n")
    table.training.joined(RANKS[2], {"formation": "m.1.1"}, 0)
    assert table.take(MessageType.DISSOLVE) == [], "the other one may be there still"
    table.training.joined(RANKS[3], {"awaits_group": True}, 0)
    assert table.take(MessageType.DISSOLVE) == [(2, {"formation": "m.1.1"})]
    table.say(2, AWAITS)
    assert [rank for rank, _ in table.take(MessageType.FORM)] == [2, 3]


def test_the_ranks_that_are_missing_are_named() -> None:
    table = Table()
    for server in SERVERS:
        table.training.joined(server, table.state(), 0)
    for rank in (0, 1, 2):
        table.training.joined(RANKS[rank], {}, 0)
        table.say(rank, AWAITS)
    assert table.training.waiting_for(5) == "worker-3 (0 s)"


def test_a_rank_that_is_to_end_is_released_by_itself() -> None:
    table = Table()
    table.train()
    table.said.clear()
    table.say(1, {"type": MessageType.LEAVING})
    assert table.take(MessageType.RELEASED) == [(1, {})]


def test_a_rank_that_comes_back_in_a_process_group_that_is_over_leaves_it() -> None:
    formation = Formation([0, 1])
    for rank in (0, 1):
        formation.join(rank, None, waits=True)
    assert formation.settle("a") is Step.FORM
    formation.lose(1)
    assert formation.settle("b") is Step.DISSOLVE
    assert formation.take_stale() == {0: "a"}
    formation.join(1, "a", waits=False)
    assert formation.settle("b") is Step.DISSOLVE
    assert formation.take_stale() == {1: "a"}
    assert formation.settle("b") is Step.NOTHING
