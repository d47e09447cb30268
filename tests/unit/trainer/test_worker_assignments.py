"""What a worker of parameter servers requests from the master, and under which lease."""

import threading
from types import SimpleNamespace
from typing import Any

from disttrain_trainer.loop.stopwatch import Stopwatch
from disttrain_trainer.net.members import ParameterServerMember, Round
from disttrain_trainer.parameter_server.assignments import Assignments
from disttrain_trainer.strategies.push_pull import PushPull


class Control:
    """A control connection whose messages are kept in `said`."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.said: list[dict[str, Any]] = []

    def send(self, _: str, **fields: Any) -> None:
        self.said.append(fields)

    def wait(self, ready: Any, **_: Any) -> Any:
        return ready()


def enter(member: ParameterServerMember, lease: str) -> Round:
    member.on_message({"type": "world", "generation": 1, "stay": lease, "buffers": None, "anew": True})
    assert member.round is not None
    return member.round


def assignments(control: Control, member: ParameterServerMember, this_round: Round) -> Assignments:
    made = Assignments(control, member)  # type: ignore[arg-type]
    made.begin(this_round)
    return made


def test_a_worker_asks_once_until_it_is_answered() -> None:
    control, member = Control(), ParameterServerMember()
    ours = assignments(control, member, enter(member, "m.1"))
    ours.request()
    ours.request()
    assert control.said == [{"stay": "m.1", "count": 2, "done": []}]
    member.on_message({"type": "tickets", "stay": "m.1", "slices": []})
    ours.request()
    assert len(control.said) == 2


def test_a_worker_that_gets_another_lease_while_it_requests_parts_requests_them_again_with_that_one() -> None:
    # Otherwise the request of the earlier lease, which the master ignores, would count as open, and the worker would wait for ever.
    control, member = Control(), ParameterServerMember()
    earlier = assignments(control, member, enter(member, "m.1"))
    ours = assignments(control, member, enter(member, "m.2"))
    earlier.request()
    assert control.said == []
    ours.request()
    assert control.said == [{"stay": "m.2", "count": 2, "done": []}]


def test_an_order_to_evaluate_that_comes_with_the_next_round_waits_for_that_round() -> None:
    # The connection to the master broke while the worker waited for the end: both messages come at once, before the main thread wakes.
    control, member = Control(), ParameterServerMember()
    evaluated: list[Round] = []

    def exchange_in(this_round: Round) -> PushPull:
        def evaluate() -> None:
            evaluated.append(this_round)
            member.on_message({"type": "reform"})  # and no other part follows

        return PushPull(
            control=control,  # type: ignore[arg-type]
            member=member,
            metrics=None,  # type: ignore[arg-type]
            assignments=assignments(control, member, this_round),
            client=SimpleNamespace(leave=lambda: None),  # type: ignore[arg-type]
            loop=SimpleNamespace(stopwatch=Stopwatch({}), report=lambda: None),  # type: ignore[arg-type]
            schedule=None,  # type: ignore[arg-type]
            replica=SimpleNamespace(model=None),  # type: ignore[arg-type]
            is_sync=True,
            every=0,
            save=lambda: None,
            evaluate=evaluate,
            on_part=lambda: None,
        )

    earlier = enter(member, "m.1")
    both = threading.Timer(0.005, lambda: (enter(member, "m.2"), member.on_message({"type": "evaluate"})))
    both.start()
    assert not exchange_in(earlier).next_parts()
    both.join()
    assert evaluated == []
    this_round = member.round
    assert this_round is not None
    assert not exchange_in(this_round).next_parts()
    assert evaluated == [this_round]
    assert not member.evaluate
