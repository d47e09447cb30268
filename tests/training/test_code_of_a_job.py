"""trainer.code in real processes: found by a script and what it imports, the same in every worker of an attempt."""

import zipfile
from pathlib import Path

from cluster.processes import wait_for
from disttrain.api import environment
from disttrain.api.names import Role
from training.job import Job

ORIGIN = 'ConfigMap "my-code"'


def with_code(tmp_path: Path, text: str, **env: str) -> Job:
    """A script in the code of its job, with two workers."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "train.py").write_text(text)
    spec = {
        "strategy": {"type": "DataParallel"},
        "trainer": {"script": {"file": str(code / "train.py")}},
        "worker": {"replicas": 2},
    }
    job = Job(folder=tmp_path, spec=spec, env={environment.CODE_DIR: str(code), **env})
    job.config = job.config.model_copy(update={"code_origin": ORIGIN})
    return job


def test_a_script_imports_modules_and_archives_of_the_code_and_the_users_own(tmp_path: Path) -> None:
    text = "import beside, packed, own\nopen(f'{beside.x}-{packed.x}-{own.x}', 'w').close()\n"
    own = tmp_path / "own"
    own.mkdir()
    (own / "own.py").write_text("x = 3\n")
    (own / "beside.py").write_text("x = 'the code comes first'\n")
    with with_code(tmp_path, text, PYTHONPATH=str(own)) as job:
        (tmp_path / "code/beside.py").write_text("x = 1\n")
        with zipfile.ZipFile(tmp_path / "code/lib.zip", "w") as archive:
            archive.writestr("packed.py", "x = 2\n")
        job.train(timeout=60)
    assert (tmp_path / "1-2-3").exists()


def test_a_worker_whose_code_differs_is_refused_and_named(tmp_path: Path) -> None:
    text = "import os, time\nopen('up-' + os.environ['RANK'], 'w').close()\nwhile True: time.sleep(0.05)\n"
    with with_code(tmp_path, text) as job:
        job.start()
        wait_for("both workers", lambda: (tmp_path / "up-0").exists() and (tmp_path / "up-1").exists(), 60)
        job.kill(Role.WORKER, 1)
        job.wait(Role.WORKER, 1)
        (tmp_path / "code/train.py").write_text(f"{text}# edited\n")
        job.start_one(Role.WORKER, 1)
        assert job.wait(Role.WORKER, 1, timeout=60) == environment.ExitCode.WRONG_INPUT, job.logs()
        said = job.termination(Role.WORKER, 1).message
        assert said.startswith("trainer.code of worker-1 is not that of this attempt (sha256 ")
        assert said.endswith(f"{ORIGIN} was changed while the job runs; undo the change, or create a new job")
        assert said in job.log(Role.MASTER)
