"""A member that waits for a round sees each that begins, also one that is over before its main thread runs."""

import threading
from typing import Any

import pytest

from disttrain_trainer.net.members import CollectiveMember, MemberState, ParameterServerMember
from disttrain_trainer.net.messages import Message, MessageType

ROUND: Message = {"type": MessageType.ROUND, "generation": 4, "source": 0}
REFORM: Message = {"type": MessageType.REFORM}


class Control:
    """A control connection on which messages come at once, before the main thread looks."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.finished = False
        self.sent: list[tuple[MessageType, dict[str, Any]]] = []

    def send(self, kind: MessageType, **fields: Any) -> bool:
        self.sent.append((kind, fields))
        return True

    def wait(self, ready: Any, *, what: str, timeout: float) -> Any:
        found = ready()
        assert found is not None, f"it waits {timeout:g} s for {what}"
        return found


@pytest.fixture
def control() -> Any:
    return Control()


def member_told(control: Any, *messages: Message) -> CollectiveMember:
    """A member that is ready, and that the master sends these."""
    member = CollectiveMember()
    member.get_ready(control)
    for message in messages:
        member.on_message(message)
    return member


def test_a_round_that_is_over_before_it_is_seen_is_seen_and_left(control: Any) -> None:
    member = member_told(control, ROUND, REFORM)
    seen = member.await_round(control, timeout=60)
    assert seen is not None
    assert (seen.number, member.round) == (4, None)
    member.get_ready(control)
    assert control.sent[-1] == (MessageType.READY, {"generation": 4, "step": -1})
    assert member.state is MemberState.READY


def test_after_it_the_member_waits_for_the_next_one(control: Any) -> None:
    member = member_told(control, ROUND, REFORM)
    member.get_ready(control)
    with pytest.raises(AssertionError, match="waits 60 s for the other workers and the master"):
        member.await_round(control, timeout=60)
    member.on_message(ROUND | {"generation": 5})
    assert member.await_round(control, timeout=60) is member.round


def test_so_it_is_with_parameter_servers(control: Any) -> None:
    invited: Message = ROUND | {"stay": "a.1", "buffers": None, "anew": True}
    member = ParameterServerMember()
    member.get_ready(control)
    member.on_message(invited)
    member.on_message(REFORM)
    seen = member.await_round(control, timeout=60)
    assert seen is not None
    assert (seen.lease, member.round) == ("a.1", None)
    member.get_ready(control)
    member.on_message(invited | {"stay": "a.2"})
    member.get_ready(control)
    assert [kind for kind, _ in control.sent] == [MessageType.READY] * 2, "it is in a round, and has not left it"
    assert member.await_round(control, timeout=60) is member.round
