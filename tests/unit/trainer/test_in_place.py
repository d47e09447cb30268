"""Which ends of a process are restarted in its pod, how soon, and what the plan gets to count."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from disttrain.api.termination import Termination
from disttrain_trainer.net import incoming
from disttrain_trainer.runtime.in_place import NO_STEP, End, StepCell, account, pause, repeats, restarts
from disttrain_trainer.runtime.machine import oom_kills

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def end(code: int, *, step: int = 7, by_signal: bool | None = None, oom: bool = False) -> End:
    return End(code=code, by_signal=code > 128 if by_signal is None else by_signal, step=step, out_of_memory=oom)


@pytest.mark.parametrize(
    ("last", "again"),
    [
        pytest.param(end(75), True, id="a peer was lost"),
        pytest.param(end(134, by_signal=False), True, id="a failure of its own"),
        pytest.param(end(134), True, id="abort()"),
        pytest.param(end(137), True, id="SIGKILL"),
        pytest.param(end(139), True, id="SIGSEGV"),
        pytest.param(end(135), True, id="SIGBUS"),
        pytest.param(end(137, oom=True), False, id="the memory limit"),
        pytest.param(end(139, oom=True), True, id="SIGSEGV after the memory limit killed a child of it"),
        pytest.param(end(0), False, id="exit(0) of user code"),
        pytest.param(end(1), False, id="the user's code"),
        pytest.param(end(2), False, id="wrong input"),
        pytest.param(end(3), False, id="any other code"),
        pytest.param(end(137, by_signal=False), False, id="a code that only looks like a signal"),
        pytest.param(end(143, by_signal=False), False, id="ended by SIGTERM, in order"),
    ],
)
def test_which_ends_are_restarted_in_place(last: End, again: bool) -> None:
    assert restarts([last], codes_of_rules=()) is again
    assert restarts([end(75, step=1), last], codes_of_rules=()) is again


@pytest.mark.parametrize("code", [75, 134, 137])
def test_a_code_that_the_failure_policy_names_is_the_plans(code: int) -> None:
    assert not restarts([end(code, by_signal=code != 75)], codes_of_rules=(code,))


def test_the_same_end_three_times_is_no_accident() -> None:
    assert restarts([end(139)] * 2, codes_of_rules=())
    assert not restarts([end(139)] * 3, codes_of_rules=())
    assert not restarts([end(137), *[end(139)] * 3], codes_of_rules=())
    assert restarts([end(139), end(139), end(139, step=8)], codes_of_rules=())
    assert restarts([end(139), end(137), end(139)], codes_of_rules=())
    assert not repeats([end(139)] * 2)


def test_the_pause_grows_while_no_step_is_made() -> None:
    assert pause([end(137)]) == 0
    assert pause([end(137), end(137, step=8)]) == 0
    assert pause([end(137), end(137)]) == 1
    assert pause([end(137), end(75, step=NO_STEP), end(137)]) == 2
    assert pause([end(137), end(75), end(137), end(75), end(137, step=9)]) == 0
    assert pause([end(137), end(75)] * 10) == 30


def test_what_is_counted_are_all_of_them_and_those_that_failed_by_themselves() -> None:
    ends = [(NOON + timedelta(seconds=n), each) for n, each in enumerate([end(137), end(75), end(139), end(75)])]
    counted = account("uid", ends)
    assert counted is not None
    assert (counted.restarts, counted.failures, counted.exit_code) == (4, 2, 139)
    assert (counted.message, counted.time) == ("killed by SIGSEGV at step 7", NOON + timedelta(seconds=2))
    assert account("uid", []) is None
    lost = account("uid", ends[1:2])
    assert lost is not None
    assert (lost.failures, lost.exit_code, lost.message) == (0, 75, "ended with exit code 75 at step 7")


def test_a_master_and_a_termination_message_give_back_what_was_counted() -> None:
    counted = account("uid", [(NOON, end(137, step=NO_STEP))])
    assert counted is not None
    hello = incoming.parse_hello(
        {"type": "hello", "job": "u", "attempt": 1, "role": "worker", "rank": 0, "incarnation": "i"}
        | {"restarts": {**counted.model_dump(mode="json"), "of_a_later_release": 1}}
    )
    assert hello.restarts is not None
    assert hello.restarts.value == counted
    assert Termination.decode(Termination(restarts_in_place=counted).encode()).restarts_in_place == counted


def test_the_step_of_a_killed_process_is_known() -> None:
    cell = StepCell()
    assert cell.step == NO_STEP
    pid = os.fork()
    if not pid:
        cell.step = 12
        os._exit(0)
    os.waitpid(pid, 0)
    assert cell.step == 12


EVENTS = "low 0\nhigh 3\nmax 12\noom 4\noom_kill {}\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


@pytest.mark.parametrize(
    ("own", "file", "text"),
    [
        pytest.param("0::/\n", "memory.events", EVENTS, id="a container of its own"),
        pytest.param("0::/user.slice/a\n", "user.slice/a/memory.events", EVENTS, id="a cgroup of the machine"),
        pytest.param(
            "0::/of/the/node\n", "memory.events", EVENTS, id="a path of the node that the container does not see"
        ),
        pytest.param("9:memory:/\n1:cpu:/\n0::/\n", "memory/memory.oom_control", CONTROL, id="version 1"),
        pytest.param(
            "9:memory:/kubepods/x\n", "memory/kubepods/x/memory.oom_control", CONTROL, id="version 1, with a path"
        ),
    ],
)
def test_what_the_memory_limit_killed_is_read_off_the_cgroup(tmp_path: Path, own: str, file: str, text: str) -> None:
    (tmp_path / "own").write_text(own)
    root = tmp_path / "cgroup"
    assert oom_kills(root, tmp_path / "own") == 0
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text.format(2))
    assert oom_kills(root, tmp_path / "own") == 2
    (root / file).write_text("nonsense")
    assert oom_kills(root, tmp_path / "own") == 0
    assert oom_kills(root, tmp_path / "missing") == 0
