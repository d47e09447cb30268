"""`disttrain scale`: which run is meant, what it may be asked for, and what of it holds when the run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from disttrain.api.job import DistTrainJob
from disttrain.cli.main import main
from disttrain.local import scaling
from disttrain.local.folders import RunFolder
from disttrain.local.scaling import CannotScale, Scaled
from unit.plan.builders import make_job

ELASTIC = {"replicas": 2, "elastic": {"minReplicas": 2, "maxReplicas": 5}}


def job(worker: dict[str, Any] = ELASTIC) -> DistTrainJob:
    return make_job().servers(1).spec(worker=worker).job


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder.new("digits", tmp_path)
    folder.keep(job())
    yield folder
    folder.close()


def test_a_run_is_named_by_its_folder_its_name_or_its_job(tmp_path: Path, run: RunFolder) -> None:
    for number, name in enumerate((str(run.path), run.path.name, "digits"), 3):
        assert scaling.ask(name, number, tmp_path) == Scaled(run.path.name, number - 1, number)
        assert scaling.wished(run.path) == number


def test_a_jobs_name_stands_for_the_run_that_goes_on(tmp_path: Path, run: RunFolder) -> None:
    later = RunFolder.new("digits", tmp_path)
    later.keep(job())
    later.close()
    assert scaling.ask("digits", 3, tmp_path).run == run.path.name


def _over(run: RunFolder) -> str:
    over = RunFolder.new("over", run.root)
    over.keep(job())
    over.close()
    return "over"


def _with(worker: dict[str, Any]) -> Any:
    def of(run: RunFolder) -> str:
        run.keep(job(worker))
        return "digits"

    return of


def _command(run: RunFolder) -> str:
    run.keep(make_job().command().job)
    return "digits"


def _not_begun(run: RunFolder) -> str:
    (run.path / "job.json").unlink()
    return "digits"


@pytest.mark.parametrize(
    ("name", "number", "text"),
    [
        (lambda _: "none", 3, "there is no run none: name a folder of "),
        (_over, 3, "is over; `disttrain run --resume FILE` goes on"),
        (_with(ELASTIC), 1, "1 is outside of worker.elastic of run digits-"),
        (_with(ELASTIC), 6, "choose 2 to 5"),
        (_with({"replicas": 2}), 3, "is not elastic: its job needs worker.elastic"),
        (_command, 3, "is of a trainer.command, which starts and connects its processes itself"),
        (_not_begun, 3, "has not begun yet: try again in a moment"),
    ],
)
def test_what_cannot_be_asked_is_one_line(tmp_path: Path, run: RunFolder, name: Any, number: int, text: str) -> None:
    with pytest.raises(CannotScale) as refused:
        scaling.ask(name(run), number, tmp_path)
    assert text in str(refused.value)
    assert "\n" not in str(refused.value)
    assert scaling.wished(run.path) is None


def test_the_command_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.new("digits")
    folder.keep(job())
    assert main(["scale", "digits", "4"]) == 0
    assert capsys.readouterr().out == f"{folder.path.name}: 2 -> 4 workers\n"
    for number in ("many", "-1", "٣", "3.5", "1" + "0" * 9):
        assert main(["scale", "--", "digits", number]) == 2
        assert capsys.readouterr().err == f"scale: {number!r} is no number of workers; write one such as 3\n"
    folder.close()
    assert main(["scale", "digits", "9" * 5000]) == 2
    assert "is no number of workers" in capsys.readouterr().err
    assert main(["scale", "digits", "4"]) == 2


def test_a_run_that_goes_on_has_the_number_that_was_last_asked_for(tmp_path: Path, run: RunFolder) -> None:
    scaling.ask("digits", 4, tmp_path)
    assert scaling.carried_over(job(), run.path).spec.worker.replicas == 4
    scaling.ask("digits", 5, tmp_path)
    assert scaling.carried_over(job(), run.path).spec.worker.replicas == 5


@pytest.mark.parametrize(
    "worker", [ELASTIC | {"replicas": 3}, {"replicas": 2, "elastic": {"minReplicas": 1, "maxReplicas": 3}}]
)
def test_a_file_that_was_changed_since_overtakes_it(tmp_path: Path, run: RunFolder, worker: dict[str, Any]) -> None:
    scaling.ask("digits", 4, tmp_path)
    assert scaling.carried_over(job(worker), run.path).spec.worker.replicas == worker["replicas"]
    assert scaling.wished(run.path) is None


def test_a_damaged_file_is_no_wish(run: RunFolder) -> None:
    for text in ("", "{", '{"replicas": "4", "file_replicas": 2}', '{"replicas": 0, "file_replicas": 2}'):
        (run.path / "scale.json").write_text(text)
        assert scaling.wished(run.path) is None
