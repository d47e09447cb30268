"""Training on packed and encrypted data: the example as it stands, and the same training when a worker is killed in the middle."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.processes import wait_for
from disttrain.api.digested import verified, with_digest
from disttrain.api.names import Role
from disttrain_trainer.data.pack_writer import write
from disttrain_trainer.examples import digits as example
from file_server import Server
from local_runs.command import left_behind, run
from training.job import Job, Model, checkpoints, digits, held, same, served

EXAMPLES = Path("examples").absolute()


def shell_of(file: Path) -> list[str]:
    """The commands of an example's first lines."""
    lines = re.findall(r"^# (?:First:)? +((?:head|disttrain data) .*?)(?:  .*)?$", file.read_text(), re.M)
    return [line.replace("disttrain ", f"{sys.executable} -m disttrain.cli.main ") for line in lines]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["digits-packed", "digits-replicated"])
def test_the_example_is_packed_and_trained_as_it_says(tmp_path: Path, name: str) -> None:
    file = EXAMPLES / f"{name}.yaml"
    commands = shell_of(file)
    assert len(commands) == 2
    for command in commands:
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, capture_output=True)
    done = run(tmp_path, str(file), seconds=150)
    assert done.code == 0, done
    assert float(re.findall(r"^  evaluation +accuracy ([0-9.]+)$", done.out, re.M)[0]) >= 0.97
    assert left_behind(tmp_path) == []
    assert not list(tmp_path.glob(".disttrain/runs/*/copies")), "the claim has the data"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, packed and encrypted; the key lies beside them."""
    key, folder = bytes(range(32)), tmp_path_factory.mktemp("packed")
    for split in ("train", "test"):
        write(example.dataset({}, split), folder / "data" / split, split=split, partitions=8, key=key, what="digits")
    (folder / "key").write_bytes(key)
    return folder


@pytest.fixture
def data(tmp_path: Path, packed: Path) -> Path:
    """A test's own copy of it."""
    return shutil.copytree(packed, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def calm(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The model of a training that nothing disturbs."""
    with job(shutil.copytree(packed, tmp_path_factory.mktemp("calm"), dirs_exist_ok=True), "calm", {}) as calm:
        calm.train()
    return calm.model


def job(
    data: Path,
    name: str,
    trainer: dict[str, Any],
    *,
    replication: int = 1,
    url: str | None = None,
    limit: int = 1 << 40,
    **spec: Any,
) -> Job:
    """url: where the data is read instead of from the volume. limit: bytes of a worker's disk."""
    (folder := data / name).mkdir()
    packed: dict[str, Any] = {"encryption": {"secretName": "s"}, "replication": replication}
    env = {"DISTTRAIN_DATA_KEY": str(data / "key"), "DISTTRAIN_COPIES_LIMIT": str(limit)}
    if url is None:
        packed["volume"] = {"persistentVolumeClaim": "c"}
        env["DISTTRAIN_DATA_DIR"] = str(data / "data")
    else:
        packed |= {"url": url, "urlSecretName": "options"}
        env["DISTTRAIN_DATA_URL_OPTIONS"] = str(data / "options")
    trainer = {"dataset": "disttrain_trainer.data:packed", "epochs": None, "maxSteps": 30, **trainer}
    return Job(folder=folder, env=env, spec=digits(trainer=trainer, data=packed, **checkpoints(10), **spec))


def test_a_worker_that_is_killed_in_the_middle_changes_no_bit(data: Path, calm: Model) -> None:
    with job(data, "killed", held()) as killed:
        killed.hold(15)
        killed.start()
        killed.until_held(15)
        killed.kill(Role.WORKER, 1)
        killed.let_go()
        killed.complete()
    assert killed.restarts == {(Role.WORKER, 1): 1}
    assert same(killed.model, calm)


def test_a_worker_that_is_lost_with_its_disk_is_served_by_the_others_copies(data: Path, calm: Model) -> None:
    with job(data, "wiped", held(), replication=2) as wiped:
        wiped.hold(15)
        wiped.start()
        wiped.until_held(15)
        wait_for("the copies", lambda: wiped.log(Role.WORKER, 0).count("are on this disk"), 20)
        wait_for("the copies", lambda: wiped.log(Role.WORKER, 1).count("are on this disk"), 20)
        wiped.kill(Role.WORKER, 1)
        assert len(list(wiped.copies(1).rglob("*.blocks"))) == 16, "of both splits"
        shutil.rmtree(wiped.copies(1))
        wiped.let_go()
        wiped.complete()
    assert wiped.restarts == {(Role.WORKER, 1): 1}
    assert "copies of 16 partitions are on this disk: 0 were here, 16 came from other workers" in wiped.log(
        Role.WORKER, 1
    )
    assert same(wiped.model, calm)


def test_a_worker_whose_disk_is_wiped_and_one_that_is_replaced_need_no_volume(data: Path, calm: Model) -> None:
    with job(data, "gone", held(), replication=2) as gone:
        gone.hold(15)
        gone.start()
        gone.until_held(15)
        for index in range(2):
            wait_for("the copies", lambda index=index: gone.log(Role.WORKER, index).count("are on this disk"), 20)
        shutil.move(data / "data", data / "elsewhere")
        for path in data.glob("elsewhere/*/*"):
            os.truncate(path, 0)  # who has it open finds nothing there
        gone.kill(Role.WORKER, 1)
        assert gone.wait(Role.WORKER, 1) == 137
        shutil.rmtree(gone.copies(1) / "test")
        gone.hold(20)
        gone.start_one(Role.WORKER, 1)
        gone.until_held(20)
        wait_for("the other", lambda: "8 were here, 8 came from other workers" in gone.log(Role.WORKER, 1), 20)
        shutil.rmtree(gone.copies(0))
        wait_for("the wiped disk", lambda: gone.log(Role.WORKER, 0).count("came again from another worker") == 16, 20)
        gone.let_go()
        gone.complete()
    assert same(gone.model, calm)


def test_a_job_reads_from_a_url_and_needs_it_no_more_once_the_workers_have_copies(data: Path, calm: Model) -> None:
    (data / "options").mkdir()
    (data / "options" / "client_kwargs").write_text('{"headers": {"Authorization": "Bearer mine"}}')
    server = Server(data)
    server.token = "mine"
    try:
        with job(data, "url", held(), replication=2, url=f"{server.url[:-5]}/data") as at_url:
            at_url.hold(15)
            at_url.start()
            at_url.until_held(15)
            for index in range(2):
                wait_for("copies", lambda index=index: at_url.log(Role.WORKER, index).count("are on this disk"), 20)
            server.close()
            at_url.kill(Role.WORKER, 1)
            at_url.let_go()
            at_url.complete()
    finally:
        server.close()
    assert server.asked["GET part-000000.blocks"] > 0
    assert same(at_url.model, calm)


def test_parameter_servers_train_on_it_through_a_killed_worker(data: Path) -> None:
    with job(data, "calm", {"deterministic": True}, **served("Sync")) as servers:
        servers.train()
    with job(data, "killed", held(deterministic=True), replication=2, **served("Sync")) as killed:
        killed.hold(15)
        killed.start()
        killed.until_held(15)
        killed.kill(Role.WORKER, 1)
        killed.let_go()
        killed.complete()
    assert same(killed.model, servers.model)


def test_a_volume_that_cannot_be_read_for_a_moment_does_not_fail_the_job(data: Path) -> None:
    index = data / "data" / "train" / "index.json"
    content = index.read_bytes()
    index.unlink()
    index.symlink_to("/proc/self/mem")  # to read its first bytes is an input/output error
    with job(data, "job", {"maxSteps": 5}) as moody:
        moody.start()
        for worker in range(2):
            assert moody.wait(Role.WORKER, worker) == 134
        message = moody.termination(Role.WORKER).message
        assert message == f"{index} cannot be read: Input/output error; it is tried again: look at data.volume"
        index.unlink()
        index.write_bytes(content)
        moody.complete()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            "key",
            "train/index.json: the key is another one than that of the data set; correct the Secret of data.encryption",
        ),
        ("missing", "train/part-000003.blocks is missing: copy it again from where it was packed"),
        (
            "version",
            "train/index.json has format 2, and this trainer reads format 1: pack the data set with the release",
        ),
        (
            "swapped",
            "train/index.json is the index of the split 'test', in the folder of 'train': give each folder the name",
        ),
        ("room", "data.replication is 2 for 2 workers: this one keeps 8 of 8 partitions of train, "),
    ],
)
def test_what_is_wrong_with_the_data_is_one_line_before_the_first_step(data: Path, wrong: str, says: str) -> None:
    train, test = data / "data" / "train", data / "data" / "test"
    match wrong:
        case "key":
            (data / "key").write_bytes(bytes(32))
        case "missing":
            (train / "part-000003.blocks").unlink()
        case "version":
            content = verified((train / "index.json").read_text())
            content.pop("digest")
            (train / "index.json").write_text(with_digest(json.dumps(content | {"format": 2}, separators=(",", ":"))))
        case "swapped":
            train.rename(data / "other")
            test.rename(train)
            (data / "other").rename(test)
    with job(data, "job", {}, replication=2, limit=1000 if wrong == "room" else 1 << 40) as refused:
        refused.start()
        assert refused.wait(Role.WORKER) == 2
    message = refused.termination(Role.WORKER).message
    assert says in message
    assert "\n" not in message
    assert refused.checkpoints is not None
    assert not list(refused.checkpoints.glob("step-*")), "no step was trained"


def test_a_split_to_evaluate_on_that_is_missing_is_said_before_the_first_step(data: Path) -> None:
    shutil.rmtree(data / "data" / "test")
    with job(data, "job", {}) as wrong:
        wrong.start()
        assert wrong.wait(Role.WORKER) == 2
    assert wrong.termination(Role.WORKER).message.startswith(
        f"there is no packed data set in {data / 'data'} with the split 'test'; it has train"
    )


def test_a_wrong_number_of_partitions_is_refused_before_the_first_step(data: Path) -> None:
    with job(data, "job", {}) as wrong:
        spec = wrong.config.data.model_copy(update={"partitions": 7}) if wrong.config.data else None
        wrong.config = wrong.config.model_copy(update={"data": spec})
        wrong.start()
        assert wrong.wait(Role.WORKER) == 2
    message = wrong.termination(Role.WORKER).message
    assert (
        message
        == f"data.partitions is 7, but {data / 'data' / 'train'} was packed into 8: set it to 8, or leave it out"
    )
