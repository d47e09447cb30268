"""Who a process may say it is: under network.tls Mutual its HELLO names a role and a rank, and its join token must be that process's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from disttrain import certificates
from disttrain.api.joining import JOIN_KEY, join_file, join_token
from disttrain.api.names import Role
from disttrain.api.policies import Tls
from disttrain.manifests import build_pod
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.net.joining import Judge, token_of
from disttrain_trainer.runtime.process import Process
from transports import certificate, mutual_config
from unit.manifests.jobs import JOBS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of one attempt."""
    return certificate(tmp_path)


def process(folder: Path, role: Role = Role.WORKER, index: int = 0) -> Process:
    return Process(config=mutual_config(), role=role, index=index, tls_dir=folder)


def test_each_process_has_another_token_and_another_attempt_has_others() -> None:
    processes = [(role, index) for role in (Role.WORKER, Role.PARAMETER_SERVER) for index in range(3)]
    first, second = (certificates.join_secrets(processes) for _ in range(2))
    assert len(set(first.values())) == 7
    assert not set(first.values()) & set(second.values())
    assert first[join_file(Role.WORKER, 2)].decode() == join_token(first[JOIN_KEY], Role.WORKER, 2)


def test_pod_of_a_worker_or_server_mounts_its_own_token_and_no_key_to_others() -> None:
    job, _ = JOBS["tls"]

    def files(role: Role, index: int) -> set[str]:
        pod = build_pod(job, role, index, attempt=2, trainer_image="i")
        (volume,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "disttrain-tls"]
        return {item["key"] for item in volume["secret"]["items"]} - {"ca.crt", "tls.crt", "tls.key"}

    assert files(Role.WORKER, 1) == {"join-worker-1"}
    assert files(Role.PARAMETER_SERVER, 0) == {"join-parameter-server-0"}
    assert files(Role.MASTER, 0) == {"join.key"}


def test_process_is_believed_with_its_own_token_alone(folder: Path) -> None:
    judge = Judge.of(process(folder, Role.MASTER))
    token = token_of(process(folder, index=1))
    assert judge.objection(Role.WORKER, 1, token) is None
    for role, rank, said in ((Role.WORKER, 0, token), (Role.PARAMETER_SERVER, 1, token), (Role.WORKER, 1, "")):
        assert judge.objection(role, rank, said) == f"its join token is not that of {role.value}-{rank} of this attempt"


def test_processes_of_one_worker_share_its_token() -> None:
    judge = Judge(b"key", processes_per_worker=4)
    token = join_token(b"key", Role.WORKER, 1)
    assert [judge.objection(Role.WORKER, rank, token) is None for rank in range(10)] == [False] * 4 + [True] * 4 + [
        False
    ] * 2


def test_without_tls_nobody_has_a_token(folder: Path) -> None:
    under_tls = process(folder)
    plain = replace(under_tls, tls_dir=None, config=under_tls.config.model_copy(update={"tls": Tls.DISABLED}))
    assert token_of(plain) == ""
    assert Judge.of(plain).objection(Role.WORKER, 7, "") is None


def test_master_under_tls_without_a_key_believes_no_process(folder: Path) -> None:
    with pytest.raises(WrongInput, match="the master has no join key"):
        Judge.of(replace(process(folder), tls_dir=None))


def test_token_that_cannot_be_read_is_named(folder: Path) -> None:
    worker = process(folder)
    (folder / "join-worker-0").unlink()
    with pytest.raises(WrongInput, match="join-worker-0: the join token cannot be read: No such file or directory"):
        token_of(worker)
