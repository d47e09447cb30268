"""A sharded training goes on after the loss of any process: from the copy that another holds, else from the newest checkpoint."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from disttrain.api.environment import MODEL_DIR
from disttrain.api.names import MODEL_FILE, Role
from training.job import Job, Model, checkpoints, digits, held, same
from training.test_sharded import FULLY, hybrid

HELD, STEPS = 12, 16


def spec_of(strategy: dict[str, Any], workers: int, **others: Any) -> dict[str, Any]:
    trainer = held(epochs=None, maxSteps=STEPS, deterministic=True, optimizer={"name": "Adam", "learningRate": 0.01})
    return digits(**strategy, worker={"replicas": workers}, trainer=trainer, **others)


def lose(job: Job, index: int, number: signal.Signals) -> None:
    """Loses a worker while all are held in a step; a frozen one is replaced once the others have noticed."""
    job.kill(Role.WORKER, index, number)
    job.let_go()
    if number is signal.SIGSTOP:
        for other in {*range(job.config.workers)} - {index}:
            job.until(lambda _, other=other: "round 1 ended" in job.log(Role.WORKER, other), timeout=30)
        job.kill(Role.WORKER, index)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_without_a_copy_the_steps_since_the_checkpoint_are_done_again(
    tmp_path: Path, calm: Callable[..., Model], number: signal.Signals
) -> None:
    spec = spec_of(FULLY, 3, **checkpoints(5))
    with Job(folder=tmp_path, spec=spec, peer_timeout=2) as job:
        job.hold(HELD)
        job.start()
        job.until_held(HELD, checkpoint=10)
        lose(job, 0 if number is signal.SIGKILL else 1, number)
        progress = job.complete()
        assert "round 2 begins at step 10" in job.log(Role.WORKER, 2), job.logs()
    assert (progress.step, progress.redone_steps) == (STEPS, 2)
    assert same(job.model, calm(spec))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_with_a_copy_no_step_is_lost(tmp_path: Path, number: signal.Signals) -> None:
    with Job(folder=tmp_path, spec=spec_of(hybrid(2), 4), peer_timeout=2) as job:
        job.hold(HELD)
        job.start()
        job.until_held(HELD)
        lose(job, 1 if number is signal.SIGKILL else 2, number)
        progress = job.complete()
        assert all(f"round 2 begins at step {HELD}" in job.log(Role.WORKER, rank) for rank in (0, 3)), job.logs()
    assert (progress.step, progress.redone_steps) == (STEPS, 0)


def test_a_worker_that_is_told_to_leave_leaves_when_every_rank_has_saved(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=spec_of(FULLY, 2, **checkpoints(1000))) as job:
        job.hold(HELD)
        job.start()
        job.until_held(HELD)
        job.kill(Role.WORKER, 1, signal.SIGTERM)
        job.let_go()
        progress = job.complete()
        assert job.restarts == {(Role.WORKER, 1): 1}
    assert (progress.step, progress.redone_steps) == (STEPS, 0)


def test_a_loss_that_is_not_finite_fails_the_job_and_names_rank_and_step(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "import torch\nfrom disttrain_trainer.examples import digits\n\n"
        "def loss(model, batch):\n"
        "    bad = torch.initial_seed() == BAD\n"
        "    return digits.loss(model, batch) * (torch.nan if bad else 1)\n\n"
        "from disttrain_trainer.data.chance import mix\nBAD = mix(0, 7)\n"
    )
    spec = digits(**FULLY, trainer={"loss": "bad:loss", "epochs": None, "maxSteps": STEPS})
    with Job(folder=tmp_path, spec=spec) as job:
        job.start()
        assert job.wait(Role.WORKER, 1) == 1, job.logs()
        assert "the loss is nan on worker-1 at step 3" in job.termination(Role.WORKER, 1).message


def test_checkpoints_go_on_with_a_new_master_though_the_rounds_store_is_lost(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=spec_of(FULLY, 2, **checkpoints(5))) as job:
        job.hold(HELD)
        job.start()
        job.until_held(HELD, checkpoint=10)
        job.kill(Role.MASTER)
        job.wait(Role.MASTER)
        job.start_one(Role.MASTER)
        job.let_go()
        progress = job.complete()
        assert "round 2" not in job.log(Role.WORKER, 0), job.logs()
    assert progress.last_checkpoint is not None
    assert progress.last_checkpoint.step == STEPS
    assert "abandoned" not in job.log(Role.WORKER, 0)


def test_without_checkpoints_the_model_is_written_though_the_rounds_store_is_lost(tmp_path: Path) -> None:
    with Job(folder=tmp_path, spec=spec_of(FULLY, 2), env={MODEL_DIR: str(tmp_path)}) as job:
        job.hold(HELD)
        job.start()
        job.until_held(HELD)
        job.kill(Role.MASTER)
        job.wait(Role.MASTER)
        job.start_one(Role.MASTER)
        job.let_go()
        progress = job.complete()
    assert (progress.step, progress.redone_steps) == (STEPS, 0)
    assert load_file(tmp_path / MODEL_FILE)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_the_same_over_tls(tmp_path: Path, number: signal.Signals) -> None:
    spec = spec_of(FULLY, 2, **checkpoints(5), network={"tls": "Mutual"})
    with Job(folder=tmp_path, spec=spec, peer_timeout=2) as job:
        job.hold(HELD)
        job.start()
        job.until_held(HELD, checkpoint=10)
        lose(job, 1, number)
        progress = job.complete()
    assert (progress.step, progress.redone_steps) == (STEPS, 2)


def test_a_parameter_that_the_loss_takes_out_of_its_module_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text(
        "import torch\nfrom disttrain_trainer.examples import digits\n\n"
        "def loss(model, batch):\n"
        "    own = next(model.parameters())\n"
        "    return digits.loss(model, batch) + (own * torch.ones(own.shape)).sum()\n"
    )
    with Job(folder=tmp_path, spec=digits(**FULLY, trainer={"loss": "outside:loss"})) as job:
        job.start()
        assert job.wait(Role.WORKER, 0) == 1, job.logs()
        message = job.termination(Role.WORKER, 0).message
    assert "a parameter outside the forward() of its module" in message
    assert "outside.py:6)" in message
