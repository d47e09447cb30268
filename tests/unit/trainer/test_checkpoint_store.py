"""A checkpoint counts when its manifest and every digest hold; which ones do not is said, and why."""

import json
import logging
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from configs import config_of
from disttrain.api import digests
from disttrain.api.digested import with_digest
from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import atomic, retention, store
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.checkpoint.resuming import misfit
from disttrain_trainer.data.schedule import DataSet
from disttrain_trainer.errors import WrongInput

DATA = DataSet(96)
"""3 steps an epoch, since 32 samples are a batch."""


def make_config(*, attempt: int = 1, workers: int = 1, servers: int = 0, **trainer: Any) -> JobConfig:
    spec: dict[str, Any] = {"strategy": {"type": "DataParallel"}, "worker": {"replicas": workers}}
    if servers:
        strategy = {"type": "ParameterServer", "parameterServer": {"consistency": "Sync"}}
        spec |= {"strategy": strategy, "parameterServer": {"replicas": servers}}
    factories = {"model": "m:m", "dataset": "m:d", "optimizer": {"name": "SGD", "learningRate": 0.1}}
    return config_of(spec | {"trainer": factories | {"maxSteps": 9, "batchSize": 32} | trainer}, attempt=attempt)


@pytest.fixture(autouse=True)
def _log_to_caplog(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def write(
    root: Path,
    step: int,
    content: str = "state",
    *,
    keep: int | None = None,
    algorithm: str = digests.XXH3,
    **trainer: Any,
) -> Path:
    """A checkpoint of one file, `state`, or `state.<content>` of another content. keep: prune afterwards, as a job does."""
    folder = store.prepare(root, step)
    file = folder / ("state" if content == "state" else f"state.{content}")
    file.write_text(content)
    manifest = publish(folder, step, {file.name: digests.of(file, like=algorithm)}, **trainer)
    if keep is not None:
        retention.prune(folder, manifest, keep=keep)
    return folder


def publish(
    folder: Path,
    step: int,
    files: dict[str, str],
    *,
    finished: bool = False,
    evaluation: dict[str, float] | None = None,
    **trainer: Any,
) -> Manifest:
    return store.publish(
        folder,
        config=make_config(**trainer),
        step=step,
        parts=step,
        data=DATA,
        files=files,
        finished=finished,
        evaluation=evaluation,
    )


def replaced_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in root.iterdir())


def newest_step(root: Path, **trainer: Any) -> int | None:
    found = store.newest(root, make_config(**trainer)).checkpoint
    return found.manifest.step if found else None


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "nowhere") is None


def test_the_newest_is_taken(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        write(tmp_path, step)
    assert newest_step(tmp_path) == 100


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(
            lambda f: (f / "manifest.json").unlink(), "it has no manifest.json: it was not completed", id="no manifest"
        ),
        pytest.param(lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged", id="half a manifest"),
        pytest.param(lambda f: (f / "state").unlink(), "state is missing", id="missing file"),
        pytest.param(lambda f: replaced_by_a_folder(f / "state"), "state is damaged: it is a folder", id="folder"),
        pytest.param(
            lambda f: replaced_by_a_folder(f / "manifest.json"),
            "manifest.json is damaged: it is a folder",
            id="folder 2",
        ),
        pytest.param(
            lambda f: (f / "state").write_text("stale"), "state is damaged: its digest is", id="other content"
        ),
    ],
)
def test_a_damaged_one_is_skipped_and_the_reason_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, said: str
) -> None:
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    assert newest_step(tmp_path) == 1
    assert "step-00000002 is skipped" in caplog.text
    assert said in caplog.text


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"optimizer": {"name": "SGD", "learningRate": 0.2}}, id="learning rate"),
        pytest.param({"optimizer": {"name": "SGD", "learningRate": 0.1, "weightDecay": 0.1}}, id="weight decay"),
        pytest.param({"loss": "m:other"}, id="loss"),
        pytest.param({"config": {"dropout": 0.5}}, id="config"),
        pytest.param({"model": "renamed:m", "dataset": "renamed:d"}, id="names of the factories"),
        pytest.param({"evaluate": "m:e"}, id="evaluate"),
        pytest.param({"collate": "m:c"}, id="collate"),
        pytest.param({"deterministic": True, "backend": "gloo"}, id="how it is computed"),
        pytest.param({"maxSteps": 90}, id="more steps"),
        pytest.param({"workers": 3, "partsPerStep": 1}, id="workers"),
    ],
)
def test_what_shapes_neither_state_nor_data_may_change(tmp_path: Path, changed: dict[str, Any]) -> None:
    write(tmp_path, 1)
    assert newest_step(tmp_path, **changed) == 1


