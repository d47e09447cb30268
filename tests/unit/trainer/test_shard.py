"""A shard's arithmetic, its versions, and its file."""

import json
import os
import random
import resource
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from disttrain.api import digests
from disttrain.api.optimizer import Optimizer as Settings
from disttrain_trainer.checkpoint.background import HostCopy
from disttrain_trainer.data.index_set import IndexSet
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model.flat import Layout, bytes_of
from disttrain_trainer.parameter_server import shard as shard_module
from disttrain_trainer.parameter_server.optimizer import PADDING, Optimizer
from disttrain_trainer.parameter_server.shard import Buffers, Shard
from disttrain_trainer.parameter_server.shard_file import ShardFile
from disttrain_trainer.parameter_server.sum_tree import SumTree

SGD = {"name": "SGD", "learningRate": 0.1}
ADAM = {"name": "Adam", "learningRate": 0.01}


def make_shard(
    length: int = 1000,
    *,
    optimizer: dict[str, str] = ADAM,
    history: bool = True,
    dtype: torch.dtype = torch.float32,
    server: int = 0,
    servers: int = 1,
) -> Shard:
    layout = Layout.of(nn.ParameterList([torch.zeros(length, dtype=dtype)]))
    shard = Shard(
        layout=layout,
        server=server,
        servers=servers,
        optimizer=Optimizer(Settings.model_validate(optimizer)),
        history=history,
    )
    shard.initialize(filled(shard, 0))
    return shard


def filled(shard: Shard, seed: int) -> Buffers:
    buffers = shard.take()
    for part, span in zip(buffers.parts, shard.spans, strict=True):
        values = torch.randn(shard.layout.vectors[0].length, generator=torch.Generator().manual_seed(seed))
        part[: span.length] = values[span.start : span.stop]
    return buffers


def push(
    shard: Shard, part: int, gradient: Buffers, weight: float = 1.0, *, tree: SumTree | None = None, last: bool = True
) -> None:
    """The gradient of a part of a step arrives; without a tree it is the only one."""
    shard.hold(part, gradient, weight)
    shard.absorb(tree.arrive(part) if tree else [], update=(0 if tree else part) if last else None)


def step_with(shard: Shard, seed: int) -> None:
    push(shard, 0, filled(shard, seed))


