"""`disttrain run` with the real trainer: whole runs of the examples, and what their user sees and gets."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.processes import wait_for
from disttrain.api.job import DistTrainJob
from disttrain.api.reasons import JobState
from disttrain.api.status import DistTrainJobStatus
from disttrain_trainer.examples import charlm
from local_runs.command import DISTTRAIN, Started, left_behind, run
from width import WIDE

EXAMPLES = Path("examples").absolute()


@pytest.mark.timeout(180)
def test_digits_on_a_parameter_server(tmp_path: Path) -> None:
    done = run(tmp_path, str(EXAMPLES / "digits-ps.yaml"), seconds=150)
    assert done.code == 0, done
    assert float(re.findall(r"^  evaluation +accuracy ([0-9.]+)$", done.out, re.M)[0]) >= 0.97
    assert re.search(r"^digits-ps: Complete in ", done.out, re.M)
    assert re.search(r"^\[worker-1\] .*metrics at http://127\.0\.0\.1:\d+/metrics$", done.out, re.M)
    assert done.err == ""
    assert left_behind(tmp_path) == []
    checkpoints = sorted(path.name for path in tmp_path.glob(".disttrain/claims/digits-checkpoints/*/step-*"))
    assert checkpoints[-1] == "step-00000345"


@pytest.mark.timeout(180)
def test_an_elastic_run_is_resized_and_has_that_number_after_it_was_killed(tmp_path: Path) -> None:
    """Its file is made shorter in between: what is trained is enough then."""
    example, file = (EXAMPLES / "digits-elastic.yaml").read_text(), tmp_path / "job.yaml"
    file.write_text(example.replace("epochs: 15", "epochs: 100000"))
    started = Started(tmp_path, str(file))

    def status() -> DistTrainJobStatus:
        written = started.run_folder() / "job.json"
        return DistTrainJob.parse(json.loads(written.read_text())).status if written.exists() else DistTrainJobStatus()

    wait_for("the training", lambda: status().state is JobState.TRAINING, 90)
    scale = [DISTTRAIN, "scale", "digits-elastic", "3"]
    done = subprocess.run(scale, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{started.run_folder().name}: 2 -> 3 workers\n"
    wait_for("a resize", lambda: status().state is JobState.RESIZING, 20)
    wait_for("its end", lambda: status().state is JobState.TRAINING, 60)
    found = status()
    assert found.training is not None
    assert found.training.world_size == 3
    assert found.restarts is None or found.restarts.total == 0
    wait_for("a checkpoint", lambda: list(tmp_path.glob(".disttrain/claims/*/*/step-*/manifest.json")), 30)
    started.process.send_signal(signal.SIGKILL)
    started.process.communicate()
    wait_for("nothing to be left", lambda: not left_behind(tmp_path), 20)

    file.write_text(example.replace("epochs: 15", "epochs: 1"))
    resumed = run(tmp_path, str(file), "--resume", "-o", "json", seconds=90)
    assert resumed.code == 0, resumed
    worker = DistTrainJob.parse(resumed.job).status.worker
    assert worker is not None
    assert worker.target_replicas == 3
    assert "3 of 3 workers succeeded" in resumed.err


@pytest.mark.timeout(180)
def test_encrypted_traffic_changes_no_bit_of_the_model_and_the_run_leaves_no_key(tmp_path: Path) -> None:
    models = []
    for example in ("mlp-sync", "mlp-tls"):
        done = run(tmp_path, str(EXAMPLES / f"{example}.yaml"), seconds=80)
        assert done.code == 0, done
        (model,) = tmp_path.glob(f".disttrain/runs/{example}-*/model.safetensors")
        models.append(load_file(model))
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert not list(tmp_path.rglob("tls.key"))


@pytest.mark.timeout(180)
def test_two_ranks_under_tls_train_the_model_that_they_train_over_gloo(tmp_path: Path) -> None:
    text = re.sub(r"  parameterServer:\n    replicas: 1\n", "", (EXAMPLES / "mlp-tls.yaml").read_text())
    text = re.sub(r"type: ParameterServer\n.*\n.*\n", "type: DataParallel\n", text).replace(
        "replicas: 3", "replicas: 2"
    )
    models = []
    for name, tls in (("mlp-tls", "Mutual"), ("mlp-plain", "Disabled")):
        file = tmp_path / f"{name}.yaml"
        file.write_text(text.replace("mlp-tls", name).replace("Mutual", tls))
        done = run(tmp_path, str(file), seconds=80)
        assert done.code == 0, done
        (model,) = tmp_path.glob(f".disttrain/runs/{name}-*/model.safetensors")
        models.append(load_file(model))
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


@pytest.mark.timeout(180)
def test_json_is_the_finished_job_and_nothing_else(tmp_path: Path) -> None:
    done = run(tmp_path, str(EXAMPLES / "digits-ddp.yaml"), "-o", "json", seconds=150)
    assert done.code == 0, done
    job = DistTrainJob.parse(done.job)
    assert job.status.state is JobState.COMPLETE
    assert job.status.is_true("Complete")
    assert not job.status.is_true("Failed")
    assert job.status.training is not None
    assert (job.status.training.step, job.status.training.total_steps) == (460, 460)
    assert job.status.training.evaluation is not None
    assert float(job.status.training.evaluation["accuracy"]) >= 0.97
    assert "digits-ddp: Complete in" in done.err


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("example", "says"),
    [
        ("mlp-sync", r"evaluation +mse "),
        ("digits-hedged", r"evaluation +accuracy 0\.9[5-9]"),
        ("digits-local-steps", r"evaluation +accuracy 0\.9[5-9]"),
        ("digits-compressed", r"evaluation +accuracy 0\.9[5-9]"),
        ("digits-schedule", r"evaluation +accuracy 0\.9[\s\S]*; the best: step \d+, accuracy 0\.9"),
        ("digits-augmented", r"values +accuracy 0\.[89].*\n +evaluation +accuracy 0\.9[5-9]"),
        ("own-model", r"evaluation +accuracy 0\.9[5-9]"),
        ("torchrun-script", r"step 200 of 200 on 2 ranks: loss 0\.0"),
        ("own-loop", r"accuracy 0\.9[5-9]"),
        ("command", r"rank 2 of 3, the store is at 127\.0\.0\.1:"),
    ],
)
def test_the_other_examples(tmp_path: Path, example: str, says: str) -> None:
    done = run(tmp_path, str(EXAMPLES / f"{example}.yaml"), seconds=150)
    assert done.code == 0, done
    assert re.search(says, done.out), done


if WIDE:  # a quarter of a minute; only its model and data are not tried above

    @pytest.mark.timeout(180)
    def test_the_language_model_is_far_better_than_it_was_untrained(tmp_path: Path) -> None:
        done = run(tmp_path, str(EXAMPLES / "charlm-ddp.yaml"), "-o", "json", seconds=150)
        assert done.code == 0, done
        job = DistTrainJob.parse(done.job)
        assert job.status.is_true("Complete")
        training = job.status.training
        assert training is not None
        assert training.step == training.total_steps
        assert training.loss is not None
        config = job.spec.trainer.config or {}
        torch.manual_seed(job.spec.trainer.seed)
        batch = charlm.dataset(config, "train")[: job.spec.trainer.batch_size]
        untrained = charlm.loss(charlm.model(config), batch).item()
        assert float(training.loss) < 0.6 * untrained
        assert left_behind(tmp_path) == []


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("code", "reason", "says"),
    [
        (
            "def model(config):\n    raise ValueError('hidden must be positive')\n",
            "UserCodeFailed",
            "ValueError: hidden must be positive",
        ),
        ("def modle(config): ...\n", "FailurePolicy", "module mine has no 'model'; did you mean 'modle'?"),
    ],
    ids=["a factory that raises", "a factory that is not there"],
)
def test_a_mistake_of_the_user_is_reported_in_one_line(tmp_path: Path, code: str, reason: str, says: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    text = (EXAMPLES / "digits-ps.yaml").read_text().replace("disttrain_trainer.examples.digits:model", "mine:model")
    (tmp_path / "job.yaml").write_text(text)
    done = run(tmp_path, "job.yaml", seconds=150)
    assert done.code == 1, done
    end = done.out.split("digits-ps: Failed after")[1]
    assert f"  {reason}: Pod digits-ps-worker-" in end
    assert says in end
    assert re.search(r"log: \.disttrain/runs/\S+/logs/digits-ps-worker-[01]\.log", end)
    assert "disttrain/cli" not in done.out + done.err
    assert left_behind(tmp_path) == []
