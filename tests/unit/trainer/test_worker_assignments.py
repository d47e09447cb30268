"""What a worker of parameter servers requests from the master, and under which lease."""

import threading
from types import SimpleNamespace
from typing import Any

from disttrain_trainer.net.members import ParameterServerMember, Round
from disttrain_trainer.strategies.parameter_server import Worker


def worker_in(member: ParameterServerMember) -> tuple[Worker, list[dict[str, Any]]]:
    """A worker, and what it says."""
    said: list[dict[str, Any]] = []
    worker = Worker.__new__(Worker)
    worker._member = member
    worker._control = SimpleNamespace(  # type: ignore[assignment]
        changed=threading.Condition(), send=lambda kind, **fields: said.append(fields)
    )
    worker._seconds, worker._done = 0.0, []
    return worker, said


def enter(member: ParameterServerMember, lease: str) -> Round:
    member.on_message({"type": "world", "generation": 1, "stay": lease, "buffers": None, "anew": True})
    assert member.round is not None
    return member.round


def test_a_worker_asks_once_until_it_is_answered() -> None:
    member = ParameterServerMember()
    worker, said = worker_in(member)
    this_round = enter(member, "m.1")
    worker._request(this_round)
    worker._request(this_round)
    assert said == [{"stay": "m.1", "count": 2, "done": []}]
    member.on_message({"type": "tickets", "stay": "m.1", "slices": []})
    worker._request(this_round)
    assert len(said) == 2


def test_a_worker_that_is_called_into_another_stay_while_it_asks_asks_again_in_that_one() -> None:
    # Otherwise the request of the earlier lease, which the master ignores, would count as open, and the worker would wait for ever.
    member = ParameterServerMember()
    worker, said = worker_in(member)
    earlier = enter(member, "m.1")
    this_round = enter(member, "m.2")
    worker._request(earlier)
    assert said == []
    worker._request(this_round)
    assert said == [{"stay": "m.2", "count": 2, "done": []}]
