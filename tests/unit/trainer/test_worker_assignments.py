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
        changed=threading.Condition(), send=lambda kind, **fields: said.append(fields), wait=lambda ready, **_: ready()
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


def test_an_order_to_evaluate_that_comes_with_the_next_round_waits_for_that_round() -> None:
    # The connection to the master broke while the worker waited for the end: both messages come at once, before the main thread wakes.
    member = ParameterServerMember()
    worker, _ = worker_in(member)
    evaluated: list[Round] = []
    worker._report = lambda: None  # type: ignore[method-assign]
    worker._evaluate = lambda client, this_round: evaluated.append(this_round)  # type: ignore[method-assign]
    earlier, client = enter(member, "m.1"), SimpleNamespace(leave=lambda: None)
    both = threading.Timer(0.005, lambda: (enter(member, "m.2"), member.on_message({"type": "evaluate"})))
    both.start()
    assert worker._next_assignment(client, earlier, False) is None  # type: ignore[arg-type]
    both.join()
    assert evaluated == []
    assert member.round is not None
    assert worker._next_assignment(client, member.round, False) == -1  # type: ignore[arg-type]
    assert evaluated == [member.round]
    assert not member.evaluate
