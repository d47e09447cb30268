"""`disttrain data pack`: what it prints and answers, and that a mistake is one line and leaves nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from disttrain.cli.main import main as disttrain
from disttrain_trainer.data.packed_dataset import PackedDataset
from disttrain_trainer.pack import main

DIGITS = "disttrain_trainer.examples.digits:dataset"
MINE = """
class Numbers(list):
    def __getitem__(self, i):
        if i == 3 and self.fails:
            raise RuntimeError("no such image")
        return super().__getitem__(i)

def dataset(config, split):
    found = Numbers(range(config.get("samples", 5)))
    found.fails = config.get("fails", False)
    return found

def stream(config, split):
    return iter(range(3))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "numbers_of_mine", raising=False)
    Path("numbers_of_mine.py").write_text(MINE)
    return tmp_path


def test_both_splits_are_packed_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([DIGITS, "out", "--partitions=8"]) == 0
    said = capsys.readouterr()
    assert "out/train: 1437 samples in 8 partitions, 8 blocks, 371.1 KiB, not encrypted" in said.out
    assert "out/test: 360 samples in 8 partitions" in said.out
    assert "trainer.dataset: disttrain_trainer.data:packed" in said.out
    assert said.err == ""
    assert len(PackedDataset(Path("out/train"))) == 1437


def test_config_is_an_object_or_its_file() -> None:
    Path("config.json").write_text('{"samples": 7}')
    for number, config in enumerate(('{"samples": 7}', "config.json")):
        assert (
            main(["numbers_of_mine:dataset", f"out{number}", "--partitions=2", f"--config={config}", "--split=train"])
            == 0
        )
        assert len(PackedDataset(Path(f"out{number}/train"))) == 7
        assert not Path(f"out{number}/test").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (
            ["numbers_of_mine:nothing", "out"],
            2,
            "data pack: dataset: 'numbers_of_mine:nothing': module numbers_of_mine has no",
        ),
        (["numbers_of_mine:stream", "out"], 2, "numbers_of_mine:stream (train) is a range_iterator"),
        (["numbers_of_mine:dataset", "out", '--config={"samples": 0}'], 2, "numbers_of_mine:dataset (train) is empty"),
        (["numbers_of_mine:dataset", "out", '--config={"fails": true}'], 1, "RuntimeError: no such image ("),
        (
            ["numbers_of_mine:dataset", "out", "--config=[1]"],
            2,
            "--config [1]: No such file or directory; expected a JSON",
        ),
        (["numbers_of_mine:dataset", "out", "--config={1"], 2, "--config: Expecting property name"),
        (["numbers_of_mine:dataset", "out", "--partitions=0"], 2, "--partitions 0: expected 1 to 1000000"),
        (["numbers_of_mine:dataset", "out", "--split=valid"], 2, "--split valid: expected train or test"),
        (["numbers_of_mine:dataset", "out", "--key=none"], 2, "--key: none: No such file or directory"),
        (
            ["numbers_of_mine:dataset", "out", "--key=numbers_of_mine.py"],
            2,
            "--key: no key in numbers_of_mine.py: expected 32 bytes",
        ),
        (["numbers_of_mine:dataset", "numbers_of_mine.py"], 1, "numbers_of_mine.py"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, says: str) -> None:
    assert main(["--partitions=2", *arguments]) == code
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not [path for path in Path().glob("out/**/*") if path.is_file()]


def test_what_is_there_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["numbers_of_mine:dataset", "out", "--partitions=2", "--split=test"]) == 0
    assert main(["numbers_of_mine:dataset", "out", "--partitions=2"]) == 2
    assert "out/test is there already: remove it, or name another folder" in capsys.readouterr().err
    assert [entry.name for entry in Path("out").iterdir()] == ["test"], "it is known before anything is written"


def test_the_command_hands_over_to_the_trainer(capfd: pytest.CaptureFixture[str]) -> None:
    key = Path("key")
    key.write_bytes(os.urandom(32))
    arguments = ["numbers_of_mine:dataset", "out", "--partitions", "2", "--key", "key", "--split", "train"]
    assert disttrain(["data", "pack", *arguments, "--config", '{"samples": 9}']) == 0
    assert "out/train: 9 samples in 2 partitions, 2 blocks" in capfd.readouterr().out
    assert len(PackedDataset(Path("out/train"), key.read_bytes())) == 9
