"""A script's own loop on parameter servers: what our loop trains, each sample once, through a kill, and with its own state."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from disttrain.api.names import Role
from training.job import Job, checkpoints, digits, final_parameters, served

STEPS, CLIP = 28, 0.5
SCRIPT = """
import os, signal, time
from pathlib import Path
import torch
from torch.nn import functional
from torch.utils.data import Dataset
from disttrain_trainer import session
from disttrain_trainer.examples import digits
from disttrain_trainer.strategies import own_loop

rank = os.environ["RANK"]
data = digits.dataset({}, "train")

class Noted(Dataset):
    def __len__(self):
        return len(data)

    def __getitem__(self, number):
        return (number, *data[number])

model = digits.model({})
ps = session.parameter_server(model)
found = session.restore()
if found is not None:
    Path(f"restored-{rank}").write_text(f"{found['batches']} {found['note']['mean'].tolist()}")
batches = found["batches"] if found else 0
attempt = os.environ["DISTTRAIN_ATTEMPT"]
Path(f"here-{attempt}-{rank}").touch()
while len(list(Path().glob(f"here-{attempt}-*"))) < 2:  # a worker that is early would train everything alone
    time.sleep(0.01)
mine = set()
for numbers, inputs, targets in session.batches(Noted(), batch_size=64):
    loss = functional.cross_entropy(model(inputs), targets)
    loss.backward()
    batches += 1
    member = own_loop.present()._member
    part = member.in_work
    mine.add(part)
    # A worker that was ready before the other one has both parts of some steps.
    shared = part >= 12 and part ^ 1 not in {*mine, *member.assignments}
    if rank == "1" and shared and not Path("killed").exists() and Path("kill").exists():
        while Path("hold").exists() and not Path("held").exists():
            time.sleep(0.001)
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == "0" and shared and Path("hold").exists() and not Path("held").exists():
        this_round = member.round
        Path("held").touch()
        while member.round is this_round:
            time.sleep(0.001)
    session.checkpoint({"batches": batches, "note": {"mean": torch.tensor([1.0, 2.0])}})
    ps.step(loss)
    with open(f"samples-{rank}", "a") as file:
        file.write(" ".join(map(str, numbers.tolist())) + "\\n")
Path(f"end-{rank}").write_text(repr(sum(p.double().sum().item() for p in model.parameters())))
"""


def own_loop(folder: Path, script: str = SCRIPT, consistency: str = "Sync", every: int = 1000, **trainer: Any) -> Job:
    (folder / "train.py").write_text(script)
    spec = digits(**served(consistency), **checkpoints(every))
    kept = {name: spec["trainer"][name] for name in ("optimizer", "batchSize")}
    spec["trainer"] = {
        **kept,
        "script": {"file": "train.py"},
        "maxSteps": 28,
        "deterministic": consistency == "Sync",
        "maxGradientNorm": CLIP,
        **trainer,
    }
    return Job(folder=folder, spec=spec, in_place=True)


def samples(folder: Path) -> Counter[int]:
    return Counter(int(word) for file in folder.glob("samples-*") for word in file.read_text().split())


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The parameters that our loop trains."""
    folder = tmp_path_factory.mktemp("ours")
    trainer = {"maxSteps": STEPS, "epochs": None, "evaluate": None, "deterministic": True, "maxGradientNorm": CLIP}
    with Job(folder=folder, spec=digits(**served("Sync"), **checkpoints(1000), trainer=trainer)) as job:
        job.train()
    return final_parameters(folder, STEPS)


@pytest.mark.parametrize("hold", [False, True], ids=["at any time", "while the other one computes"])
def test_a_script_whose_worker_is_killed_trains_the_bits_of_our_loop_and_every_sample_once(
    hold: bool, ours: torch.Tensor, tmp_path: Path
) -> None:
    """hold: the step of the other worker, which the master calls away, cannot reach the servers; it returns when they have its gradient."""
    (tmp_path / "kill").touch()
    if hold:
        (tmp_path / "hold").touch()
    with own_loop(tmp_path, every=5) as job:
        progress = job.train()
    assert (tmp_path / "killed").exists()
    assert torch.equal(final_parameters(tmp_path, STEPS), ours)
    assert progress.loss is not None
    assert progress.loss < 1
    # An epoch has 22 batches of 64 samples and one of 29. The batch in which the worker was killed is not noted: its step did not return.
    counted = samples(tmp_path)
    assert sum(counted.values()) == 1437 + (STEPS - 23) * 64
    assert len(counted) == 1437, "every sample of the first epoch"
    assert max(counted.values()) == 2, "those of the second"


