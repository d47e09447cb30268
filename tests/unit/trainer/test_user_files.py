"""trainer.code in a training process: checked, on the module path, known by its digest."""

import os
import sys
from pathlib import Path

import pytest

from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime import user_files
from disttrain_trainer.runtime.process import Process
from unit.trainer.configs import command_config


def process(folder: Path | None) -> Process:
    config = command_config().model_copy(update={"code_origin": 'ConfigMap "my-code"'})
    return Process.read(
        {"DISTTRAIN_JOB": config.encode(), "DISTTRAIN_ROLE": "worker"}
        | ({"DISTTRAIN_CODE_DIR": str(folder)} if folder else {})
    )


def test_the_digest_is_that_of_names_and_contents(tmp_path: Path) -> None:
    def digest() -> str | None:
        return user_files.with_digest(process(tmp_path)).code_digest

    (tmp_path / "mine.py").write_text("a = 1")
    first = digest()
    assert first is not None
    assert len(first) == 64
    (tmp_path / "notes.txt").write_text("cannot be imported")
    assert digest() == first
    (tmp_path / "mine.py").write_text("a = 2")
    assert digest() != first
    (tmp_path / "mine.py").write_text("a = 1")
    (tmp_path / "mine.py").rename(tmp_path / "yours.py")
    assert digest() != first


def test_a_job_without_code_has_no_digest() -> None:
    assert user_files.with_digest(process(None)).code_digest is None
    user_files.check_unchanged(process(None))


def test_a_module_that_hides_one_of_python_is_refused_before_anything_is_imported(tmp_path: Path) -> None:
    (tmp_path / "random.py").touch()
    with pytest.raises(
        WrongInput, match=r'^trainer\.code: ConfigMap "my-code": random\.py has the name of a module of Python'
    ):
        user_files.with_digest(process(tmp_path))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=f'there is no folder {tmp_path}/src; ConfigMap "my-code" does not have it'):
        user_files.with_digest(process(tmp_path / "src"))


def test_code_that_changes_under_a_running_pod_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("a = 1")
    checked = user_files.with_digest(process(tmp_path))
    user_files.check_unchanged(checked)
    (tmp_path / "mine.py").write_text("a = 2")
    with pytest.raises(WrongInput, match=r'ConfigMap "my-code" was changed after worker-0 had started'):
        user_files.check_unchanged(checked)


def test_the_code_stands_before_the_users_own_module_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib.zip").touch()
    code = [str(tmp_path), str(tmp_path / "lib.zip")]
    environ = {"PYTHONPATH": "/src"}
    for _ in range(2):  # a rank is started by a process that has done it already
        user_files.export(process(tmp_path), environ)
    assert environ["PYTHONPATH"].split(os.pathsep) == [*code, "/src"]
    monkeypatch.setattr(sys, "path", ["/here", *code, "/lib"])
    user_files.make_importable({"DISTTRAIN_CODE_DIR": str(tmp_path)})
    assert sys.path == [*code, "/here", "/lib"]
    user_files.make_importable({})
    assert sys.path == [*code, "/here", "/lib"]
