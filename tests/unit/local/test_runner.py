"""Whole local runs with a trainer that trains nothing (local_runs/stub.py): restarts, failures, interruption, the environment."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from cluster.processes import start_time, wait_for
from disttrain.api.job import DistTrainJob
from disttrain.local import scaling
from disttrain.plan.success import LAST_REPORT_GRACE
from local_runs import stub
from local_runs.command import Started, left_behind, run, running


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
    asked = "while len(open('asked').read() if os.path.exists('asked') else '') < 3:\n    time.sleep(0.05)"
    done = run(folder, stub.write_job(folder, config={"progress": progress, "worker": asked}), "-o", "json")
    training = DistTrainJob.parse(done.job).status.training
    assert training is not None
    assert (training.step, training.total_steps, training.progress_percent) == (3, 10, 30)
    assert "stub: Training  step 3/10  loss 0.25  99 samples/s" in done.err


SAVES = (
    "signal.signal(15, lambda *_: (os.write(1, b'saved\\n'), sys.exit(143)))\nprint('up', flush=True)\ntime.sleep(60)"
)
"""os.write: the signal may come while print() has not returned, and print() in its handler would raise 'reentrant call'."""
LISTENS_ONLY = "signal.signal(15, lambda *_: os.write(1, b'signalled\\n'))\nprint('up', flush=True)\ntime.sleep(60)"


def until_both_say(started: Started, word: str) -> None:
    wait_for(
        f"both workers to say {word}", lambda: all(f"{word}\n" in started.log(f"stub-worker-{n}") for n in (0, 1)), 30
    )


def test_ctrl_c_gives_time_and_ends_with_130(folder: Path) -> None:
    started = Started(folder, stub.write_job(folder, config={"worker": SAVES}))
    until_both_say(started, "up")
    started.process.send_signal(signal.SIGINT)
    done = started.finish(20)
    assert done.code == 130, done
    assert done.out.count("saved") == 2, done.out
    assert "\nstopping: up to 30 s; Ctrl-C again ends it at once\n" in done.out
    assert "stub: interrupted after" in done.out
    assert left_behind(folder) == []


def test_an_interrupted_job_is_suspended_and_its_spec_is_not(folder: Path) -> None:
    template = {"spec": {"terminationGracePeriodSeconds": 7}}
    checkpoint = {"volume": {"persistentVolumeClaim": "ckpt"}}
    file = stub.write_job(
        folder,
        config={"worker": SAVES, "progress": {"step": 3}},
        worker={"replicas": 2, "template": template},
        parameterServer={"replicas": 1, "template": template},
        master={"template": template},
        checkpoint=checkpoint,
    )
    started = Started(folder, file, "-o", "json")
    until_both_say(started, "up")
    started.process.send_signal(signal.SIGINT)
    done = started.finish(20)
    assert done.code == 130, done
    assert "\nstopping: up to 7 s for a checkpoint; Ctrl-C again ends it at once\n" in done.err
    assert done.job == json.loads((started.run_folder() / "job.json").read_text())
    status = DistTrainJob.parse(done.job).status
    assert status.state == "Suspended"
    assert [condition.type for condition in status.conditions if condition.status == "True"] == ["Valid", "Suspended"]
    assert "spec.suspend" not in done.out
    assert not done.job["spec"].get("suspend")
    assert all(role.ready == 0 for role in status.replica_statuses)


def test_a_checkpoint_that_only_the_last_word_of_the_master_names_is_in_the_summary(folder: Path) -> None:
    """It is written while the job ends, or a moment before: no report was read after it."""
    config = {"worker": SAVES, "progress": {"step": 3}, "saved": 4}
    started = Started(
        folder, stub.write_job(folder, config=config, checkpoint={"volume": {"persistentVolumeClaim": "ckpt"}})
    )
    until_both_say(started, "up")
    started.process.send_signal(signal.SIGINT)
    done = started.finish(20)
    assert "; `disttrain run --resume FILE` goes on from the last checkpoint" in done.out
    assert "steps       4\n" in done.out
    assert "checkpoint  step 4 in " in done.out


def test_a_checkpoint_just_before_a_failure_is_in_the_summary(folder: Path) -> None:
    """As of a training whose evaluation fails: the job is over before the next look at its progress."""
    later = {"step": 9, "lastCheckpoint": {"step": 9, "time": "2026-01-01T00:00:00Z"}}
    fails = f"import time; time.sleep(1); open('new', 'w').write({json.dumps(later)!r}); os.rename('new', 'later'); sys.exit(1)"
    progress = {"step": 8, "lastCheckpoint": {"step": 5, "time": "2026-01-01T00:00:00Z"}}
    checkpoint = {"volume": {"persistentVolumeClaim": "c"}, "everySteps": 5}
    config = {"progress": progress, "worker-0": fails, "worker": "time.sleep(20)"}
    done = run(folder, stub.write_job(folder, config=config, checkpoint=checkpoint))
    assert done.code == 1, done
    assert re.search(r"^  checkpoint +step 9 in ", done.out, re.M), done.out


def test_a_run_is_resized_while_it_goes_on(folder: Path) -> None:
    goes_on = (
        "signal.signal(15, lambda *_: (os.write(1, b'leaves\\n'), sys.exit(143)))\nprint('up', flush=True)\n"
        "while not os.path.exists('end'):\n    time.sleep(0.05)"
    )
    file = stub.write_job(
        folder,
        config={"worker": goes_on},
        worker={"replicas": 2, "elastic": {"minReplicas": 1, "maxReplicas": 3}},
    )
    started = Started(folder, file, "-o", "json")
    until_both_say(started, "up")
    assert scaling.ask("stub", 3, folder / ".disttrain").after == 3
    wait_for("the third worker", lambda: "up\n" in started.log("stub-worker-2"), 30)
    assert scaling.ask("stub", 1, folder / ".disttrain").before == 3
    wait_for("two to leave", lambda: all("leaves\n" in started.log(f"stub-worker-{n}") for n in (1, 2)), 30)
    started.process.send_signal(signal.SIGINT)
    done = started.finish(20)
    assert done.code == 130, done
    job = DistTrainJob.parse(done.job)
    assert job.spec.worker.replicas == 1
    assert job.status.worker is not None
    assert job.status.worker.target_replicas == 1
    assert job.status.restarts is None or job.status.restarts.total == 0
    assert "Resizing from 2 to 3 workers" in done.err
    assert "workers     1, elastic between 1 and 3" in done.err
    assert "leaves" not in started.log("stub-worker-0").split("up")[0]
    assert left_behind(folder) == []


def test_a_second_ctrl_c_does_not_wait(folder: Path) -> None:
    started = Started(folder, stub.write_job(folder, config={"worker": LISTENS_ONLY}))
    until_both_say(started, "up")
    started.process.send_signal(signal.SIGINT)
    until_both_say(started, "signalled")
    assert started.process.poll() is None
    started.process.send_signal(signal.SIGINT)
    assert started.finish(15).code == 130, "or it waits for the 30 s of its grace period"
    assert left_behind(folder) == []


@pytest.mark.parametrize(
    "child",
    ["setsid sh -c 'trap \"\" TERM HUP; sleep {}' & sleep 100", "env -i sleep {} & sleep 100"],
    ids=["a session of its own", "an environment of its own"],
)
def test_sigkill_leaves_nothing_of_a_command_either(tmp_path: Path, child: str) -> None:
    stub.install(tmp_path)
    seconds = f"100.{time.monotonic_ns()}"  # by which it is found
    started = Started(tmp_path, stub.write_command(tmp_path, "sh", "-c", child.format(seconds)))
    wait_for(
        "the grandchild",
        lambda: any(Path(f"/proc/{pid}/comm").read_text() == "sleep\n" for pid in running(f"sleep {seconds}")),
        30,
    )
    started.process.kill()
    started.process.communicate()
    wait_for("nothing to be left", lambda: not left_behind(tmp_path) and not running(f"sleep {seconds}"), 10)


def test_a_command_that_is_done_is_the_end_of_its_job(tmp_path: Path) -> None:
    """Its master knows no process of it, and would never end by itself."""
    stub.install(tmp_path)
    file = stub.write_command(tmp_path, "sh", "-c", "env -i sleep 3131 & echo $$! is left behind")
    done = run(tmp_path, file, "-o", "json")
    assert done.code == 0, done
    status = DistTrainJob.parse(done.job).status
    assert status.completion_time is not None
    assert status.start_time is not None
    assert status.completion_time - status.start_time < LAST_REPORT_GRACE, (
        "which is what the plan gives a master to end"
    )
    assert [role.failed for role in status.replica_statuses] == [0, 0]
    assert "steps" not in done.err
    assert "workers 0" not in done.err
    (child,) = re.findall(r"(\d+) is left behind", done.err)
    assert start_time(int(child)) is None


def test_names_in_a_command_are_replaced_as_on_a_cluster(tmp_path: Path) -> None:
    stub.install(tmp_path)
    template = {"spec": {"containers": [{"name": "trainer", "env": [{"name": "OUT", "value": "/out/$(RANK)"}]}]}}
    file = stub.write_command(
        tmp_path,
        "echo",
        "$(RANK) of $(WORLD_SIZE) to $(OUT), $$(RANK) and $(PATH)",
        worker={"replicas": 1, "template": template},
    )
    assert "[worker-0] 0 of 1 to /out/0, $(RANK) and $(PATH)\n" in run(tmp_path, file).out


def test_resume_is_the_same_job_in_the_next_attempt(folder: Path) -> None:
    file = stub.write_job(folder, config={"worker": "pass"}, checkpoint={"volume": {"persistentVolumeClaim": "ckpt"}})
    first = run(folder, file, "-o", "json").job
    again = run(folder, file, "--resume", "-o", "json").job
    fresh = run(folder, file, "-o", "json").job
    assert again["metadata"]["uid"] == first["metadata"]["uid"] != fresh["metadata"]["uid"]
    assert [job["status"]["attempt"] for job in (first, again, fresh)] == [1, 2, 1]
    assert len(list((folder / ".disttrain" / "claims" / "ckpt").iterdir())) == 2, "a folder of checkpoints for each job"


def test_a_resumed_run_keeps_the_parts_of_its_steps_whatever_its_workers(folder: Path) -> None:
    ckpt = {"volume": {"persistentVolumeClaim": "ckpt"}}
    config = {"worker": "print('parts', job['trainer'].get('partsPerStep'))", "progress": {"step": 5}}
    first = run(folder, stub.write_job(folder, config=config, checkpoint=ckpt), "-o", "json").job
    assert first["status"]["partsPerStep"] == 2
    done = run(folder, stub.write_job(folder, config=config, checkpoint=ckpt, worker={"replicas": 3}), "--resume")
    assert "[worker-2] parts 2" in done.out


def test_a_resumed_run_refuses_other_parts_once_steps_were_taken(folder: Path) -> None:
    ckpt = {"volume": {"persistentVolumeClaim": "ckpt"}}

    def job(parts: int, steps: int) -> str:
        config = {"worker": "time.sleep(1)", "progress": {"step": steps}}
        return stub.write_job(folder, config=config, checkpoint=ckpt, trainer={"partsPerStep": parts})

    run(folder, job(4, 0))
    assert run(folder, job(6, 5), "--resume").code == 0, "no step was taken yet"
    done = run(folder, job(4, 5), "--resume")
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith(
        "spec.trainer.partsPerStep: 4, but the steps of this run were made of 6 parts each: write 6, or leave it out; without --resume a "
        "new run starts at step 0\n"
    )


def test_resume_without_a_run_is_wrong_input(folder: Path) -> None:
    done = run(folder, stub.write_job(folder, checkpoint={"volume": {"persistentVolumeClaim": "ckpt"}}), "--resume")
    assert (done.code, done.out) == (2, "")
    assert "there is no run of stub" in done.err


def test_resume_without_a_checkpoint_is_wrong_input(folder: Path) -> None:
    done = run(folder, stub.write_job(folder), "--resume")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "stub.yaml:5: spec: without checkpoint there is nothing to resume; leave --resume out to start a new run\n"
    )


def test_what_a_process_finds_in_its_environment(folder: Path) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MINE", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR"]
    show = f"print('|'.join(os.environ.get(name, '-') for name in {names}))"
    template = {"spec": {"containers": [{"name": "trainer", "env": [{"name": "MINE", "value": "yes"}]}]}}
    show += "; print('uid', job['uid'])"
    file = stub.write_job(folder, config={"worker-1": show}, worker={"replicas": 2, "template": template})
    done = run(folder, file, environment={"RANK": "7", "MASTER_ADDR": "elsewhere"})
    assert "[worker-1] 1|2|1|yes||127.0.0.1" in done.out, done
    assert (
        f"[worker-1] uid {json.loads(next(folder.glob('.disttrain/runs/*/run.json')).read_text())['uid']}" in done.out
    )


def test_workers_iterate_over_a_set_in_the_order_of_the_jobs_seed_and_not_of_the_shells(folder: Path) -> None:
    show = "print('order', os.environ['PYTHONHASHSEED'], hash('a'))"
    file = stub.write_job(folder, config={"worker": show}, worker={"replicas": 2})
    outputs = [run(folder, file, environment={"PYTHONHASHSEED": shell}).out for shell in ("random", "3")]
    orders = {line.partition("] ")[2] for out in outputs for line in out.splitlines() if "] order " in line}
    assert len(orders) == 1, outputs
    assert orders.pop().startswith("order 0 ")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/nvidia* is Linux")
def test_workers_of_our_loop_see_the_gpus_of_all_and_local_rank_picks_their_own(folder: Path) -> None:
    show = "print('sees', *(os.environ[name] for name in ('CUDA_VISIBLE_DEVICES', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')))"
    file = stub.write_job(folder, config={"worker": show}, worker={"replicas": 2, "gpusPerWorker": 2})
    done = run(folder, file, environment={"CUDA_VISIBLE_DEVICES": "4,5,6,7,8"})
    # The numbers are those of the first process of each worker.
    assert "[worker-0] sees 4,5,6,7 0 4" in done.out
    assert "[worker-1] sees 4,5,6,7 2 4" in done.out


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/nvidia* is Linux")
def test_each_worker_of_a_command_has_its_own_gpus(folder: Path) -> None:
    show = "import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'], os.environ['PET_NPROC_PER_NODE'])"
    file = stub.write_command(folder, sys.executable, "-c", show, worker={"replicas": 2, "gpusPerWorker": 2})
    done = run(folder, file, environment={"CUDA_VISIBLE_DEVICES": "4,5,6,7,8"})
    assert "[worker-0] sees 4,5 2" in done.out
    assert "[worker-1] sees 6,7 2" in done.out


def test_too_few_gpus_is_reported_with_the_line(folder: Path) -> None:
    file = stub.write_job(folder, worker={"replicas": 2, "gpusPerWorker": 2})
    line = next(n for n, text in enumerate((folder / file).read_text().splitlines(), 1) if "gpusPerWorker" in text)
    done = run(folder, file, environment={"CUDA_VISIBLE_DEVICES": "0"})
    assert done.code == 2
    assert done.err.startswith(f"{file}:{line}: spec.worker.gpusPerWorker: the job needs 4 GPUs, this machine has 1")


def test_a_module_that_is_not_there_is_reported_before_anything_starts(folder: Path) -> None:
    file = stub.write_job(folder)
    (folder / file).write_text(
        (folder / file).read_text().replace("disttrain_trainer:dataset", "no_such.module:dataset")
    )
    done = run(folder, file)
    assert done.code == 2
    assert 'spec.trainer.dataset: no module "no_such" in' in done.err
    assert list((folder / ".disttrain" / "runs").iterdir()) == []


def test_a_command_that_is_not_there(folder: Path) -> None:
    done = run(folder, stub.write_command(folder, "no-such-program"))
    assert done.code == 1, done
    assert "cannot start 'no-such-program': No such file or directory" in done.out.split("Failed after")[1]


def test_a_job_of_a_later_version_is_wrong_input(folder: Path) -> None:
    done = run(folder, stub.write_job(folder, scheduling={"gang": "Kueue"}))
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(
        r"stub.yaml:\d+: spec.scheduling.gang: scheduling.gang Kueue or Native is not supported by this version\n",
        done.err,
    )
    assert not (folder / ".disttrain").exists(), "or --resume would go on with it"


def test_a_document_that_is_wrong_is_reported_and_leaves_no_run(folder: Path) -> None:
    done = run(folder, stub.write_job(folder, {"kind": "Secret", "metadata": {"name": "s"}, "data": {"k": "hello"}}))
    assert (done.code, done.out) == (2, "")
    assert "data.k: must be base64; plain text belongs into stringData" in done.err
    assert list(folder.glob(".disttrain/runs/*")) == []


def test_data_belongs_into_the_folder_of_its_claim(folder: Path) -> None:
    show = "print('data', sorted(os.listdir(os.environ['DISTTRAIN_DATA_DIR'])))"
    volume = {"persistentVolumeClaim": "digits-data", "path": "/digits"}
    file = stub.write_job(folder, config={"worker": show}, data={"volume": volume})
    done = run(folder, file)
    assert done.code == 2, done
    assert (
        "spec.data.volume.persistentVolumeClaim: there is no data: put it into .disttrain/claims/digits-data/"
        in done.err
    )
    assert list(folder.glob(".disttrain/runs/*")) == []
    (folder / ".disttrain" / "claims" / "digits-data" / "images.npy").touch()
    done = run(folder, file)
    assert done.code == 0, done
    assert "[worker-1] data ['images.npy']" in done.out
    assert f"spec.data.volume.path: is not there: the data lies in {folder}/.disttrain/claims/digits-data" in done.err


def test_what_has_no_effect_here_is_reported(folder: Path) -> None:
    container = {
        "name": "trainer",
        "workingDir": "/src",
        "image": "a/b:1",
        "volumeMounts": [{"name": "v", "mountPath": "/v"}],
    }
    template = {"spec": {"containers": [container], "serviceAccountName": "me"}}
    file = stub.write_job(
        folder, config={"worker": "pass"}, image="c/d:2", worker={"replicas": 1, "template": template}
    )
    warnings = run(folder, file).err.splitlines()
    assert [re.sub(r"^stub.yaml:\d+: warning: spec\.", "", line) for line in warnings] == [
        "image: is not used: a local run has the Python and the programs of this machine",
        "worker.template.spec.containers[0].image: has no effect in a local run",
        "worker.template.spec.containers[0].volumeMounts: is not mounted: a local run has no containers",
        "worker.template.spec.containers[0].workingDir: has no effect in a local run",
        "worker.template.spec.serviceAccountName: has no effect in a local run",
    ]


def test_the_mark_does_not_reach_an_outer_run(folder: Path) -> None:
    """A run within a run: the inner one ends, the outer one is left alone."""
    done = run(folder, stub.write_job(folder, config={"worker": "pass"}), environment={"DISTTRAIN_RUN_ID": "outer"})
    assert done.code == 0
    assert os.environ.get("DISTTRAIN_RUN_ID") is None
