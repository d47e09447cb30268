"""`disttrain export`: the model of a checkpoint without torch; what is wrong with one is said in one line."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from disttrain.api import digests
from disttrain.api.optimizer import Optimizer
from disttrain.api.tensor_index import index_of
from disttrain.cli import export as exporting
from disttrain.cli.main import main
from disttrain_trainer.checkpoint import tensor_file
from disttrain_trainer.model.flat import FlatModel
from disttrain_trainer.model.optimizers import FlatOptimizer
from disttrain_trainer.parallel.state import RankState


class Counted(nn.Identity):
    """Has extra state that is JSON, which a file of tensors cannot hold as state_dict() has it."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: object) -> None:
        raise AssertionError("nothing of it is exported")


def checkpoint(root: Path, step: int = 1, **changes: Any) -> nn.Module:
    """Writes a checkpoint of a collective training; its model."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), Counted())
    flat = FlatModel(model)
    state = RankState(model, FlatOptimizer(Optimizer.model_validate(ADAM), flat), flat.described())
    folder = root / f"step-{step:08d}"
    folder.mkdir(parents=True)
    files = {"state.safetensors": state.write(folder / "state.safetensors", state.present())}
    tensors = {name: entry.to_dict() for name, entry in index_of(folder, files).items()}
    manifest = {"format": 3, "files": files, "tensors": tensors} | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return model


ADAM = {"name": "Adam", "learningRate": 0.1}


def test_the_newest_checkpoint_of_a_folder_is_exported_with_its_buffers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path, 9)
    model = checkpoint(tmp_path, 10)
    path = tmp_path / "out.safetensors"
    assert main(["export", str(tmp_path), "-o", str(path)]) == 0
    found = load_file(path)
    other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    other.load_state_dict(found, strict=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.items())
    assert f'model.load_state_dict(load_file("{path}"))' in capsys.readouterr().out


def cut(folder: Path) -> None:
    data = (folder / "state.safetensors").read_bytes()
    (folder / "state.safetensors").write_bytes(data[:-4])


def without_a_file(folder: Path) -> None:
    """A piece lies in a file that the manifest has no digest of."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"]["0.bias"]["pieces"][0]["file"] = "/etc/hostname"
    (folder / "manifest.json").write_text(json.dumps(manifest))


def of_another_model(folder: Path) -> None:
    """The manifest says more of a tensor than the file holds."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"]["0.bias"]["pieces"][0]["length"] = 3
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "is torn: state.safetensors does not have the digest"),
        (lambda folder: (folder / "state.safetensors").unlink(), "is torn: state.safetensors is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "the checkpoint was not completed"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "is damaged: it is nested too deeply"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"format": 2, "files": {"a/b": ""}}'),
            "does not list its files",
        ),
        (without_a_file, "manifest.json is damaged: it does not list /etc/hostname"),
        (of_another_model, "state.safetensors is of another model than the manifest: it does not hold 0.bias"),
    ],
)
def test_a_checkpoint_that_does_not_hold_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, said: str
) -> None:
    checkpoint(tmp_path)
    damage(tmp_path / "step-00000001")
    path = tmp_path / "out.safetensors"
    assert main(["export", str(tmp_path / "step-00000001"), "-o", str(path)]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert not path.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 4}, "has format 4, and this version reads formats up to 3"),
        ({"tensors": {}}, "does not name its tensors: an older version wrote it"),
    ],
)
def test_a_checkpoint_of_another_format_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    checkpoint(tmp_path, **changes)
    assert main(["export", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_without_checkpoints_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "nothing"]) == 2
    assert "there is no complete checkpoint in nothing: name a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source", ["job", "job-20260101-000000-abcd1234", ".disttrain/runs/job-20260101-000000-abcd1234"]
)
def test_of_a_run_without_checkpoints_the_model_of_its_end_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path(".disttrain/runs/job-20260101-000000-abcd1234")
    run.mkdir(parents=True)
    for name in ("run.json", "model.safetensors"):
        (run / name).touch()
    assert main(["export", source]) == 2
    assert f"left its model in {run}/model.safetensors" in capsys.readouterr().err


def test_a_checkpoint_that_its_run_removes_meanwhile_gives_way_to_the_next_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path, 1)
    digest_of = digests.of

    def removing(file: Path, *, like: str) -> str:
        monkeypatch.setattr(digests, "of", digest_of)
        checkpoint(tmp_path, 2)
        shutil.rmtree(tmp_path / "step-00000001")
        return digest_of(file, like=like)

    monkeypatch.setattr(digests, "of", removing)
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "out.safetensors")]) == 0
    assert f"from {tmp_path}/step-00000002" in capsys.readouterr().out


def test_what_is_no_file_of_a_model_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path)
    folder, pipe = tmp_path / "step-00000001", tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, folder, folder / "state.safetensors", ""):
        assert main(["export", str(folder), "-o", str(path)]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"export: -o {path or repr('')} is ")
        assert message.count("\n") == 1
    assert pipe.is_fifo()
    assert main(["export", str(folder), "-o", str(tmp_path / "none" / "out")]) == 1
    assert capsys.readouterr().err == f"export: {tmp_path}/none/out: No such file or directory; no model was written\n"


def test_an_output_that_is_a_link_stays_one(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    link, path = tmp_path / "link", tmp_path / "out.safetensors"
    link.symlink_to(path)
    assert main(["export", str(tmp_path / "step-00000001"), "-o", str(link)]) == 0
    assert link.is_symlink()
    assert load_file(path)


def test_a_full_disk_leaves_the_file_of_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "checkpoints")
    path = tmp_path / "out.safetensors"
    path.write_text("before")

    def full(*_: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "_blocks", full)
    assert main(["export", str(tmp_path / "checkpoints"), "-o", str(path)]) == 1
    assert capsys.readouterr().err == f"export: {path}: No space left on device; no model was written\n"
    assert path.read_text() == "before"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoints", "out.safetensors"]


def test_a_checkpoint_of_servers_without_a_worker_names_no_tensors(tmp_path: Path) -> None:
    metadata = {"server": "[0, 1]", "layout": json.dumps({"digest": "f" * 64, "vectors": [["float32", 4]]})}
    digest = tensor_file.write(tmp_path / "shard-0-a.safetensors", {"0.parameters": torch.ones(4)}, metadata)
    assert index_of(tmp_path, {"shard-0-a.safetensors": digest}) == {}
