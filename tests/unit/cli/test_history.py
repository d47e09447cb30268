"""`disttrain history` of a local run."""

import json
from pathlib import Path

import pytest

from disttrain.api.history import FILE, Event, EventType, Header, Point
from disttrain.cli.main import main

RUN = "digits-20261130-101112-0123abcd"
LINES = (
    Header("digits", "default", "u", 0.25),
    Point(step=2, time=1.0, seconds=0.25, loss=0.5),
    Point(step=5, time=2.0, seconds=0.25, loss=0.25),
    Event(EventType.FALL_BACK, 3.0, 2),
    Point(step=4, time=4.0, seconds=0.25, loss=0.375),
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = Path(".disttrain/runs", RUN)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    return folder


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text("".join(f"{line.encode()}\n" for line in LINES) + '{"step":5,"ti')


@pytest.mark.parametrize("name", ["digits", RUN, f".disttrain/runs/{RUN}"])
@pytest.mark.parametrize("place", [f".disttrain/runs/{RUN}", f".disttrain/claims/ckpt/{RUN}"])
def test_a_run_is_found_by_its_names_beside_its_checkpoints_too(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, place: str
) -> None:
    write(Path(place))
    assert main(["history", name, "-o", "json"]) == 0
    assert [body["step"] for body in json.loads(capsys.readouterr().out)] == [2, 2, 4]


def test_the_csv_has_points_and_events(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(run)
    assert main(["history", "digits", "-o", "csv"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "time,step,epoch,loss,samplesPerSecond,gradientNorm,staleness,workers,event",
        "1.0,2,,0.5,,,,,",
        "3.0,2,,,,,,,fallBack",
        "4.0,4,,0.375,,,,,",
    ]


def test_the_table_is_for_people(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(run)
    assert main(["history", "digits"]) == 0
    heading, first, *_ = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["TIME", "STEP"]
    assert first.split() == ["1970-01-01", "00:00:01", "2", "0.5"]


@pytest.mark.parametrize("name", ["digits", "nothing", ""])
def test_a_run_without_a_history_is_one_line(run: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["history", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"history: there is no history.jsonl of {name}")
