"""Whole local runs with a trainer that trains nothing (local_runs/stub.py): restarts, failures, interruption, the environment."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from cluster.processes import wait_for
from disttrain.api.job import DistTrainJob
from local_runs import stub
from local_runs.command import Started, left_behind, run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stub.install(tmp_path)
    return tmp_path


def test_a_run_completes_and_leaves_its_logs_and_its_job(folder: Path) -> None:
    done = run(folder, stub.write_job(folder, config={"worker": "print('hello from', index)"}))
    assert done.code == 0, done
    assert "[worker-1] hello from 1" in done.out
    (run_folder,) = (folder / ".disttrain" / "runs").iterdir()
    assert f"  logs        .disttrain/runs/{run_folder.name}/logs" in done.out
    assert (run_folder / "logs" / "stub-worker-1.log").read_text().endswith("hello from 1\n")
    assert '"state": "Complete"' in (run_folder / "job.json").read_text()
    assert left_behind(folder) == []


def test_a_worker_that_raises_fails_the_job_with_its_last_line_and_its_log(folder: Path) -> None:
    done = run(
        folder,
        stub.write_job(folder, config={"worker-1": "raise ValueError('no such thing')", "worker-0": "time.sleep(60)"}),
    )
    assert done.code == 1, done
    assert "ValueError: no such thing" in done.out.split("stub: Failed after")[1]
    assert "logs/stub-worker-1.log" in done.out.split("stub: Failed after")[1]
    assert left_behind(folder) == []


def test_a_worker_that_is_killed_is_replaced_and_counted_once(folder: Path) -> None:
    once = "p = 'mark'\nif not os.path.exists(p):\n    open(p, 'w').close(); os.kill(os.getpid(), 9)"
    done = run(folder, stub.write_job(folder, config={"worker-1": once, "worker-0": "time.sleep(1)"}), "-o", "json")
    assert done.code == 0, done
    status = DistTrainJob.parse(done.job).status
    assert status.restarts is not None
    assert (status.restarts.total, status.attempt) == (1, 1)
    assert status.restarts.last is not None
    assert (status.restarts.last.role, status.restarts.last.index, status.restarts.last.exit_code) == ("Worker", 1, 137)


def test_who_never_gets_up_uses_the_retries_up(folder: Path) -> None:
    file = stub.write_job(
        folder,
        config={"worker-0": "os.kill(os.getpid(), 9)", "worker-1": "time.sleep(60)"},
        runPolicy={"backoffLimit": 0},
    )
    done = run(folder, file, "-o", "json")
    assert done.code == 1, done
    failed = DistTrainJob.parse(done.job).status.condition("Failed")
    assert failed is not None
    assert failed.reason == "BackoffLimitExceeded"


def test_progress_reaches_the_status_and_the_screen(folder: Path) -> None:
    progress = {"step": 3, "totalSteps": 10, "loss": 0.25, "samplesPerSecond": 99.0}
    done = run(folder, stub.write_job(folder, config={"progress": progress, "worker": "time.sleep(2)"}), "-o", "json")
    training = DistTrainJob.parse(done.job).status.training
    assert training is not None
    assert (training.step, training.total_steps, training.progress_percent) == (3, 10, 30)
    assert "stub: Training  step 3/10  loss 0.25  99 samples/s" in done.err


def test_ctrl_c_gives_time_and_ends_with_130(folder: Path) -> None:
    file = stub.write_job(
        folder,
        config={
            "worker": "signal.signal(15, lambda *_: (print('saved', flush=True), sys.exit(143)))\nprint('up', flush=True)\ntime.sleep(60)"
        },
    )
    started = Started(folder, file)
    wait_for("both workers", lambda: all("up\n" in started.log(f"stub-worker-{n}") for n in (0, 1)), 30)
    started.process.send_signal(signal.SIGINT)
    done = started.finish(20)
    assert done.code == 130, done
    assert done.out.count("saved") == 2
    assert "stub: interrupted after" in done.out
    assert left_behind(folder) == []


def test_a_second_ctrl_c_does_not_wait(folder: Path) -> None:
    started = Started(
        folder,
        stub.write_job(folder, config={"worker": "signal.signal(15, 1)\nprint('up', flush=True)\ntime.sleep(60)"}),
    )
    wait_for("both workers", lambda: all("up\n" in started.log(f"stub-worker-{n}") for n in (0, 1)), 30)
    began = time.monotonic()
    started.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    started.process.send_signal(signal.SIGINT)
    assert started.finish(20).code == 130
    assert time.monotonic() - began < 8
    assert left_behind(folder) == []


def test_sigkill_leaves_nothing_of_a_command_either(tmp_path: Path) -> None:
    stub.install(tmp_path)
    grandchild = "sh -c 'trap \"\" TERM HUP; sleep 100' & sleep 100"
    file = stub.write_job(
        tmp_path,
        strategy={"type": "DataParallel"},
        trainer={"command": ["sh", "-c", f"setsid {grandchild}"]},
        parameterServer=None,
    )
    started = Started(tmp_path, file)
    wait_for("the grandchildren", lambda: len(left_behind(tmp_path)) >= 2 * 3 + 1, 30)
    started.process.kill()
    started.process.communicate()
    wait_for("nothing to be left", lambda: not left_behind(tmp_path), 10)


def test_resume_is_the_same_job_in_the_next_attempt(folder: Path) -> None:
    file = stub.write_job(folder, config={"worker": "pass"}, checkpoint={"volume": {"persistentVolumeClaim": "ckpt"}})
    first = run(folder, file, "-o", "json").job
    again = run(folder, file, "--resume", "-o", "json").job
    fresh = run(folder, file, "-o", "json").job
    assert again["metadata"]["uid"] == first["metadata"]["uid"] != fresh["metadata"]["uid"]
    assert [job["status"]["attempt"] for job in (first, again, fresh)] == [1, 2, 1]
    assert len(list((folder / ".disttrain" / "claims" / "ckpt").iterdir())) == 2, "a folder of checkpoints for each job"


def test_resume_without_a_run_is_wrong_input(folder: Path) -> None:
    done = run(folder, stub.write_job(folder), "--resume")
    assert (done.code, done.out) == (2, "")
    assert "there is no run of stub" in done.err


def test_what_a_process_finds_in_its_environment(folder: Path) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MINE", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR"]
    show = f"print('|'.join(os.environ.get(name, '-') for name in {names}))"
    template = {"spec": {"containers": [{"name": "trainer", "env": [{"name": "MINE", "value": "yes"}]}]}}
    show += "; print('uid', job['uid'])"
    file = stub.write_job(folder, config={"worker-1": show}, worker={"replicas": 2, "template": template})
    done = run(folder, file, environment={"RANK": "7", "MASTER_ADDR": "elsewhere"})
    assert "[worker-1] 1|2|0|yes||127.0.0.1" in done.out, done
    assert (
        f"[worker-1] uid {json.loads(next(folder.glob('.disttrain/runs/*/run.json')).read_text())['uid']}" in done.out
    )


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/nvidia* is Linux")
def test_each_worker_has_its_own_gpus(folder: Path) -> None:
    file = stub.write_job(
        folder,
        config={"worker": "print('sees', os.environ['CUDA_VISIBLE_DEVICES'])"},
        worker={"replicas": 2, "gpusPerWorker": 2},
    )
    done = run(folder, file, environment={"CUDA_VISIBLE_DEVICES": "4,5,6,7"})
    assert "[worker-0] sees 4,5" in done.out
    assert "[worker-1] sees 6,7" in done.out


def test_too_few_gpus_is_told_with_the_line(folder: Path) -> None:
    file = stub.write_job(folder, worker={"replicas": 2, "gpusPerWorker": 2})
    line = next(n for n, text in enumerate((folder / file).read_text().splitlines(), 1) if "gpusPerWorker" in text)
    done = run(folder, file, environment={"CUDA_VISIBLE_DEVICES": "0"})
    assert done.code == 2
    assert done.err.startswith(f"{file}:{line}: spec.worker.gpusPerWorker: the job needs 4 GPUs, this machine has 1")


def test_a_module_that_is_not_there_is_told_before_anything_starts(folder: Path) -> None:
    file = stub.write_job(folder)
    (folder / file).write_text(
        (folder / file).read_text().replace("disttrain_trainer:dataset", "no_such.module:dataset")
    )
    done = run(folder, file)
    assert done.code == 2
    assert 'spec.trainer.dataset: no module "no_such" in' in done.err
    assert list((folder / ".disttrain" / "runs").iterdir()) == []


def test_a_command_that_is_not_there(folder: Path) -> None:
    file = stub.write_job(
        folder, strategy={"type": "DataParallel"}, trainer={"command": ["no-such-program"]}, parameterServer=None
    )
    done = run(folder, file)
    assert done.code == 1, done
    assert "cannot start 'no-such-program': No such file or directory" in done.out.split("Failed after")[1]


def test_a_job_of_a_later_version_is_wrong_input(folder: Path) -> None:
    done = run(folder, stub.write_job(folder, network={"tls": "Mutual"}))
    assert done.code == 2, done
    assert "network.tls Mutual" in done.out


def test_the_mark_does_not_reach_an_outer_run(folder: Path) -> None:
    """A run within a run: the inner one ends, the outer one is left alone."""
    done = run(folder, stub.write_job(folder, config={"worker": "pass"}), environment={"DISTTRAIN_RUN_ID": "outer"})
    assert done.code == 0
    assert os.environ.get("DISTTRAIN_RUN_ID") is None


def test_it_ends_when_nobody_reads_it_any_more(folder: Path) -> None:
    started = Started(
        folder, stub.write_job(folder, config={"worker": "while True: print('more', flush=True); time.sleep(0.05)"})
    )
    assert started.process.stdout is not None
    assert started.process.stderr is not None
    started.process.stdout.readline()
    started.process.stdout.close()
    with started.process.stderr as errors:
        assert started.process.wait(20) == 1
        assert errors.read() == ""
    assert left_behind(folder) == []
