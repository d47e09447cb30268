"""Exit code 0 does not end a training: the process and the master say when it is done."""

import pytest

from disttrain.api import Termination
from disttrain.plan.model import CreatePod
from unit.plan.builders import MASTER, SERVER, WORKER, make_job

LIMIT = {"backoffLimit": 1}


def test_a_worker_that_exits_with_0_in_mid_training_is_replaced_and_counted() -> None:
    scene = make_job().training(9).exited_early(1).seen()
    assert scene.says("Restarting")[0] == "True"
    assert "ExitedEarly" in scene.condition("Restarting").message
    restarts = scene.status.restarts
    assert restarts is not None
    assert (restarts.counted_towards_limit, restarts.last and restarts.last.reason) == (1, "ExitedEarly")
    created = [a for a in scene.after(2).seen().pods.values() if a.index == 1 and a.role is WORKER]
    assert [pod.done for pod in created] == [False]


@pytest.mark.parametrize("policy", ["AllWorkers", "AnyWorker"])
def test_a_job_whose_workers_all_exit_with_0_in_mid_training_is_not_complete(policy: str) -> None:
    scene = make_job().spec(successPolicy=policy).training(9).exited_early(0, 1)
    assert not scene.after(30).seen().status.is_true("Complete")
    assert scene.status.restarts is not None
    assert scene.status.restarts.counted_towards_limit == 1


def test_workers_that_exit_early_again_and_again_fail_the_job() -> None:
    scene = make_job().run_policy(**LIMIT).training(9).exited_early(0, 1).seen()
    scene = scene.after(5).seen().all_run().seen().exited_early(0, 1).seen()
    assert scene.says("Failed") == ("True", "BackoffLimitExceeded")
    assert "exit" in scene.condition("Failed").message


@pytest.mark.parametrize("role", [MASTER, SERVER])
def test_a_master_or_server_that_exits_with_0_early_is_replaced(role: object) -> None:
    assert role in (MASTER, SERVER)
    scene = make_job().servers(1).training(9).exited_early(0, role=role).seen().after(2)  # type: ignore[arg-type]
    made = [action for _ in range(3) for action in scene.step().actions if isinstance(action, CreatePod)]
    assert [(action.role, action.index) for action in made] == [(role, 0)]


def test_a_process_of_an_older_trainer_says_that_it_is_done_by_a_message_without_words() -> None:
    assert Termination.decode('{"message":"","where":""}').done
    assert not Termination.decode('{"message":"ended by SIGTERM","where":""}').done
    assert not Termination.decode("").done


def test_the_end_of_the_log_of_a_killed_program_is_not_given_as_its_reason() -> None:
    said = Termination.decode("step 40 loss 0.1")
    scene = make_job().command().training().failed(1, code=137, reason="OOMKilled", termination=said).after(4).seen()
    assert "last output: step 40 loss 0.1" in scene.condition("Restarting").message
