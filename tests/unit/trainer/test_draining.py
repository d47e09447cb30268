"""When draining members are released, and the master."""

from disttrain.api.names import Role
from disttrain_trainer.coordinator.draining import DrainingMembers
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.net.peers import Member

WORKERS = [Member(Role.WORKER, rank) for rank in range(2)]


class Sent(list[tuple[Member, MessageType]]):
    def send(self, member: Member, kind: MessageType, **fields: object) -> None:
        self.append((member, kind))


def test_draining_member_is_released_once_and_a_lost_one_is_not() -> None:
    sent = Sent()
    draining = DrainingMembers(sent)
    draining.add(WORKERS[0])
    draining.add(WORKERS[1])
    draining.forget(WORKERS[1])
    draining.release()
    draining.release()
    assert sent == [(WORKERS[0], MessageType.RELEASED)]


def test_master_is_released_only_after_it_received_sigterm() -> None:
    draining = DrainingMembers(Sent())
    draining.release()
    assert not draining.released
    draining.terminate()
    assert not draining.released
    draining.release()
    assert draining.released
