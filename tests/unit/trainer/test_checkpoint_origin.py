"""What checkpoint.from names is found, taken over whole, and refused in one line that says what, where, and what to do."""

import json
import os
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.api.runtime import JobConfig
from disttrain.api.tensor_index import LAYOUT
from disttrain_trainer.checkpoint import atomic, by_name, origin, store, tensor_file
from disttrain_trainer.checkpoint.manifest import NAME
from disttrain_trainer.data.schedule import DataSet
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.flat import FlatModel
from unit.trainer.test_checkpoint_store import make_config

DATA = DataSet(96)
CLOCK = iter(datetime(2040, 1, 1, tzinfo=UTC) + timedelta(minutes=minute) for minute in range(1000))


def config_of(name: str, asked: Any = None, *, namespace: str = "default", **trainer: Any) -> JobConfig:
    """A job with checkpoints. asked: its checkpoint.from."""
    checkpoint: dict[str, Any] = {"volume": {"persistentVolumeClaim": "ckpt"}}
    if asked is not None:
        checkpoint["from"] = asked
    config = make_config(**trainer)
    described = config.model_dump(by_alias=True) | {"name": name, "namespace": namespace, "checkpoint": checkpoint}
    return JobConfig.model_validate(described)


def model_of(value: float = 1.0) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(value)
    return model


def save(
    claim: Path, folder: str, step: int, *, value: float = 1.0, namespace: str = "default", name: str | None = None
) -> Path:
    """A checkpoint of a collective in the folder of a job, each written later than those before."""
    path = store.prepare(claim / folder, step)
    flat = FlatModel(model := model_of(value))
    tensors = {f"model.{key}": tensor.clone() for key, tensor in model.state_dict().items()}
    metadata = {LAYOUT: flat.described().model_dump_json(by_alias=True)}
    sha256 = tensor_file.write(path / "state-1.safetensors", tensors, metadata)
    manifest = store.publish(
        path,
        config=config_of(name or folder.rpartition("-")[0], namespace=namespace),
        step=step,
        parts=step,
        data=DATA,
        files={"state-1.safetensors": sha256},
    )
    store.write_manifest(path, manifest.model_copy(update={"time": next(CLOCK)}))
    return path


def taken(claim: Path, asked: Any, **config: Any) -> store.Found:
    return origin.look(claim / "new-99999999", config_of("new", asked, **config))


def refusal(claim: Path, asked: Any, **config: Any) -> str:
    with pytest.raises(WrongInput) as refused:
        taken(claim, asked, **config)
    left = list((claim / "new-99999999").glob("*"))
    assert left == [], "nothing is left of what was refused"
    return str(refused.value)


