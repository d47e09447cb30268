"""The ways in: make's targets, the environment that they make, and what the README shows of them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from disttrain.cli import files
from disttrain.cli.files import WrongInput

ROOT = Path(__file__).parents[3]
MAKEFILE = (ROOT / "Makefile").read_text()
README = (ROOT / "README.md").read_text()


def targets() -> set[str]:
    return {name for line in re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M) for name in line.split()}


def make(*arguments: str) -> str:
    # We may ourselves be run by make, whose flags are none of this one's.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


def test_help_lists_every_target_with_a_sentence() -> None:
    listed = dict(line.split(maxsplit=1) for line in make("help").splitlines())
    assert set(listed) == targets()
    assert set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.M)) == targets(), "each is phony: no file is named so"


def test_run_trains_the_digits_on_parameter_servers() -> None:
    assert make("-n", "run").splitlines() == [
        "tools/environment all",
        ".venv/bin/disttrain run examples/digits-ps.yaml",
    ]


def test_the_burst_builds_its_programs_first() -> None:
    assert make("-n", "bench-burst").splitlines()[1:] == [
        ".venv/bin/python tests/cluster/programs.py apiserver",
        ".venv/bin/python benchmarks/burst.py",
    ]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with an environment that holds what the tests need, for all that tools/environment can see."""
    folder = tmp_path / "checkout"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("tools", "requirements"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (folder / ".venv" / "bin" / "activate").write_text(f'VIRTUAL_ENV="{folder}/.venv"\n')
    stamp(folder)
    return folder


def stamp(folder: Path, index: str = "") -> None:
    parts = [(folder / "requirements" / "dev.txt").read_bytes(), (folder / "pyproject.toml").read_bytes()]
    content = b"".join([*parts, f"{index}\n{folder}\n".encode()])
    (folder / ".venv" / ".disttrain-dev").write_text(hashlib.sha256(content).hexdigest() + "\n")


def environment(folder: Path, lock: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs tools/environment with a Python that makes no environment, but says that it was asked to."""
    fake = folder.parent / "bin"
    fake.mkdir(exist_ok=True)
    (fake / "python3.11").write_text('#!/bin/sh\ncase "$*" in *"-m venv"*) echo "asked: $*"; exit 9;; esac\n')
    (fake / "python3.11").chmod(0o755)
    given = {name: value for name, value in os.environ.items() if name != "TORCH_INDEX"}
    path = f"{fake}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [folder / "tools" / "environment", lock],
        env={**given, "PATH": path, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def silent(done: subprocess.CompletedProcess[str]) -> bool:
    return (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("lock", ["dev", "all"])
def test_an_environment_that_holds_everything_is_left_alone(checkout: Path, lock: str) -> None:
    assert silent(environment(checkout, lock))


def test_the_index_of_torch_is_remembered(checkout: Path) -> None:
    (checkout / ".venv" / ".torch-index").write_text("https://wheels.example/cpu\n")
    stamp(checkout, "https://wheels.example/cpu")
    assert silent(environment(checkout, "dev"))
    assert silent(environment(checkout, "dev", TORCH_INDEX="https://wheels.example/cpu"))


@pytest.mark.parametrize("what", ["moved", "without its Python"])
def test_an_environment_that_cannot_be_used_is_created_again(checkout: Path, what: str) -> None:
    """A copy has the programs and the code of the old place."""
    if what == "moved":
        checkout = checkout.rename(checkout.with_name("elsewhere"))
    else:
        (checkout / ".venv" / "bin" / "python").unlink()
        (checkout / ".venv" / "bin" / "python").symlink_to("/nowhere/python")
    done = environment(checkout, "dev")
    assert (done.returncode, done.stdout) == (9, "asked: -m venv .venv\n")
    assert "making it again" in done.stderr
    assert not (checkout / ".venv").exists(), "half an environment would be taken for a whole one"


INDEX = "https://wheels.example/cpu"


@pytest.fixture
def uv(checkout: Path) -> Path:
    """The environment lacks everything, and its uv writes down what it is asked for; what is in `refused` cannot be had."""
    (checkout / ".venv" / ".disttrain-dev").unlink()
    folder = checkout / ".venv" / "bin"
    (folder / "uv").write_text(
        f'#!/bin/sh\necho "$*" >> {folder}/asked\n! echo "$*" | grep -qF -f {folder}/refused || exit 2\n'
    )
    (folder / "uv").chmod(0o755)
    (folder / "refused").touch()
    return folder


def asked(uv: Path) -> list[str]:
    """Of what was installed: the index or the lock."""
    return re.findall(r"--index-url \S+|-r \S+", (uv / "asked").read_text())


def remembered(checkout: Path) -> str | None:
    file = checkout / ".venv" / ".torch-index"
    return file.read_text().strip() if file.exists() else None


def test_torch_is_taken_from_its_index(checkout: Path, uv: Path) -> None:
    assert environment(checkout, "dev", TORCH_INDEX=INDEX).returncode == 0
    assert asked(uv) == [f"--index-url {INDEX}", "-r requirements/dev-without-torch.txt"]
    assert remembered(checkout) == INDEX
    assert silent(environment(checkout, "dev"))


@pytest.mark.parametrize(("before", "now"), [("", INDEX), (INDEX, "")])
def test_another_index_brings_another_torch_of_the_same_version(
    checkout: Path, uv: Path, before: str, now: str
) -> None:
    (checkout / ".venv" / ".torch-index").write_text(f"{before}\n")
    assert environment(checkout, "dev", TORCH_INDEX=now).returncode == 0
    first = (uv / "asked").read_text().splitlines()[0]
    assert first.startswith("pip install --reinstall-package torch ")
    (checkout / ".venv" / ".disttrain-dev").unlink()
    assert environment(checkout, "dev").returncode == 0
    assert (uv / "asked").read_text().count("--reinstall-package") == 1


@pytest.mark.parametrize("way", ["given", "remembered"])
def test_where_its_index_cannot_be_reached_torch_is_the_default_one(checkout: Path, uv: Path, way: str) -> None:
    (uv / "refused").write_text(f"{INDEX}\n")
    if way == "remembered":
        (checkout / ".venv" / ".torch-index").write_text(f"{INDEX}\n")
    done = environment(checkout, "dev", **({"TORCH_INDEX": INDEX} if way == "given" else {}))
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if "cannot be had" in line]
    assert f"from {INDEX}: taking the default one instead" in said
    assert asked(uv) == [f"--index-url {INDEX}", "-r requirements/dev.txt"]
    assert remembered(checkout) == ""
    assert silent(environment(checkout, "dev")), "it is not tried again and again"


@pytest.mark.parametrize("refused", ["requirements/dev.txt", "requirements/dev-without-torch.txt"])
def test_an_environment_that_could_not_be_filled_remembers_no_index(checkout: Path, uv: Path, refused: str) -> None:
    (uv / "refused").write_text(f"{refused}\n" + (f"{INDEX}\n" if refused == "requirements/dev.txt" else ""))
    assert environment(checkout, "dev", TORCH_INDEX=INDEX).returncode == 2
    assert asked(uv)[-1] == f"-r {refused}"
    assert remembered(checkout) is None
    assert not (checkout / ".venv" / ".disttrain-dev").exists()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_the_job_of_the_readme_is_the_example() -> None:
    example = next(yaml.safe_load_all((ROOT / "examples" / "digits-ps.yaml").read_text()))
    assert yaml.safe_load(blocks("yaml")[0]) == example


def test_what_the_readme_names_is_there() -> None:
    assert (
        set(re.findall(r"`make ([a-z-]+)", README)) | set(re.findall(r"^\$ make ([a-z-]+)", README, re.M)) <= targets()
    )
    paths = re.findall(r"\b((?:examples|deploy|docs|tests|tools|operator)/[\w./-]*\w)", README)
    paths += re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_errors_that_the_readme_quotes_come_out() -> None:
    quoted = re.findall(r"^job\.yaml:(\d+): (.*)$", README, re.M)
    assert len(quoted) == 2
    text = """\
apiVersion: disttrain.dev/v1alpha1
kind: DistTrainJob
metadata: {name: digits-ps}
spec:
  strategy:
    parameterServer: {consistency: Sync, maxStaleness: 4}
    type: ParameterServer
  parameterServer: {replicas: 2}
  trainer:
    model: a:b
    dataset: a:c
    batchsize: 64
    optimizer: {name: SGD, learningRate: 0.1}
    epochs: 1
"""
    with pytest.raises(WrongInput) as wrong:
        files.read("job.yaml", text)
    assert str(wrong.value).splitlines() == [f"job.yaml:{line}: {words}" for line, words in quoted]
