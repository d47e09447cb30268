"""The checkpoints of one rank of a sharded model, over the end of a round; and the model of another job that it starts with."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs import config_of
from disttrain.api.mesh import Coordinate, Mesh
from disttrain.api.names import MODEL_FILE, Role
from disttrain.api.runtime import JobConfig
from disttrain_trainer.checkpoint import final, store
from disttrain_trainer.checkpoint.manifest import Manifest
from disttrain_trainer.checkpoint.tensor_file import Named
from disttrain_trainer.data.schedule import DataSet
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.examples import digits
from disttrain_trainer.loop import meter
from disttrain_trainer.model.flat import described
from disttrain_trainer.model.objective import cross_entropy
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.net.messages import MessageType
from disttrain_trainer.parallel.compose import ParallelContext, compose
from disttrain_trainer.parallel.shard_optimizer import ShardOptimizer
from disttrain_trainer.parallel.shard_state import ShardState
from disttrain_trainer.parallel.sharded_model import ShardedModel
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies.rank import RoundEnded
from disttrain_trainer.strategies.shard_checkpoints import ShardCheckpoints, Writers
from disttrain_trainer.strategies.sharded import ShardedWorker
from unit.trainer.test_checkpoint_origin import save

MODULE = "disttrain_trainer.examples.digits"
AT = Coordinate(pipeline=0, replicate=0, shard=0, tensor=0)


def sharded(checkpoint: dict[str, object], *, name: str = "new") -> JobConfig:
    strategy = {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}}
    names = {"model": f"{MODULE}:model", "dataset": f"{MODULE}:dataset"}
    trainer = names | {"optimizer": {"name": "SGD", "learningRate": 0.1}, "maxSteps": 9, "batchSize": 32}
    volume = {"volume": {"persistentVolumeClaim": "claim"}}
    return config_of({"strategy": strategy, "trainer": trainer, "checkpoint": volume | checkpoint}, name=name)


def control_of(process: Process) -> ControlClient:
    return ControlClient(process=process, describe=dict, on_message=lambda message: None, on_released=lambda: None)


class Rank:
    """One that writes alone, in a group all the same; its volume waits for `go`."""

    def __init__(self, root: Path) -> None:
        self.config = sharded({"keep": 1}, name="old")
        process = Process(config=self.config, role=Role.WORKER, index=0)
        self.member = CollectiveMember()
        self.go = threading.Event()
        self.checkpoints = ShardCheckpoints(
            config=self.config,
            rank=0,
            root=root,
            keep=1,
            metrics=Metrics(process),
            control=control_of(process),
            member=self.member,
            data=DataSet(96),
            lasting=True,
        )
        self.alive = True

    def begin(self, group: dist.ProcessGroup | None) -> None:
        module = digits.model({})
        layout, go = described(module), self.go
        place = ParallelContext(
            config=self.config, mesh=Mesh(), at=AT, groups=None, loss=cross_entropy, device=torch.device("cpu")
        )
        model = ShardedModel(compose(module, place), layout=layout, at=AT)
        optimizer = ShardOptimizer(self.config.trainer.loop.optimizer, model)

        class Slow(ShardState):
            def write(self, path: Path, copy: Named) -> str:
                assert go.wait(10)
                return super().write(path, copy)

        self.model = model
        state = Slow(model, optimizer, layout, keeps_buffers=True)
        self.checkpoints.begin(model, state, Writers(ranks=(0,), group=group, alive=lambda: self.alive))

    def save(self, step: int) -> None:
        self.member.step = step
        self.checkpoints.save(at_once=False)


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = dist.new_group([0])
    assert isinstance(made, dist.ProcessGroup)
    yield made
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_checkpoint_that_the_end_of_its_round_overtakes_is_abandoned_and_the_next_round_saves(
    tmp_path: Path, group: dist.ProcessGroup
) -> None:
    rank = Rank(tmp_path)
    rank.begin(group)
    rank.save(10)
    rank.alive = False
    dist.destroy_process_group()
    rank.go.set()
    rank.checkpoints.end()
    assert rank.member.checkpoint is None
    rank.alive = True
    rank.begin(None)
    rank.checkpoints.check()
    rank.save(20)
    rank.checkpoints.end()
    assert rank.member.checkpoint == 20


def test_parameters_that_are_not_finite_are_what_a_roll_back_is_for_as_with_whole_models(tmp_path: Path) -> None:
    rank = Rank(tmp_path)
    rank.begin(None)
    with torch.no_grad():
        next(rank.model.module.parameters()).fill_(torch.nan)
    with pytest.raises(meter.NonFinite, match="a parameter is not finite at step 6") as raised:
        rank.save(6)
    assert raised.value.step == 5


def worker_of(
    config: JobConfig,
    root: Path,
    member: CollectiveMember,
    *,
    control: ControlClient | None = None,
    model_dir: Path | None = None,
) -> ShardedWorker:
    process = Process(config=config, role=Role.WORKER, index=0, checkpoint_dir=root, model_dir=model_dir)
    control = control or control_of(process)
    return ShardedWorker(process=process, metrics=Metrics(process), control=control, member=member)


def test_a_rank_leaves_a_round_when_it_knows_of_all_that_was_written_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, write = CollectiveMember(), ShardState.write
    worker = worker_of(sharded({"keep": 1, "everySteps": 1}), tmp_path, member)
    worker.resume()
    ended = threading.Event()

    def ends_the_round(state: ShardState, path: Path, copy: Named) -> str:
        member.round = None
        ended.wait(0.2)  # the training thread sees it meanwhile
        return write(state, path, copy)

    monkeypatch.setattr(ShardState, "write", ends_the_round)
    member.round = this_round = Round(1, step=0)
    with pytest.raises(RoundEnded):
        worker.take_part_in(this_round)
    assert member.step >= 1
    assert member.checkpoint == member.step, "READY would name a checkpoint that the newest has replaced"
    assert [path.name for path in tmp_path.glob("step-*")] == [store.name_of(member.step)]


def test_a_model_of_another_job_that_fits_only_in_part_is_refused_before_it_is_cut(tmp_path: Path) -> None:
    save(tmp_path, "old-00000001", 30)
    worker = worker_of(sharded({"from": "old"}), tmp_path / "new-99999999", CollectiveMember())
    with pytest.raises(WrongInput, match=r"the model of job old, step 30, fits only in part: .*not in trainer.model: "):
        worker.resume()


def test_the_model_of_a_sharded_job_fits_another_one(tmp_path: Path) -> None:
    old = Rank(tmp_path / "old-00000001")
    old.go.set()
    old.begin(None)
    old.save(30)
    old.checkpoints.end()
    member = CollectiveMember()
    worker_of(sharded({"from": "old"}), tmp_path / "new-99999999", member).resume()
    assert member.checkpoint == 0


class Told(ControlClient):
    """A connection that keeps what it is to send, and calls `then` with it."""

    def __init__(self, then: Callable[[MessageType, dict[str, object]], None]) -> None:
        super().__init__(
            process=Process(config=sharded({}), role=Role.WORKER, index=0),
            describe=dict,
            on_message=lambda message: None,
            on_released=lambda: None,
        )
        self.said: list[tuple[MessageType, dict[str, object]]] = []
        self._then = then
        self.finished = True

    def send(self, kind: MessageType, **fields: object) -> bool:
        self.said.append((kind, fields))
        self._then(kind, fields)
        return True


def test_a_rank_that_is_to_leave_while_it_cannot_write_the_model_saves_no_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / MODEL_FILE).mkdir()
    member, written, write = CollectiveMember(), list[Path](), ShardState.write

    def count(state: ShardState, path: Path, copy: Named) -> str:
        written.append(path)
        return write(state, path, copy)

    def master(kind: MessageType, fields: dict[str, object]) -> None:
        if kind is MessageType.SAVED and not written[1:] and (tmp_path / MODEL_FILE).is_dir():
            if fields["asked"]:
                (tmp_path / MODEL_FILE).rmdir()
            else:
                member.save_asked = True

    monkeypatch.setattr(ShardState, "write", count)
    monkeypatch.setattr(final, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(final, "GIVE_UP_SECONDS", 5)
    control = Told(master)
    worker = worker_of(sharded({}), tmp_path, member, control=control, model_dir=tmp_path)
    worker.resume()
    member.round = this_round = Round(1, step=0)
    worker.take_part_in(this_round)
    assert [fields["asked"] for kind, fields in control.said if kind is MessageType.SAVED] == [False, True, False]
    assert len(written) == 1
    assert store.manifest_of(tmp_path / store.name_of(9)).finished


def test_a_step_whose_save_waits_for_the_one_before_is_reported_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported, write = threading.Event(), ShardState.write

    def wait(state: ShardState, path: Path, copy: Named) -> str:
        assert reported.wait(5)
        return write(state, path, copy)

    def master(kind: MessageType, fields: dict[str, object]) -> None:
        if kind is MessageType.REPORT and fields["step"] == 2:
            reported.set()

    monkeypatch.setattr(ShardState, "write", wait)
    monkeypatch.setattr(meter, "REPORT_INTERVAL_SECONDS", 3600)
    member = CollectiveMember()
    worker = worker_of(sharded({"everySteps": 1}), tmp_path, member, control=Told(master))
    worker.resume()
    member.round = this_round = Round(1, step=0)
    worker.take_part_in(this_round)
    assert store.manifest_of(tmp_path / store.name_of(9)).finished


def test_the_end_of_the_job_is_written_when_there_is_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, publish = list[bool](), store.publish

    def full_at_first(folder: Path, **fields: Any) -> Manifest:
        if fields["finished"]:
            tries.append(True)
            if len(tries) == 1:
                raise OSError(28, "No space left on device")
        return publish(folder, **fields)

    monkeypatch.setattr(store, "publish", full_at_first)
    monkeypatch.setattr(final, "RETRY_SECONDS", 0.01)
    member = CollectiveMember()
    worker = worker_of(sharded({}), tmp_path, member, control=Told(lambda kind, fields: None))
    worker.resume()
    member.round = this_round = Round(1, step=0)
    worker.take_part_in(this_round)
    assert len(tries) == 2
    assert store.manifest_of(tmp_path / store.name_of(9)).finished