@pytest.fixture
def claim(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        save(tmp_path, "old-00000001", step, value=step)
    return tmp_path


def value_of(found: store.Found) -> tuple[int, float]:
    """The step of the checkpoint that a job starts with, and the value of its parameters."""
    assert found.start is not None
    model = model_of(0)
    by_name.load_model(found.start.folder, model, source=found.start.of)
    return found.start.manifest.step, model.state_dict()["0.weight"][0, 0].item()


def test_the_newest_is_taken_and_the_job_starts_at_step_0(claim: Path) -> None:
    found = taken(claim, "old")
    assert value_of(found) == (30, 30.0)
    assert found.checkpoint is None
    assert found.describe(config_of("new", "old")) == "Begins with the model of job old (00000001), step 30"


def test_a_step_may_be_named(claim: Path) -> None:
    assert value_of(taken(claim, {"job": "old", "step": 20})) == (20, 20.0)


def test_of_several_jobs_of_a_name_the_newest_or_that_of_the_uid(claim: Path) -> None:
    save(claim, "old-00000000", 5, value=5)
    assert value_of(taken(claim, "old")) == (5, 5.0)
    for uid in ("00000001", "00000001-1111-2222-3333-444444444444"):
        assert value_of(taken(claim, {"job": "old", "uid": uid})) == (30, 30.0)


def test_a_local_run_is_found_by_its_job(claim: Path) -> None:
    save(claim, "other-20261129-010203-0000000a", 7, value=7, name="other")
    assert value_of(taken(claim, "other")) == (7, 7.0)


def test_a_job_whose_name_only_begins_so_is_another_one(claim: Path) -> None:
    save(claim, "old-big-00000002", 99)
    save(claim, "old-20261129-010203-00000003", 99, name="old-20261129-010203")
    assert value_of(taken(claim, "old")) == (30, 30.0)


def test_a_former_job_of_the_same_name_may_be_named(claim: Path) -> None:
    save(claim, "new-00000007", 3, value=3)
    assert value_of(taken(claim, "new")) == (3, 3.0)


@pytest.mark.parametrize("links", [True, False])
def test_what_was_taken_is_kept_whatever_becomes_of_the_other_job(
    claim: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:  # as on SMB

        def link(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    taken(claim, "old")
    save(claim, "old-00000001", 40, value=40)
    assert value_of(taken(claim, "old")) == (30, 30.0)
    shutil.rmtree(claim / "old-00000001")
    assert value_of(taken(claim, "old")) == (30, 30.0)
    assert [path for path in (claim / "new-99999999").iterdir() if path.name.startswith(".")] == []


def test_what_a_killed_process_left_is_removed(claim: Path) -> None:
    (folder,) = (claim / "new-99999999").iterdir() if taken(claim, "old") else ()
    shutil.rmtree(folder)
    (claim / "new-99999999" / f".{folder.name}.0badcafe.tmp").mkdir()
    assert value_of(taken(claim, "old")) == (30, 30.0)
    assert [path.name for path in (claim / "new-99999999").iterdir()] == [folder.name]


def test_a_field_that_was_mended_is_read_again(claim: Path) -> None:
    taken(claim, {"job": "old", "step": 10})
    assert value_of(taken(claim, {"job": "old", "step": 20})) == (20, 20.0)


def test_a_job_with_a_checkpoint_of_its_own_goes_on_from_that(claim: Path) -> None:
    save(claim, "new-99999999", 2)
    found = taken(claim, "nothing-of-the-kind")
    assert found.start is None
    assert found.checkpoint is not None
    assert found.checkpoint.manifest.step == 2


def test_two_processes_at_once_take_one_checkpoint(claim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def too_late(path: Path, target: Path) -> Path:
        shutil.copytree(path, target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", too_late)
    assert value_of(taken(claim, "old")) == (30, 30.0)
    assert len(list((claim / "new-99999999").iterdir())) == 1


def test_all_of_it_becomes_a_checkpoint_of_the_job(claim: Path) -> None:
    asked = {"job": "old", "include": "All"}
    found = taken(claim, asked)
    assert found.start is None
    assert found.checkpoint is not None
    manifest = found.checkpoint.manifest
    assert (manifest.step, manifest.job, manifest.finished) == (30, "new", False)
    assert found.describe(config_of("new", asked)) == "Goes on at step 30 of job old (00000001)"
    later = config_of("new", asked, attempt=2)
    assert origin.look(claim / "new-99999999", later).describe(later) == "Resumed at step 30"


def test_all_of_it_with_other_numbers_says_what_has_changed(claim: Path) -> None:
    found = taken(claim, {"job": "old", "include": "All"}, optimizer={"name": "SGD", "learningRate": 0.5})
    assert (found.describe(config_of("new")) or "").endswith("; changed: trainer.optimizer.learningRate: 0.1 -> 0.5")


def test_all_of_it_is_refused_where_the_training_would_be_another_one(claim: Path) -> None:
    assert refusal(claim, {"job": "old", "include": "All"}, batchSize=16) == (
        "checkpoint.from: job old (00000001) had another setting: trainer.batchSize: 32 then, 16 now. include: All continues the training "
        "of that job, so its settings must be the same: write them here, or take its model alone (include: Model)"
    )


def test_all_of_it_with_another_data_set_is_refused_with_what_to_write_in_the_field(claim: Path) -> None:
    """The samples are counted by a worker, after the checkpoint was taken over."""
    taken(claim, asked := {"job": "old", "include": "All"})
    with pytest.raises(WrongInput) as refused:
        origin.look(claim / "new-99999999", config_of("new", asked), DataSet(64))
    assert str(refused.value) == (
        "checkpoint.from: checkpoint step-00000030, which this job has taken over, is of another training: samples of trainer.dataset: 96 "
        "then, 64 now. With include: All the training goes on as that job would have: write the same, or take its model alone (include: "
        "Model), in a new job (a local run: without --resume)"
    )


@pytest.mark.parametrize("parts", [{"partsPerStep": 3}, {"workers": 3}])
def test_all_of_it_with_another_number_of_parts_is_refused_by_name(claim: Path, parts: dict[str, int]) -> None:
    """Also where no field names the number: it is that of the workers then."""
    assert refusal(claim, {"job": "old", "include": "All"}, **parts).startswith(
        "checkpoint.from: job old (00000001) had another setting: trainer.partsPerStep: 1 then, 3 now. include: All continues the "
        "training of that job, so its settings must be the same: write them here, or take its model alone"
    )
    assert value_of(taken(claim, "old", **parts)) == (30, 30.0)


def test_another_one_after_all_of_it_was_taken_is_refused(claim: Path) -> None:
    taken(claim, {"job": "old", "step": 10, "include": "All"})
    with pytest.raises(
        WrongInput, match="has already taken over another checkpoint, of step 10: change the field back"
    ):
        taken(claim, {"job": "old", "step": 20, "include": "All"})


def test_no_such_job(claim: Path) -> None:
    assert refusal(claim, "odl") == (
        'checkpoint.from: there is no checkpoint of job odl on claim "ckpt" in namespace default; jobs that have one there: old. Name one '
        "of the same claim, or leave checkpoint.from out to start with a new model"
    )


def test_no_such_uid(claim: Path) -> None:
    assert 'no checkpoint of job old with uid 00000009 on claim "ckpt"' in refusal(
        claim, {"job": "old", "uid": "00000009"}
    )


def test_no_such_step(claim: Path) -> None:
    assert refusal(claim, {"job": "old", "step": 25}) == (
        'checkpoint.from: job old (00000001) has no checkpoint of step 25 on claim "ckpt"; name one of 30, 20, 10, or leave step out'
    )


def test_a_job_without_a_complete_checkpoint(claim: Path) -> None:
    store.prepare(claim / "young-00000002", 10)
    assert refusal(claim, "young") == (
        'checkpoint.from: job young has no complete checkpoint on claim "ckpt"; start this job after its first one, or leave '
        "checkpoint.from out"
    )


def test_another_namespace_on_the_same_volume(claim: Path) -> None:
    save(claim, "theirs-00000005", 10, namespace="them")
    assert refusal(claim, "theirs").startswith(
        'checkpoint.from: the checkpoints of job theirs on claim "ckpt" are of namespace them; a job starts from one of its own namespace'
    )


def test_a_torn_newest_one_is_passed_over_and_named(claim: Path) -> None:
    (claim / "old-00000001" / "step-00000030" / "state-1.safetensors").write_bytes(b"torn")
    found = taken(claim, "old")
    assert value_of(found) == (20, 20.0)
    said = found.describe(config_of("new", "old")) or ""
    assert re.fullmatch(r"Begins with .*, step 20; skipped: step-00000030 \(state-1.safetensors is damaged: .*\)", said)


def test_a_torn_one_that_was_named_is_refused(claim: Path) -> None:
    (claim / "old-00000001" / "step-00000030" / "state-1.safetensors").unlink()
    assert refusal(claim, {"job": "old", "step": 30}) == (
        'checkpoint.from: no checkpoint of job old (00000001) on claim "ckpt" can be used: step-00000030 (state-1.safetensors is missing); '
        "name another job, another step, or leave checkpoint.from out to start with a new model"
    )


def test_a_job_of_which_none_holds_is_refused_and_an_older_one_is_not_taken(claim: Path) -> None:
    (save(claim, "old-00000002", 50) / NAME).write_text("{")
    save(claim, "old-00000003", 60)
    (claim / "old-00000003" / "step-00000060" / "state-1.safetensors").write_bytes(b"")
    assert "no checkpoint of job old (00000003)" in refusal(claim, "old")


def test_a_newer_format_is_refused_and_no_older_one_taken(claim: Path) -> None:
    file = claim / "old-00000001" / "step-00000030" / NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 4}))
    assert refusal(claim, "old").startswith(
        "checkpoint.from: checkpoint step-00000030 was written by a later version of the trainer: its format is 4"
    )
    assert value_of(taken(claim, {"job": "old", "step": 20})) == (20, 20.0), "one of its steps may be named"


def test_a_manifest_that_names_no_tensors_is_passed_over(claim: Path) -> None:
    folder = claim / "old-00000001" / "step-00000030"
    store.write_manifest(folder, store.manifest_of(folder).model_copy(update={"tensors": {}}))
    assert value_of(taken(claim, "old")) == (20, 20.0)


def test_a_volume_that_is_full_is_no_mistake_of_the_user(claim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "write", full)
    with pytest.raises(store.Unreadable, match=r"cannot be taken over to .*: \[Errno 28\] No space left"):
        taken(claim, "old")
    assert list((claim / "new-99999999").iterdir()) == []


def test_a_model_that_fits_in_part_is_refused_by_a_few_names_and_a_count(claim: Path) -> None:
    found = taken(claim, "old")
    assert found.start is not None
    model = nn.Sequential(nn.Linear(3, 4), *(nn.Linear(1, 1) for _ in range(4)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WrongInput) as refused:
        by_name.load_model(found.start.folder, model, source=found.start.of)
    assert str(refused.value) == (
        "trainer.model: the model of job old, step 30, fits only in part: not there: 2.weight, 2.bias, 3.weight, 3.bias, 4.weight, and 1 "
        "more; not in trainer.model: 1.num_batches_tracked, 1.running_mean, 1.running_var; of another form: 0.weight (F32 [2, 3] there, "
        "F32 [4, 3] here), 0.bias (F32 [2] there, F32 [4] here), 1.weight (F32 [2] there, F32 [1, 1] here), 1.bias (F32 [2] there, "
        "F32 [1] here). Make names, shapes and types the same, or leave checkpoint.from out"
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
