"""Programs for the trainers of others do the same as a script and as a command as they do under torchrun: steps, world and last loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from clients.running import SECONDS, alone, environment, under_disttrain
from local_runs.command import run

pytestmark = pytest.mark.timeout(3 * SECONDS)

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2")
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""torchrun 2.15 gives the processes that it starts again the store of those before, whose keys they find: they wait for ever."""
RENDEZVOUS = [
    *("torchrun", "--nnodes", "$(WORLD_SIZE)", "--rdzv-backend", "c10d", "--rdzv-id", "x"),
    *("--rdzv-endpoint", "$(MASTER_ADDR):$(MASTER_PORT)"),
]


@pytest.mark.parametrize(
    ("file", "launcher"),
    [
        pytest.param("bare.py", ["torchrun"], id="a bare torchrun"),
        pytest.param("bare.py", RENDEZVOUS, id="torchrun with a rendezvous"),
        pytest.param("accelerated.py", ["torchrun"], id="accelerate"),
        pytest.param("hf_trainer.py", ["torchrun"], id="the Trainer of transformers"),
        pytest.param("remote.py", ["torchrun"], id="RPC"),
    ],
)
def test_two_workers(tmp_path: Path, file: str, launcher: list[str]) -> None:
    expected = alone(tmp_path / "alone", *TORCHRUN, file)
    assert expected["world"] == 2
    script, _ = under_disttrain(tmp_path / "script", {"script": {"file": file}}, {"replicas": 2})
    command, _ = under_disttrain(tmp_path / "command", {"command": [*launcher, file]}, {"replicas": 2})
    assert script == command == expected


def test_the_trainer_of_transformers_reports_by_itself(tmp_path: Path) -> None:
    _, status = under_disttrain(tmp_path, {"command": ["torchrun", "hf_trainer.py"]}, {"replicas": 2})
    assert status.training is not None
    assert (status.training.step, status.training.total_steps, status.training.epoch) == (20, 20, 2)
    assert status.training.loss is not None


def test_what_torchrun_prints_is_read(tmp_path: Path) -> None:
    pattern = r"step (?P<step>\d+)/(?P<total>\d+) loss (?P<loss>\S+)"
    trainer = {"command": ["torchrun", "bare.py"], "progress": {"pattern": pattern}}
    result, status = under_disttrain(tmp_path, trainer, {"replicas": 2})
    assert status.training is not None
    assert (status.training.step, status.training.total_steps) == (40, 40)
    assert result["steps"] == 40


def test_lightning(tmp_path: Path) -> None:
    """By the processes that torchrun starts, by those of a script, and by those that Lightning starts itself, on one worker and on two."""
    file = "lightning_fit.py"
    expected = alone(tmp_path / "alone", *TORCHRUN, file, "1", "2")
    assert expected["world"] == 2
    script, _ = under_disttrain(tmp_path / "script", {"script": {"file": file, "args": ["1", "2"]}}, {"replicas": 2})
    torchrun, _ = under_disttrain(tmp_path / "torchrun", {"command": ["torchrun", file, "2", "1"]}, {"replicas": 2})
    one, _ = under_disttrain(tmp_path / "one", {"command": ["python", file, "1", "2"]}, {"replicas": 1})
    two, _ = under_disttrain(tmp_path / "two", {"command": ["python", file, "2", "1"]}, {"replicas": 2})
    assert script == torchrun == one == two == expected


def test_fsdp2_goes_on_from_its_own_checkpoint_after_a_kill(tmp_path: Path) -> None:
    calm = alone(tmp_path / "calm", *TORCHRUN, "fsdp2.py")
    torchrun = alone(tmp_path / "alone", *TORCHRUN, "--max-restarts", "2", "fsdp2.py", KILL="1", **OWN_STORE)
    script, status = under_disttrain(tmp_path / "script", {"script": {"file": "fsdp2.py"}}, {"replicas": 2}, KILL="1")
    command, _ = under_disttrain(
        tmp_path / "command",
        {"command": ["torchrun", "--standalone", "--max-restarts", "2", "fsdp2.py"]},
        {"replicas": 1, "processesPerWorker": 2},
        KILL="1",
        **OWN_STORE,
    )
    assert script == command == torchrun == calm
    assert status.restarts is not None
    assert status.restarts.total == 1


def test_a_program_that_starts_its_processes_itself(tmp_path: Path) -> None:
    expected = alone(tmp_path / "alone", "python", "spawn.py")
    script, _ = under_disttrain(tmp_path / "script", {"script": {"file": "spawn.py"}}, {"replicas": 1})
    command, _ = under_disttrain(tmp_path / "command", {"command": ["python", "spawn.py"]}, {"replicas": 1})
    assert script == command == expected


@pytest.mark.parametrize("name", ["transformers-loop", "transformers-trainer", "lightning"])
def test_an_example_trains(tmp_path: Path, name: str) -> None:
    file = EXAMPLES / f"{name}.yaml"
    done = run(tmp_path, str(file), "-o", "json", environment=environment(), seconds=SECONDS)
    assert done.code == 0, done
    training = done.job["status"]["training"]
    assert training["step"] == training["totalSteps"]
    (job, *_) = yaml.safe_load_all(file.read_text())
    assert job["metadata"]["name"] == name
