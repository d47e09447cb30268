"""The command itself: quick, honest about its verbs, and its exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.programs import program, require
from disttrain import __version__
from disttrain.cli.main import main

GOOD = str(Path("examples/command.yaml"))


def test_help_lists_what_there_is() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("disttrain"), "--help"], capture_output=True, text=True, check=True
    )
    assert all(f"    {verb} " in done.stdout for verb in ("run", "submit", "plot", "lint", "ls", "status", "version"))
    assert "watch" not in done.stdout


@pytest.mark.parametrize("module", ["main as m; m.make_parser()", "history", "logs", "plot", "report"])
def test_help_and_verbs_that_read_a_run_import_nothing_heavy(module: str) -> None:
    heavy = "('pydantic', 'yaml', 'rich', 'asyncio', 'kubernetes')"
    program = f"import sys, disttrain.cli.{module}; print([n for n in {heavy} if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"disttrain {__version__}\n"


def test_help_of_run_says_where_data_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "the data of a claim is expected in .disttrain/claims/CLAIM/" in " ".join(capsys.readouterr().out.split())


def test_it_is_also_a_plugin_of_kubectl() -> None:
    plugin = Path(sys.executable).with_name("kubectl-disttrain")
    assert (
        subprocess.run([plugin, "version"], capture_output=True, text=True, check=True).stdout
        == f"disttrain {__version__}\n"
    )


def test_kubectl_finds_it() -> None:
    require("apiserver")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [program("kubectl"), "disttrain", "version"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"disttrain {__version__}\n"


def test_lint_says_ok_and_warns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", GOOD, "examples/mlp-sync.yaml"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{GOOD}: command: ok\nexamples/mlp-sync.yaml: mlp-sync: ok\n"
    assert (
        "warning: spec: set checkpoint.volume: without it a restart of the job begins at step 0, and on a cluster the trained model is lost"
        in printed.err
    )


def test_the_examples_can_be_applied_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "examples"]) == 0
    assert "is already in" not in capsys.readouterr().err


def test_lint_warns_of_workers_that_have_no_part_of_a_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    job = Path("examples/digits-ddp.yaml").read_text()
    file.write_text(re.sub(r"(?m)^    batchSize: .*$", r"\g<0>\n    partsPerStep: 1", job))
    assert main(["lint", str(file)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{file}: digits-ddp: ok\n"
    number = next(n for n, line in enumerate(file.read_text().splitlines(), 1) if line.startswith("    replicas:"))
    assert printed.err == (
        f"{file}:{number}: warning: spec.worker.replicas: 1 of 2 worker processes have nothing to do in a step: it has 1 part "
        "(trainer.partsPerStep)\n"
    )


def test_lint_tells_what_this_version_cannot_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(Path(GOOD).read_text() + "  scheduling: {gang: Kueue}\n")
    assert main(["lint", str(file)]) == 2
    assert "scheduling.gang Kueue or Native is not supported by this version" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["lint", "run"])
def test_a_factory_is_named_by_its_module_and_not_by_its_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    job = Path("examples/own-model.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(re.sub(r"(?m)^(    model: \w+):", r"\1.py:", job))
    assert main([verb, "job.yaml"]) == 2
    said = capsys.readouterr().err
    assert 'spec.trainer.model: "spiral.py:model" names a file; write the module: spiral:model' in said
    assert not Path(".disttrain").exists()


def trainer_job(*fields: str, strategy: str = "{type: DataParallel}") -> int:
    """Writes job.yaml, whose last lines are these of spec.trainer; the number of the last one."""
    lines = [
        "apiVersion: disttrain.dev/v1alpha1",
        "kind: DistTrainJob",
        "metadata: {name: mine}",
        "spec:",
        f"  strategy: {strategy}",
        "  worker: {replicas: 2}",
        "  trainer:",
        "    model: disttrain_trainer.examples.digits:model",
        "    dataset: disttrain_trainer.examples.digits:dataset",
        "    maxSteps: 1",
        *(f"    {field}" for field in fields),
    ]
    Path("job.yaml").write_text("\n".join(lines))
    return len(lines)


@pytest.mark.parametrize("verb", ["lint", "run"])
def test_a_group_of_the_optimizer_by_no_pattern_is_named_with_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = trainer_job(
        "optimizer:",
        "  name: SGD",
        "  learningRate: 0.1",
        "  groups:",
        "  - {match: norm, weightDecay: 0}",
        "  - {match: (bias, weightDecay: 0}",
    )
    assert main([verb, "job.yaml"]) == 2
    place = f"job.yaml:{line}: spec.trainer.optimizer.groups[1].match"
    assert f"{place}: '(bias' is no regular expression of Python: missing ), unterminated" in capsys.readouterr().err
    assert not Path(".disttrain").exists()


@pytest.mark.parametrize(
    ("strategy", "fields", "named"),
    [
        ("{type: DataParallel}", ["optimizer: {factory: 'nowhere:made'}"], "optimizer.factory"),
        (
            "{type: ModelParallel, modelParallel: {pipeline: 2}}",
            ["optimizer: {name: SGD, learningRate: 0.1}", "pipelineSplit: nowhere:split"],
            "pipelineSplit",
        ),
    ],
)
def test_a_run_names_the_missing_module_of_a_factory_with_its_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    fields: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = trainer_job(*fields, strategy=strategy)
    assert main(["run", "job.yaml"]) == 2
    assert f'job.yaml:{line}: spec.trainer.{named}: no module "nowhere" in ' in capsys.readouterr().err


def test_lint_finds_a_script_that_its_config_map_lacks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(Path("examples/torchrun-script.yaml").read_text().replace("file: train.py", "file: trian.py"))
    assert main(["lint", str(file)]) == 2
    assert (
        'spec.trainer.script.file: ConfigMap "torchrun-script" has no key "trian.py"; it has train.py'
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("random.py", "random.py has the name of a module of Python, which it would replace: rename it"),
        ("notes.txt", "notes.txt is neither a .py file nor a .zip archive: remove it, or keep it on a volume"),
    ],
)
def test_lint_finds_what_no_code_may_hold(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str, said: str
) -> None:
    file = tmp_path / "job.yaml"
    text = Path("examples/torchrun-script.yaml").read_text()
    file.write_text(text.replace("  train.py: |", f"  {key}: ''\n  train.py: |"))
    assert main(["lint", str(file)]) == 2
    printed = capsys.readouterr().err
    assert f'{file}:12: spec.trainer.code.configMap: ConfigMap "torchrun-script": {said}\n' == printed


def test_lint_names_the_place_of_the_config_map_of_a_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    text = Path("examples/torchrun-script.yaml").read_text()
    file.write_text(text.replace("    script:\n", "    script:\n      configMap: a\n"))
    assert main(["lint", str(file)]) == 2
    assert "spec.trainer.script.configMap: write trainer.code.configMap (got a)\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            ("spec:\n", "spec:\n  suspend: true\n"),
            "a suspended job has nothing to run; set it to false",
            id="suspended",
        ),
        pytest.param(
            ("spec:\n", "spec:\n  managedBy: a.b/c\n"), "another controller runs this job", id="of another controller"
        ),
        pytest.param(
            ("replicas: 3", "replicas: 0"),
            ":18: spec.worker.replicas: Input should be greater than or equal to 1 (got 0)",
            id="invalid",
        ),
    ],
)
def test_run_refuses_with_2_and_the_line(
    change: tuple[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = Path(GOOD).read_text()
    assert change[0] in text
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(text.replace(*change))
    assert main(["run", "job.yaml"]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("job.yaml:")
    assert said.out == ""
    assert not Path(".disttrain").exists()


def test_a_crash_before_the_start_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or --resume would go on with it."""

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake of ours")

    file = Path(GOOD).absolute()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("disttrain.cli.run.screen_for", crash)
    with pytest.raises(RuntimeError):
        main(["run", str(file)])
    assert list(Path(".disttrain/runs").iterdir()) == []


def test_run_takes_one_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "two.yaml"
    text = Path(GOOD).read_text()
    file.write_text(text + "---\n" + text.replace("name: command", "name: other"))
    assert main(["run", str(file)]) == 2
    assert "holds 2 jobs (command, other); a run takes one" in capsys.readouterr().err