def test_a_script_begins_again_when_a_server_is_lost_before_the_first_checkpoint(
    ours: torch.Tensor, tmp_path: Path
) -> None:
    with own_loop(tmp_path, SCRIPT.replace("batches += 1", "batches += 1; time.sleep(0.03)")) as job:
        job.start()
        job.until(lambda progress: progress.step >= 3)
        job.kill_inner(Role.PARAMETER_SERVER, 0)
        job.complete()
        assert "this script's first model is gone" in job.logs()
    assert torch.equal(final_parameters(tmp_path, STEPS), ours)


@pytest.mark.parametrize("consistency", ["Async"])
def test_a_script_goes_on_from_a_checkpoint_with_its_own_state(consistency: str, tmp_path: Path) -> None:
    for steps in (10, 20):
        with own_loop(tmp_path, consistency=consistency, every=5, maxSteps=steps) as job:
            job.config = job.config.model_copy(update={"attempt": steps // 10})
            job.train()
    found = [file.read_text() for file in tmp_path.glob("restored-*")]
    assert len(found) == 2
    assert all(0 < int(text.split()[0]) <= 20 and text.endswith("[1.0, 2.0]") for text in found)


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("import torch", 1, "the script ended with exit code 0 and has trained nothing"),
        ("BATCHES.step()", 1, "ps.step() was called without a batch"),
        ("next(BATCHES); next(BATCHES)", 1, "the script takes the next batch without ps.step() for the one before"),
        ("next(BATCHES)", 1, "the script ended with exit code 0 before the training was done"),
        ("session.batches(data, batch_size=3)", 2, "batches got batch_size=3, and trainer.batchSize is 64"),
        ("session.checkpoint({'a': [object()]})", 2, "checkpoint: state['a'][0] is a object"),
        (
            "torch.distributed.init_process_group('gloo')",
            2,
            "trainer.script calls torch.distributed.init_process_group",
        ),
        ("for batch in BATCHES: ps.step()", 1, "ps.step() found no gradient in the model"),
    ],
)
def test_a_mistake_of_the_script_is_one_line(script: str, code: int, said: str, tmp_path: Path) -> None:
    text = """
import torch, torch.distributed
from disttrain_trainer import session
from disttrain_trainer.examples import digits
data = digits.dataset({}, "train")
"""
    if script != "import torch":
        text += "ps = session.parameter_server(digits.model({}))\n"
    text += script.replace("BATCHES.step()", "ps.step()").replace(
        "BATCHES", "batches" if "next" in script else "session.batches(data)"
    )
    if "next" in script:
        text = text.replace("next(batches)", "batches = session.batches(data); next(batches)", 1)
    with own_loop(tmp_path, text) as job:
        job.start()
        assert job.wait(Role.WORKER, 0) == code
        assert said in job.termination(Role.WORKER, 0).message
        assert "Traceback" not in job.log(Role.WORKER, 0)


def test_micro_batches_of_one_batch_are_one_step(tmp_path: Path) -> None:
    folders = []
    for micro in (1, 4):
        folder = tmp_path / str(micro)
        folder.mkdir()
        folders.append(folder)
        text = f"""
import contextlib
from torch.nn import functional
from disttrain_trainer import session
from disttrain_trainer.examples import digits
model = digits.model({{}})
ps = session.parameter_server(model)
for inputs, targets in session.batches(digits.dataset({{}}, "train")):
    pieces = list(zip(inputs.chunk({micro}), targets.chunk({micro})))
    for number, (x, y) in enumerate(pieces):
        loss = functional.cross_entropy(model(x), y) * len(x) / len(inputs)
        loss.backward()
        with ps.no_sync() if number + 1 < len(pieces) else contextlib.nullcontext():
            ps.step(loss)
"""
        with own_loop(folder, text, maxSteps=6) as job:
            job.train()
    torch.testing.assert_close(*(final_parameters(folder, 6) for folder in folders), atol=1e-6, rtol=0)


def test_a_script_of_a_job_without_servers_that_asks_for_them_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("from disttrain_trainer import session\nsession.parameter_server(None)\n")
    spec = {
        "strategy": {"type": "DataParallel"},
        "trainer": {"script": {"file": "train.py"}},
        "worker": {"replicas": 1},
    }
    with Job(folder=tmp_path, spec=spec) as job:
        job.start()
        assert job.wait(Role.WORKER, 0) == 2
        assert "session.parameter_server needs strategy.type ParameterServer" in job.termination(Role.WORKER, 0).message
        assert "Traceback" not in job.log(Role.WORKER, 0)