SGD = {"name": "SGD", "learningRate": 0.1}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batchSize": 16}, "trainer.batchSize: 32 then, 16 now"),
        ({"seed": 1}, "trainer.seed: 0 then, 1 now"),
        ({"partsPerStep": 3}, "trainer.partsPerStep: 1 then, 3 now"),
        ({"workers": 3}, "trainer.partsPerStep: 1 then, 3 now"),
        ({"lastBatch": "Drop"}, 'trainer.lastBatch: "Keep" then, "Drop" now'),
        ({"optimizer": {**SGD, "name": "Adam"}}, 'trainer.optimizer.name: "SGD" then, "Adam" now'),
        ({"optimizer": {**SGD, "momentum": 0.9}}, 'trainer.optimizer.momentum: "not set" then, "set" now'),
        ({"servers": 2}, 'strategy.type: "DataParallel" then, "ParameterServer" now'),
    ],
)
def test_what_shapes_the_state_or_numbers_the_data_is_refused_by_name_and_nothing_is_lost(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    write(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(WrongInput) as refused:
        newest_step(tmp_path, **changed)
    assert f"checkpoint step-00000001 is of another training: {message}" in str(refused.value)
    with pytest.raises(WrongInput, match="of another training"):
        write(tmp_path, 1, "new", **changed)
    assert {path: path.read_bytes() for path in before} == before


def test_another_number_of_servers_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1, servers=2)
    assert newest_step(tmp_path, servers=2) == 1
    with pytest.raises(WrongInput, match=r"parameterServer\.replicas: 2 then, 3 now"):
        newest_step(tmp_path, servers=3)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (DataSet(97), "samples of trainer.dataset: 96 then, 97 now"),
        (DataSet(95), "samples of trainer.dataset: 96 then, 95 now"),
        (DataSet(96, "new"), 'fingerprint of trainer.dataset: "old" then, "new" now'),
        (
            DataSet(96, "old", "packed"),
            'order of trainer.dataset: "feistel-8" then, "packed" now. Another version of the trainer',
        ),
        (DataSet(96, "old"), None),
        (DataSet(96), None),
    ],
)
def test_a_data_set_that_has_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: DataSet, message: str | None
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "DATA", DataSet(96, "old"))
    write(tmp_path, 1)
    if message is None:
        assert store.newest(tmp_path, make_config(), now).checkpoint is not None
        return
    with pytest.raises(WrongInput) as refused:
        store.newest(tmp_path, make_config(), now)
    assert message in str(refused.value)


def edit(manifest: Path, **changes: Any) -> None:
    """Changes a manifest as another version would have written it."""
    content = json.loads(manifest.read_text())
    del content["digest"]
    manifest.write_text(with_digest(json.dumps(content | changes)))


def test_no_bit_of_a_manifest_flips_without_being_found(tmp_path: Path) -> None:
    write(tmp_path, 1)
    manifest = write(tmp_path, 12) / "manifest.json"
    whole = manifest.read_bytes()
    for at in range(0, len(whole) - 90, 7):  # the end is the digest itself
        manifest.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert newest_step(tmp_path) == 1, at
    manifest.write_bytes(whole)
    assert newest_step(tmp_path) == 12


@pytest.mark.parametrize(("number", "version"), [(1, "an earlier"), (4, "a later")])
def test_a_checkpoint_of_another_format_is_refused_and_not_taken_for_a_damaged_one(
    tmp_path: Path, number: int, version: str
) -> None:
    manifest = write(tmp_path, 1) / "manifest.json"
    edit(manifest, format=number)
    text = manifest.read_text()
    wrote = f"checkpoint step-00000001 was written by {version} version of the trainer"
    error = f"{wrote}: its format is {number}, and this version reads 2 and 3; "
    with pytest.raises(WrongInput, match=re.escape(error + "go on with that version")):
        newest_step(tmp_path)
    with pytest.raises(WrongInput, match=re.escape(error)):
        write(tmp_path, 1, "new")
    assert manifest.read_text() == text


def test_a_checkpoint_of_format_2_whose_digests_are_sha256_is_read_and_its_damage_found(tmp_path: Path) -> None:
    for step in (1, 2):
        edit(write(tmp_path, step, algorithm=digests.SHA256) / "manifest.json", format=2)
    assert newest_step(tmp_path) == 2
    (tmp_path / "step-00000002" / "state").write_text("stale")
    assert newest_step(tmp_path) == 1