def values(shard: Shard) -> torch.Tensor:
    buffers = shard.acquire(None)
    try:
        return buffers.parts[0][: shard.spans[0].length].clone()
    finally:
        shard.release(buffers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize(
    "optimizer", [SGD, {**SGD, "momentum": 0.9}, ADAM, {**ADAM, "name": "AdamW", "weightDecay": 0.1}]
)
def test_cutting_a_shard_anywhere_changes_not_a_bit(
    dtype: torch.dtype, history: bool, optimizer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = 128 * PADDING
    monkeypatch.setattr(shard_module, "BLOCK", block)
    length = 2 * block + 777
    results = []
    for servers in (1, 2, 3, 7):
        parts = []
        for server in range(servers):
            shard = make_shard(
                length, optimizer=optimizer, history=history, dtype=dtype, server=server, servers=servers
            )
            for step in range(3):
                tree = SumTree(2)
                push(shard, 0, filled(shard, 2 * step + 1), 0.25, tree=tree, last=False)
                push(shard, 1, filled(shard, 2 * step + 2), 0.75, tree=tree)
            parts.append(values(shard))
        results.append(torch.cat(parts))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_the_version_before_stays_readable_and_a_slow_reader_keeps_older_ones_whole() -> None:
    shard = make_shard(optimizer=SGD)
    seen = [values(shard)]
    slow = shard.acquire(0)
    for step in range(4):
        step_with(shard, step)
        seen.append(values(shard))
    previous = shard.acquire(3)
    assert torch.equal(previous.parts[0][:1000], seen[3])
    assert torch.equal(slow.parts[0][:1000], seen[0]), "its memory is not used again while it is read"
    assert shard.acquire(2).version == 4, "what is gone is answered with what is current"


def test_memory_does_not_grow_with_steps() -> None:
    shard, seen = make_shard(), list[Buffers]()
    for step in range(50):
        tree = SumTree(2)
        for part, value in ((step % 2, step), (1 - step % 2, step + 1)):
            seen.append(filled(shard, value))
            push(shard, part, seen[-1], 0.5, tree=tree, last=value > step)
        seen.append(shard.acquire(None))
        shard.release(seen[-1])
    # The current and the previous version are held; free are two gradients, and one version to write the next into.
    assert len(set(seen)) <= 5


def master(shard: Shard) -> torch.Tensor:
    return shard.snapshot(IndexSet(), HostCopy()).tensors["0.master"]


def test_gradients_of_16_bits_are_summed_in_32() -> None:
    shard = make_shard(100, optimizer={"name": "SGD", "learningRate": 1}, dtype=torch.bfloat16)
    ones = [shard.take() for _ in range(512)]
    for buffers in ones:
        buffers.parts[0].fill_(1)
    before = master(shard)
    tree = SumTree(len(ones))
    for part, buffers in enumerate(ones):
        push(shard, part, buffers, tree=tree, last=buffers is ones[-1])
    # In bfloat16, 256 + 1 is 256.
    assert torch.equal(before - master(shard), torch.full_like(before, 512))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [SGD, {**SGD, "weightDecay": 0.1}, {**SGD, "momentum": 0.9}, ADAM])
@pytest.mark.parametrize(
    "weights",
    [
        (1 / 3, 1 / 3, 1 / 3),
        (0.4, 0.4, 0.2),
        (0.2, 0.4, 0.4),
        (1.0, 0.5, 0.5),
        (1 / 6,) * 6,
        (0.1, 0.1, 0.2, 0.3, 0.1, 0.1, 0.1),
    ],
)
def test_a_sum_is_the_weighted_one_and_bitwise_the_same_however_its_gradients_arrive(
    dtype: torch.dtype, optimizer: dict[str, str], weights: tuple[float, ...]
) -> None:
    in_order, reversed_, shuffled, summed_before = (make_shard(dtype=dtype, optimizer=optimizer) for _ in range(4))
    for step in range(3):
        parts = list(range(len(weights)))
        for shard, order in (
            (in_order, parts),
            (reversed_, parts[::-1]),
            (shuffled, random.Random(step).sample(parts, len(parts))),
        ):
            tree = SumTree(len(weights))
            for part in order:
                gradient = filled(shard, 10 * step + part)
                push(shard, part, gradient, weights[part], tree=tree, last=part == order[-1])
        total = summed_before.take()
        gradients = [filled(summed_before, 10 * step + part).parts[0].double() for part in parts]
        total.parts[0].copy_(sum(weight * gradient for gradient, weight in zip(gradients, weights, strict=True)))
        push(summed_before, 0, total)
    assert torch.equal(values(in_order), values(reversed_))
    assert torch.equal(values(in_order), values(shuffled))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(values(in_order), values(summed_before), atol=tolerance, rtol=tolerance)


def test_a_part_without_samples_changes_nothing_in_the_sum() -> None:
    with_gap, without = make_shard(), make_shard()
    for shard, parts, count in ((with_gap, (0, 2), 3), (without, (0, 1), 2)):
        tree = SumTree(count)
        for number, part in enumerate(parts):
            push(shard, part, filled(shard, number), 0.5, tree=tree, last=False)
        shard.absorb(tree.arrive(1) if count == 3 else [], update=0)
    assert torch.equal(values(with_gap), values(without))


@pytest.mark.parametrize("history", [True, False])
def test_a_sum_of_nothing_is_no_step_and_with_history_a_version_of_the_same_values(history: bool) -> None:
    shard = make_shard(history=history)
    before = values(shard)
    shard.absorb([], update=0)
    assert shard.version == int(history)
    assert torch.equal(values(shard), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_saved_shard_goes_on_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "deep" / "shard-0.safetensors"
    shard = make_shard(dtype=dtype)
    for step in range(5):
        step_with(shard, step)
    digest = shard.snapshot(IndexSet(range(10)), HostCopy()).save(path)
    other = make_shard(dtype=dtype)
    file = ShardFile.load(path)
    other.restore(file)
    assert (file.version, file.applied.intervals(), other.version) == (5, [(0, 10)], 5)
    assert digest == digests.of(path, like=digest)
    for step in range(5, 9):
        for each in (shard, other):
            step_with(each, step)
        assert torch.equal(values(shard), values(other))
    assert [p.name for p in path.parent.iterdir()] == ["shard-0.safetensors"], "no temporary file stays"


def test_a_snapshot_is_not_changed_by_what_comes_after_it() -> None:
    shard = make_shard(history=False)
    snapshot = shard.snapshot(IndexSet(), HostCopy())
    before = snapshot.tensors["0.parameters"].clone()
    step_with(shard, 1)
    assert torch.equal(snapshot.tensors["0.parameters"], before)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def damage_garbage(path: Path) -> None:
    path.write_bytes(os.urandom(500))


def damage_other_format(path: Path) -> None:
    save_file({"a": torch.zeros(3)}, path)


def damage_metadata(path: Path) -> None:
    save_file(load_file(path), path, metadata={"format": "disttrain-shard-1", "layout": json.dumps({})})


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_flip, damage_garbage, damage_other_format, damage_metadata, Path.unlink]
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage) -> None:
    path = tmp_path / "shard-0.safetensors"
    digest = make_shard().snapshot(IndexSet(), HostCopy()).save(path)
    assert ShardFile.load(path, digest).version == 0
    damage(path)
    with pytest.raises(WrongInput, match=r"shard-0\.safetensors"):
        ShardFile.load(path, digest)
    if damage is not damage_flip:
        with pytest.raises(WrongInput, match=r"shard-0\.safetensors"):
            ShardFile.load(path)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        pytest.param({"length": 999}, "another model", id="another model"),
        pytest.param({"optimizer": SGD}, "trained with Adam; the job names SGD", id="another optimiser"),
        pytest.param({"servers": 2}, "number 0 of 1; this is server 0 of 2", id="another cut"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_difference(other: dict, reason: str) -> None:
    with pytest.raises(WrongInput, match=reason):
        make_shard(**other).restore(make_shard().snapshot(IndexSet(), HostCopy()))


def test_momentum_cannot_be_made_up_when_the_file_has_none() -> None:
    with pytest.raises(WrongInput, match="no momentum"):
        make_shard(optimizer={**SGD, "momentum": 0.9}).restore(
            make_shard(optimizer=SGD).snapshot(IndexSet(), HostCopy())
        )


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard-0.safetensors"
    file = make_shard().snapshot(IndexSet(), HostCopy())
    file.save(path)
    before = path.read_bytes()

    def full(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        file.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_buffers_of_a_shard_with_nothing_are_empty() -> None:
    shard = make_shard(3, server=1, servers=5)
    assert shard.nbytes == 0
    push(shard, 0, shard.take())
    assert shard.version == 1
    assert len(bytes_of(shard.acquire(None).parts[0])) == 0


def test_a_volume_that_is_full_is_an_error_of_the_system_and_leaves_nothing(tmp_path: Path) -> None:
    file = make_shard().snapshot(IndexSet(), HostCopy())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # no file of this process grows beyond it
    try:
        with pytest.raises(OSError, match="large"):
            file.save(tmp_path / "shard")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
