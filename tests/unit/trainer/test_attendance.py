"""Who is missing, in words; and who may go."""

from disttrain.api.names import Role
from disttrain_trainer.coordinator.attendance import Absences, Leavers
from disttrain_trainer.net.messages import Say
from disttrain_trainer.net.peers import Member

WORKERS = [Member(Role.WORKER, rank) for rank in range(8)]


class Sent(list[tuple[Member, Say]]):
    def send(self, member: Member, kind: Say, **fields: object) -> None:
        self.append((member, kind))


def test_the_longest_absence_is_said_and_five_names() -> None:
    absences = Absences()
    absences.begin(WORKERS[3], 10)
    assert absences.words(WORKERS[2:4], 12) == "worker-2, worker-3 (2 s)"
    assert absences.words(WORKERS, 20) == "worker-0, worker-1, worker-2, worker-3, worker-4 and 3 more (10 s)"
    assert absences.words([], 20) is None


def test_an_absence_that_ended_begins_anew() -> None:
    absences = Absences()
    absences.begin(WORKERS[0], 0)
    absences.end(WORKERS[0])
    assert absences.words(WORKERS[:1], 100) == "worker-0 (0 s)"


def test_who_leaves_is_told_once_and_who_is_gone_is_not() -> None:
    sent = Sent()
    leavers = Leavers(sent)
    leavers.add(WORKERS[0])
    leavers.add(WORKERS[1])
    leavers.forget(WORKERS[1])
    leavers.release()
    leavers.release()
    assert sent == [(WORKERS[0], Say.RELEASED)]


def test_the_master_goes_only_when_it_was_told_to() -> None:
    leavers = Leavers(Sent())
    leavers.release()
    assert not leavers.released
    leavers.terminate()
    assert not leavers.released
    leavers.release()
    assert leavers.released
