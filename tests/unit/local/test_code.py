"""Where a local run takes the code of a job from."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from disttrain.api import environment
from disttrain.api.job import DistTrainJob
from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain.local.addresses import Ports
from disttrain.local.documents import Documents
from disttrain.local.folders import RunFolder
from disttrain.local.processes import Process
from disttrain.local.programs import Programs
from disttrain.local.references import Unusable

CONFIG_MAP = {"configMap": "my-code"}
CLAIM = {"persistentVolumeClaim": "sources", "path": "src"}
SCRIPT = {"script": {"file": "train.py"}}
COMMAND = {"command": ["python", "-m", "train"]}
MODEL = {
    "model": "train:model",
    "dataset": "train:dataset",
    "optimizer": {"name": "SGD", "learningRate": 0.1},
    "maxSteps": 1,
}


def config_map(**data: str) -> dict[str, Any]:
    return {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "my-code"}, "data": data}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Programs]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with_ports = Ports()

    def of(code: Any, trainer: Any, *documents: dict[str, Any]) -> Programs:
        spec = {"strategy": {"type": "DataParallel"}, "trainer": {"code": code, **trainer}}
        job = DistTrainJob.parse({"metadata": {"name": "j", "uid": "0123456789"}, "spec": spec})
        return Programs(job, Documents(documents), RunFolder.new("j"), with_ports)

    yield of
    with_ports.close()


def environ(programs: Programs, role: Role = Role.WORKER) -> dict[str, str]:
    process = Process(
        name=f"j-{role.short}-0",
        uid="u",
        role=role,
        index=0,
        attempt=1,
        metrics_port=1,
        log=Path("log"),
        termination_log=Path("words"),
    )
    return programs.environment(process)


@pytest.mark.parametrize("trainer", [SCRIPT, MODEL])
def test_the_config_map_of_the_file_is_written_out_for_the_workers(programs: Any, trainer: Any) -> None:
    found = programs(CONFIG_MAP, trainer, config_map(**{"train.py": "x = 1"}))
    folder = Path(environ(found)[environment.CODE_DIR])
    assert (folder / "train.py").read_text() == "x = 1"
    assert environment.CODE_DIR not in environ(found, Role.MASTER), "it runs no code of the user's"
    assert list(found.warnings()) == []
    config, _ = JobConfig.decode(environ(found)[environment.JOB])
    assert config.trainer.script is None or Path(config.trainer.script.file) == folder / "train.py"


def test_a_command_has_the_code_on_pythonpath(programs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    found = environ(programs(CONFIG_MAP, COMMAND, config_map(**{"train.py": ""})))
    folder = Path(found[environment.CODE_DIR]).absolute()
    assert found["PYTHONPATH"] == f"{folder}{os.pathsep}/mine"
    here = environ(programs(CONFIG_MAP, COMMAND))
    assert here["PYTHONPATH"] == f"{Path.cwd()}{os.pathsep}/mine"


@pytest.mark.parametrize("code", [CONFIG_MAP, CLAIM])
@pytest.mark.parametrize("trainer", [SCRIPT, MODEL])
def test_the_current_folder_stands_for_code_that_is_not_in_the_file(programs: Any, code: Any, trainer: Any) -> None:
    Path("train.py").touch()
    found = programs(code, trainer)
    assert environment.CODE_DIR not in environ(found)
    ((path, warning),) = found.warnings()
    assert path == ("spec", "trainer", "code")
    assert warning.endswith(f"is not here: the code is that of the current folder, {Path.cwd()}")


def test_the_folder_of_a_claim_is_its_code(programs: Any) -> None:
    folder = Path(".disttrain/claims/sources/src")
    folder.mkdir(parents=True)
    (folder / "train.py").touch()
    assert Path(environ(programs(CLAIM, SCRIPT))[environment.CODE_DIR]) == folder


@pytest.mark.parametrize(
    ("code", "trainer", "data", "field", "said"),
    [
        (
            CONFIG_MAP,
            SCRIPT,
            None,
            "script.file",
            'no file "train.py" in {here}; ConfigMap "my-code" is not here either: add it to the file as a document, '
            "or run from the code's folder",
        ),
        (
            CLAIM,
            MODEL,
            None,
            "model",
            'no module "train" in {here} or among the installed packages; claim "sources" (folder "src") is not here either: '
            "add it to the file as a document, or run from the code's folder, or install it",
        ),
        (
            CONFIG_MAP,
            SCRIPT,
            {"trian.py": ""},
            "script.file",
            'ConfigMap "my-code" has no key "train.py"; it has trian.py',
        ),
        (
            CONFIG_MAP,
            MODEL,
            {"trian.py": ""},
            "model",
            'no module "train" in ConfigMap "my-code", {here} or among the installed packages; correct the name, or install it',
        ),
        (
            CONFIG_MAP,
            COMMAND,
            {"torch.py": ""},
            "code.configMap",
            'ConfigMap "my-code": torch.py has the name of a module of a package that the trainer needs, which it would replace: '
            "rename it",
        ),
    ],
)
def test_code_that_cannot_be_used_is_one_line(
    programs: Any, code: Any, trainer: Any, data: Any, field: str, said: str
) -> None:
    with pytest.raises(Unusable) as wrong:
        programs(code, trainer, *([config_map(**data)] if data else []))
    assert wrong.value.message == said.format(here=Path.cwd())
    assert wrong.value.path == ("spec", "trainer", *field.split("."))


def test_a_resumed_run_has_the_keys_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from disttrain.local.code import folder_of

    monkeypatch.chdir(tmp_path)
    folder = RunFolder.new("j")
    spec = {"strategy": {"type": "DataParallel"}, "trainer": {"code": CONFIG_MAP, **COMMAND}}
    trainer = DistTrainJob.parse({"metadata": {"name": "j"}, "spec": spec}).spec.trainer
    for key in ("old.py", "new.py"):
        place = folder_of(trainer, Documents([config_map(**{key: ""})]), folder)
        assert place is not None
        assert [file.name for file in place.iterdir()] == [key]