def test_a_digest_of_an_algorithm_that_is_not_known_does_not_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(write(tmp_path, 1) / "manifest.json", files={"state": "md9:00"})
    assert newest_step(tmp_path) is None
    assert "state is damaged: its digest is of md9, which this version does not know" in caplog.text


def test_a_checkpoint_that_names_no_order_is_of_another_one_and_refused(tmp_path: Path) -> None:
    """Its samples were numbered by a shuffled table: to go on in the middle of its epoch would repeat some, and skip others."""
    manifest = write(tmp_path, 1) / "manifest.json"
    written = json.loads(manifest.read_text())
    del written["data"]["order of trainer.dataset"]
    manifest.write_text(json.dumps(written))
    error = 'step-00000001 is of another training: order of trainer.dataset: "table" then, "feistel-8" now. Another version of the trainer'
    with pytest.raises(WrongInput, match=error):
        store.newest(tmp_path, make_config(), DATA)


def test_a_checkpoint_from_before_local_steps_existed_is_of_one_step_and_goes_on_with_no_others(tmp_path: Path) -> None:
    """The momentum in it is of gradients: the outer optimiser must not take it for its own."""
    key = "strategy.parameterServer.localSteps"
    manifest = write(tmp_path, 1) / "manifest.json"
    written = json.loads(manifest.read_text())
    del written["state"][key]
    manifest.write_text(json.dumps(written))
    assert newest_step(tmp_path) == 1
    assert misfit(Manifest.read(manifest.read_text()).state, {key: "above 1"}) == f'{key}: "1" then, "above 1" now'


def test_fields_that_a_later_version_adds_do_no_harm(tmp_path: Path) -> None:
    edit(write(tmp_path, 1) / "manifest.json", added={"later": 1})
    assert newest_step(tmp_path) == 1


def test_where_a_job_begins_is_reported_with_what_has_changed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    now = make_config(attempt=2, optimizer={"name": "SGD", "learningRate": 0.01}, maxSteps=20)
    message = store.newest(tmp_path, now).describe(now)
    changed = "trainer.maxSteps: 9 -> 20, trainer.optimizer.learningRate: 0.1 -> 0.01"
    assert message == f"Resumed at step 1; changed: {changed}"
    same = make_config(attempt=2)
    assert store.newest(tmp_path, same).describe(same) == "Resumed at step 1"


def test_a_new_master_of_the_same_attempt_knows_where_it_began(tmp_path: Path) -> None:
    folder = store.prepare(tmp_path, 2)
    message = 'Resumed at step 1; changed: trainer.loss: none -> "m:l"'
    config = make_config(attempt=2)
    store.publish(folder, config=config, step=2, parts=2, data=DATA, files={}, resumed=message)
    assert store.newest(tmp_path, config).describe(config) == message
    later = make_config(attempt=3)
    assert store.newest(tmp_path, later).describe(later) == "Resumed at step 2"


def test_nothing_is_reported_of_a_plain_start_nor_of_a_server_that_comes_back(tmp_path: Path) -> None:
    assert store.newest(tmp_path, make_config()).describe(make_config()) is None
    write(tmp_path, 1)
    assert store.newest(tmp_path, make_config()).describe(make_config()) is None


def test_a_start_at_step_0_beside_damaged_checkpoints_is_reported_with_the_damage(tmp_path: Path) -> None:
    for step in (1, 2):
        (write(tmp_path, step) / "state").write_text("damaged")
    config = make_config(attempt=2)
    message = store.newest(tmp_path, config).describe(config)
    assert message is not None
    assert message.startswith(
        "Begins at step 0: no checkpoint in its folder can be used: step-00000002 (state is damaged"
    )
    assert "step-00000001 (state is damaged" in message


def test_a_checkpoint_that_was_left_out_is_reported(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / "state").write_text("damaged")
    config = make_config(attempt=2)
    message = store.newest(tmp_path, config).describe(config)
    assert message is not None
    assert message.startswith("Resumed at step 1; skipped: step-00000002 (state is damaged")


def test_a_volume_that_cannot_be_read_is_no_start_at_step_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def stale(path: Path, *, like: str) -> str:
        raise OSError(116, "Stale file handle", str(path))

    monkeypatch.setattr(digests, "of", stale)
    with pytest.raises(store.Unreadable, match="Stale file handle") as raised:
        newest_step(tmp_path)
    assert raised.value.exit_code == 134


