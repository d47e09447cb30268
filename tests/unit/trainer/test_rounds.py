"""The rounds of a training whose shards have copies, while servers are missing: coordinator/rounds.py."""

from configs import config_of
from disttrain_trainer.coordinator.rounds import Rounds
from disttrain_trainer.coordinator.servers import Servers
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Member

COUNT = 4
CONFIG = config_of(
    {
        "strategy": {"type": "ParameterServer", "parameterServer": {"consistency": "Sync", "replication": 2}},
        "parameterServer": {"replicas": COUNT},
        "worker": {"replicas": 1},
        "trainer": {"model": "m:m", "dataset": "m:d", "optimizer": {"name": "SGD", "learningRate": 0.1}, "maxSteps": 9},
    }
)


class Led:
    """Four servers whose round has begun, each with the copy of the shard before its own; what they are told is kept."""

    def __init__(self) -> None:
        self.told: list[tuple[int, MessageType]] = []
        self.servers = Servers(sender=self, count=COUNT)
        self.rounds = Rounds(
            sender=self,
            servers=self.servers,
            store=None,
            newest=lambda: None,
            answered=lambda manifest, now: None,
            config=CONFIG,
            opened=lambda now: None,
            returned=lambda now: None,
            lost=lambda now: self.servers.drop_questions(),
        )
        self.rounds.look(0)
        for server in range(COUNT):
            self.servers.know(server, {"generation": 0, "applied": []})
            self.rounds.server_joined(server, 0)
        for server in range(COUNT):
            self.servers.know(server, {"generation": 1, "applied": []})
            self.rounds.server_state(server, 1, 0)
        for shard in range(COUNT):
            self.copied(shard)

    def send(self, member: Member, kind: MessageType, **fields: object) -> None:
        self.told.append((member.rank, kind))

    def copied(self, shard: int, *, complete: bool = True) -> None:
        said = {"generation": 1, "shard": shard, "term": 1, "server": (shard + 1) % COUNT, "complete": complete}
        self.rounds.copy_changed(said, 0)

    def lose(self, server: int) -> None:
        self.servers.lose(server)
        self.rounds.server_lost(server, 0)


def test_copy_that_is_lost_while_a_server_is_waited_for_is_not_promoted() -> None:
    led = Led()
    led.lose(0)
    assert (1, MessageType.PROMOTE) in led.told
    led.lose(3)  # and with it shard 3, whose copy was on server 0
    led.copied(1, complete=False)
    led.lose(1)
    led.servers.know(3, {"generation": 1, "applied": [], "shards": [[3, 1, True, True]]})
    led.rounds.server_joined(3, 0)
    led.servers.know(0, {"generation": 1, "applied": [], "shards": [[0, 1, True, True]]})
    led.rounds.server_joined(0, 0)
    assert (2, MessageType.PROMOTE) not in led.told