def test_a_job_may_be_trained_for_longer(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert newest_step(tmp_path, maxSteps=90) == 1


@pytest.mark.parametrize(
    ("length", "finished"),
    [
        pytest.param({"maxSteps": 9}, True, id="as long"),
        pytest.param({"maxSteps": 8}, True, id="shorter"),
        pytest.param({"maxSteps": 10}, False, id="longer"),
        pytest.param({"maxSteps": None, "epochs": 3}, True, id="as long in epochs"),
        pytest.param({"maxSteps": None, "epochs": 4}, False, id="longer in epochs"),
    ],
)
def test_a_finished_checkpoint_ends_no_job_that_is_to_train_for_longer_now(
    tmp_path: Path, length: dict[str, Any], finished: bool
) -> None:
    folder = store.prepare(tmp_path, 9)
    publish(folder, 9, {}, finished=True, evaluation={"accuracy": 0.5})
    found = store.newest(tmp_path, make_config(**length)).checkpoint
    assert found is not None
    assert found.manifest.step == 9
    assert found.manifest.finished is finished
    assert found.manifest.evaluation == ({"accuracy": 0.5} if finished else None)


def test_an_evaluation_that_is_not_finite_leaves_the_checkpoint_readable(tmp_path: Path) -> None:
    folder = store.prepare(tmp_path, 9)
    publish(folder, 9, {}, finished=True, evaluation={"perplexity": math.inf, "loss": math.nan})
    found = store.newest(tmp_path, make_config()).checkpoint
    assert found is not None
    assert found.manifest.evaluation is not None
    assert found.manifest.evaluation["perplexity"] == math.inf
    assert math.isnan(found.manifest.evaluation["loss"])


def test_a_checkpoint_that_is_written_again_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    write(tmp_path, 1, "first")
    folder = store.prepare(tmp_path, 1)
    (folder / "state.second").write_text("half")
    assert newest_step(tmp_path) == 1


def test_a_new_folder_is_on_the_disk_when_its_checkpoint_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(atomic, "sync_folder", synced.append)
    folder = write(tmp_path, 1)
    assert synced == [folder, tmp_path]


def test_pruning_keeps_the_newest_and_what_is_being_written(tmp_path: Path) -> None:
    for step in (1, 3):
        write(tmp_path, step)
    for step in (2, 5):
        store.prepare(tmp_path, step)
    write(tmp_path, 4, keep=2)
    assert steps_in(tmp_path) == [3, 4, 5]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_just_written_stays_though_a_damaged_one_of_a_later_step_is_there(tmp_path: Path, keep: int) -> None:
    write(tmp_path, 100)
    (write(tmp_path, 200) / "state").write_text("damaged")
    for step in (140, 180):
        write(tmp_path, step, keep=keep)
        assert newest_step(tmp_path) == step
    assert steps_in(tmp_path) == ([180, 200] if keep == 1 else [140, 180, 200])
    write(tmp_path, 220, keep=keep)
    assert 220 in steps_in(tmp_path)


def test_a_manifest_that_cannot_be_read_neither_counts_nor_goes(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    (tmp_path / "step-00000002" / "manifest.json").write_text("{")
    for step in (3, 4):
        write(tmp_path, step, keep=2)
    assert steps_in(tmp_path) == [2, 3, 4]


def test_a_damaged_checkpoint_that_is_replaced_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1)
    write(tmp_path, 1)
    assert "replaced" not in caplog.text
    (tmp_path / "step-00000001" / "manifest.json").write_text("{")
    write(tmp_path, 1)
    assert "step-00000001 is damaged and will be replaced" in caplog.text


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    late = 10**8
    for step in (late - 2, late - 1, late):
        write(tmp_path, step, keep=2)
        assert newest_step(tmp_path) == step
    assert steps_in(tmp_path) == [late - 1, late]


def test_what_older_saves_left_behind_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    older = write(tmp_path, 1)
    (older / "state.of-a-save-that-was-given-up").write_text("late")
    again = write(tmp_path, 2, "first")
    (again / ".state.tmp").write_text("half")
    write(tmp_path, 2, "second", keep=2)
    assert sorted(path.name for path in older.iterdir()) == ["manifest.json", "state"]
    assert sorted(path.name for path in again.iterdir()) == ["manifest.json", "state.second"]


def test_what_cannot_be_removed_does_not_undo_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "step-00000001").write_text("no folder")
    write(tmp_path, 2, keep=1)
    assert newest_step(tmp_path) == 2
    assert "step-00000001 could not be removed" in caplog.text
