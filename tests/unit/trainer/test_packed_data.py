"""Packed data: what goes in comes out, what is damaged is named, and each sample comes once an epoch from few blocks."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from disttrain.api.digested import verified, with_digest
from disttrain_trainer.data import packed, packed_dataset
from disttrain_trainer.data.block_order import BlockOrder
from disttrain_trainer.data.pack_writer import BLOCK, write
from disttrain_trainer.data.packed_dataset import PackedDataset
from disttrain_trainer.data.sample_format import structure_of
from disttrain_trainer.data.store import Folder
from disttrain_trainer.errors import DataUnreadable, WrongInput

KEY = bytes(range(32))
PLANTED = b"a planted sample that must stay secret"


class Samples:
    """A map-style data set of what it is given."""

    def __init__(self, samples: list[Any]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Any:
        return self._samples[number]


def packed_of(
    folder: Path, samples: list[Any], *, key: bytes | None = None, partitions: int = 3, split: str = "train"
) -> PackedDataset:
    write(Samples(samples), folder / split, split=split, partitions=partitions, key=key, what="mine:dataset")
    return PackedDataset(folder / split, key)


def images(count: int) -> list[Any]:
    """Samples of which 16 fill a block."""
    return [(torch.full((BLOCK // 68,), float(number)), number) for number in range(count)]


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


KINDS: dict[str, Callable[[int], Any]] = {
    "a tuple of tensors": lambda i: (torch.randn(3, 4), torch.tensor(i)),
    "types that numpy does not have": lambda i: [torch.randn(2).bfloat16(), torch.randn(2).to(torch.float8_e5m2)],
    "a view": lambda i: torch.arange(12).reshape(3, 4).t(),
    "other shapes": lambda i: {"tokens": torch.arange(i % 5), "box": np.ones((i % 3, 2), np.float16)},
    "numpy": lambda i: (np.arange(4, dtype=">i2"), np.float32(i), np.datetime64(i, "D"), np.array(["x", "yz"])),
    "numbers": lambda i: {"int": i - 3, "float": i / 7, "yes": i % 2 == 0, "none": None},
    "text": lambda i: {"text": "ä\ud800" * i, "bytes": bytes(i), "nested": ((("deep",),), [])},
}


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_packed(tmp_path: Path, kind: str, key: bytes | None) -> None:
    samples = [KINDS[kind](number) for number in range(20)]
    dataset = packed_of(tmp_path, samples, key=key)
    assert len(dataset) == 20
    assert all(same(dataset[number], sample) for number, sample in enumerate(samples))
    assert same(dataset[-1], samples[-1])
    with pytest.raises(IndexError):
        dataset[20]


def test_a_sample_may_be_changed_by_who_has_it(tmp_path: Path) -> None:
    dataset = packed_of(tmp_path, [torch.zeros(3)] * 4)
    dataset[1].add_(1)
    assert torch.equal(dataset[1], torch.zeros(3))


@pytest.mark.parametrize("kind", ["a tuple of tensors", "types that numpy does not have", "a view"])
def test_a_batch_is_that_of_default_collate(tmp_path: Path, kind: str) -> None:
    samples = [KINDS[kind](number) for number in range(20)]
    numbers = np.array([17, 0, 3, 12, 0])
    assert same(packed_of(tmp_path, samples).batch(numbers), default_collate([samples[i] for i in numbers]))


def test_text_and_numbers_make_the_batch_of_default_collate_too(tmp_path: Path) -> None:
    samples = [{"text": str(i), "int": i, "float": i / 3, "yes": i > 2, "scalar": np.float32(i)} for i in range(9)]
    numbers = np.array([8, 1, 4])
    assert same(packed_of(tmp_path, samples).batch(numbers), default_collate([samples[i] for i in numbers]))


def test_samples_that_are_not_alike_make_no_batch_by_rows(tmp_path: Path) -> None:
    dataset = packed_of(tmp_path, [torch.zeros(i % 2) for i in range(9)])
    assert dataset.batch(np.array([0, 1])) is None


class Mine:
    pass


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ((torch.zeros(1), Mine()), "sample 1[1] is a "),
        ({"x": {"y": {1, 2}}}, "sample 1['x']['y'] is a set"),
        ({3: 1}, "sample 1 is a dict with the key 3"),
        (np.array([Mine()]), "sample 1 is a numpy array of object"),
        (torch.eye(2).to_sparse(), "sample 1 is a sparse_coo tensor of float32"),
        (1 << 70, "sample 1 is an int of more than 64 bits"),
    ],
)
def test_what_cannot_be_stored_without_pickle_is_named(tmp_path: Path, sample: Any, says: str) -> None:
    with pytest.raises(WrongInput) as caught:
        packed_of(tmp_path, [1, sample])
    assert f"mine:dataset: {says}" in str(caught.value)
    assert "what can be stored: tensors" in str(caught.value)
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_samples_of_several_structures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=r"sample 2 is float, those before it are int: all must be alike"):
        packed_of(tmp_path, [1, 2, 0.5])


def damaged(folder: Path, how: str) -> None:
    """Damages an encrypted pack, or one that is not."""
    index, part = folder / "train" / "index.json", folder / "train" / "part-000001.blocks"
    content, data = verified(index.read_text()), bytearray(part.read_bytes())
    sizes = [size for _, size in content["partitions"][1]["blocks"]]
    content.pop("digest")
    match how:
        case "a flipped bit":
            data[len(data) // 2] ^= 1
        case "swapped blocks":
            first, second = sizes[:2]
            data[: first + second] = data[first : first + second] + data[:first]
        case "a block of another file":
            data[: sizes[0]] = (folder / "train" / "part-000000.blocks").read_bytes()[: sizes[0]]
        case "truncated":
            del data[-1]
        case "another version":
            content["format"] = 2
        case "a wrong index":
            content["partitions"][1]["blocks"][0][0] += 1
            content["samples"] += 1
        case "a flipped bit in the index":
            index.write_text(index.read_text().replace('"window":32', '"window":31'))
            return
    index.write_text(with_digest(json.dumps(content, separators=(",", ":"))))
    part.write_bytes(data)
    if how == "missing":
        part.unlink()


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("a flipped bit", "part-000001.blocks is damaged: block "),
        ("swapped blocks", "part-000001.blocks is damaged: block 0"),
        ("a block of another file", "part-000001.blocks is damaged: block 0"),
        ("truncated", "part-000001.blocks has "),
        ("missing", "part-000001.blocks is missing"),
        ("another version", "index.json has format 2, and this trainer reads format 1"),
        ("a wrong index", "index.json: "),
        ("a flipped bit in the index", "index.json is damaged: its digest is not that of its content"),
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, key: bytes | None, how: str, says: str) -> None:
    packed_of(tmp_path, images(150), key=key)
    damaged(tmp_path, how)
    with pytest.raises(WrongInput) as caught:
        list(PackedDataset(tmp_path / "train", key))
    assert f"{tmp_path / 'train'}/{says}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("packed_with", "read_with", "says"),
    [
        (
            KEY,
            bytes(32),
            "index.json: the key is another one than that of the data set; correct the Secret of data.encryption",
        ),
        (KEY, None, "index.json: the data set is encrypted; set data.encryption.secretName"),
        (None, KEY, "index.json: the data set is not encrypted; pack it with --key, or leave data.encryption out"),
    ],
)
def test_a_wrong_key_is_seen_at_the_start(
    tmp_path: Path, packed_with: bytes | None, read_with: bytes | None, says: str
) -> None:
    packed_of(tmp_path, [1, 2, 3], key=packed_with)
    with pytest.raises(WrongInput, match=says):
        PackedDataset(tmp_path / "train", read_with)


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    packed_of(tmp_path, [1, 2, 3])
    with pytest.raises(WrongInput, match=f"no packed data set in {tmp_path} with the split 'test'; it has train"):
        PackedDataset(tmp_path / "test")


def test_no_file_of_an_encrypted_data_set_shows_a_sample(tmp_path: Path) -> None:
    samples = [PLANTED] * 50
    packed_of(tmp_path / "plain", samples)
    packed_of(tmp_path / "encrypted", samples, key=KEY)

    def shown(folder: Path) -> bool:
        return any(PLANTED in path.read_bytes() for path in folder.rglob("*") if path.is_file())

    assert shown(tmp_path / "plain"), "or this test sees nothing"
    assert not shown(tmp_path / "encrypted")


def test_two_packs_with_one_key_have_no_block_in_common(tmp_path: Path) -> None:
    for name in ("one", "two"):
        packed_of(tmp_path / name, [PLANTED] * 50, key=KEY)
    one, two = ((tmp_path / name / "train" / "part-000000.blocks").read_bytes() for name in ("one", "two"))
    assert len(one) == len(two)
    assert sum(a == b for a, b in zip(one, two, strict=True)) < len(one) / 50, "else a nonce came twice"


@pytest.mark.parametrize("text", [KEY, KEY.hex().encode(), b"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"])
def test_a_key_is_bytes_hex_or_base64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    packed_of(tmp_path, [1, 2, 3], key=KEY)
    (tmp_path / "key").write_bytes(text)
    monkeypatch.setenv("DISTTRAIN_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DISTTRAIN_DATA_KEY", str(tmp_path / "key"))
    assert packed({}, "train")[2] == 3


def test_what_is_no_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("secret")
    monkeypatch.setenv("DISTTRAIN_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("DISTTRAIN_DATA_KEY", str(tmp_path / "key"))
    with pytest.raises(WrongInput, match=r"no key in .*: expected 32 bytes"):
        packed({}, "train")


LAYOUTS = st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=40).filter(any)


def order_of(layout: list[list[int]], *, window: int, seed: int) -> tuple[BlockOrder, int]:
    counts = np.array([count for part in layout for count in part], np.int64)
    borders = np.cumsum([0, *map(len, layout)])
    return BlockOrder(counts, borders, window=window, seed=seed), int(counts.sum())


@given(LAYOUTS, st.integers(1, 9), st.integers(0, 1 << 63), st.integers(0, 1 << 31))
def test_each_sample_comes_once_an_epoch(layout: list[list[int]], window: int, seed: int, epoch: int) -> None:
    order, samples = order_of(layout, window=window, seed=seed)
    whole = order(epoch, np.arange(samples))
    assert np.array_equal(np.sort(whole), np.arange(samples))
    some = np.arange(samples // 3, samples, 2)
    assert np.array_equal(order(epoch, some), whole[some]), "the same, whichever positions are asked for"


def test_another_epoch_and_another_seed_have_another_order() -> None:
    layout = [[5] * 20] * 8
    orders = [
        order_of(layout, window=4, seed=seed)[0](epoch, np.arange(800)) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[one] == orders[other]).mean() < 0.05


def test_the_samples_of_a_window_lie_in_few_blocks_of_many_partitions() -> None:
    order, samples = order_of([[10] * 16] * 64, window=32, seed=0)
    blocks = order(0, np.arange(samples)).reshape(-1, 320) // 10
    assert all(len(np.unique(window)) == 32 for window in blocks)
    assert min(len(np.unique(window // 16)) for window in blocks) >= 8, "neighbours in the data set are far apart"


class Counting(Folder):
    """A store that counts what it is asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked: list[tuple[int, int]] = []

    def read(self, partition: int, offset: int, length: int) -> bytes:
        self.asked.append((partition, offset))
        return super().read(partition, offset, length)


def test_what_is_read_ahead_is_read_once(tmp_path: Path) -> None:
    packed_of(tmp_path, images(150), key=KEY)
    counting = Counting(tmp_path / "train")
    dataset = PackedDataset(counting, KEY)
    numbers = np.arange(150)
    dataset.read_ahead(numbers)
    dataset.read_ahead(numbers)
    batch = dataset.batch(numbers)
    assert batch[1].tolist() == list(range(150))
    assert len(counting.asked) == len(set(counting.asked)) == len(dataset.index.counts)


@pytest.mark.parametrize("cache", [1, BLOCK, 3 * BLOCK, 20 * BLOCK])
def test_samples_that_are_larger_than_the_cache_are_read_once(tmp_path: Path, cache: int) -> None:
    packed_of(tmp_path, [(torch.full((BLOCK // 4,), float(number)), number) for number in range(12)])
    counting = Counting(tmp_path / "train")
    dataset = PackedDataset(counting, cache=cache)
    parts = np.arange(12).reshape(4, 3)
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if following is not None:
            dataset.read_ahead(following)
        assert dataset.batch(part)[1].tolist() == part.tolist()
    assert len(counting.asked) == len(set(counting.asked)) == 12


def test_what_is_read_ahead_for_nothing_does_not_stop_the_reading_ahead(tmp_path: Path) -> None:
    packed_of(tmp_path, [(torch.zeros(BLOCK // 4), number) for number in range(60)])
    counting = Counting(tmp_path / "train")
    dataset = PackedDataset(counting, cache=4 * BLOCK)
    dataset.read_ahead(np.arange(3))  # of a part that another worker computes then
    for number in range(10, 60):
        dataset.read_ahead(np.array([number]))
        if number > 10:
            dataset.batch(np.array([number - 1]))
    assert len(counting.asked) == len(set(counting.asked))
    dataset.batch(np.array([0]))
    assert counting.asked.count((0, 0)) == 2, "it made room"


class Moody(Folder):
    """A store that fails so many times, and then reads."""

    def __init__(self, path: Path, error: int, *, reads: int = 0, index: int = 0) -> None:
        super().__init__(path)
        self.error, self.reads, self.of_index = error, reads, index

    def index(self) -> bytes:
        self.of_index -= 1
        if self.of_index >= 0:
            raise OSError(self.error, os.strerror(self.error))
        return super().index()

    def read(self, partition: int, offset: int, length: int) -> bytes:
        self.reads -= 1
        if self.reads >= 0:
            raise OSError(self.error, os.strerror(self.error))
        return super().read(partition, offset, length)


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT])
def test_a_volume_that_fails_for_a_moment_is_waited_for(
    tmp_path: Path, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    packed_of(tmp_path, [1, 2, 3])
    dataset = PackedDataset(Moody(tmp_path / "train", error, reads=3))
    assert [dataset[i] for i in range(3)] == [1, 2, 3]
    said = f"{tmp_path / 'train' / 'part-000000.blocks'} cannot be read: {os.strerror(error)}"
    assert caplog.text.count(said) == 1, "one line"


def test_a_volume_that_stays_away_is_a_failure_that_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_dataset, "PATIENCE_SECONDS", 0.2)
    packed_of(tmp_path, [1, 2, 3])
    dataset = PackedDataset(Moody(tmp_path / "train", errno.EIO, reads=1 << 30))
    with pytest.raises(DataUnreadable) as caught:
        dataset[0]
    where = tmp_path / "train" / "part-000000.blocks"
    assert str(caught.value) == f"{where} cannot be read: Input/output error; it is tried again: look at data.volume"
    assert caught.value.exit_code == 134


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (errno.EIO, DataUnreadable),
        (errno.ESTALE, DataUnreadable),
        (errno.EACCES, WrongInput),
        (errno.EISDIR, WrongInput),
    ],
)
def test_an_index_that_cannot_be_read_is_retried_but_for_a_mistake(
    tmp_path: Path, error: int, raised: type[Exception]
) -> None:
    packed_of(tmp_path, [1, 2, 3])
    with pytest.raises(raised, match=f"index.json cannot be read: {os.strerror(error)}; "):
        PackedDataset(Moody(tmp_path / "train", error, index=1))


def test_swapped_splits_are_seen(tmp_path: Path) -> None:
    packed_of(tmp_path, [1, 2, 3], split="test")
    os.rename(tmp_path / "test", tmp_path / "train")
    with pytest.raises(
        WrongInput, match=r"train/index.json is the index of the split 'test', in the folder of 'train': "
    ):
        PackedDataset(tmp_path / "train")


def test_a_data_set_is_read_in_any_order_with_room_for_one_block(tmp_path: Path) -> None:
    packed_of(tmp_path, images(150))
    dataset = PackedDataset(tmp_path / "train", cache=1)
    assert [dataset[number][1] for number in (149, 3, 77, 4, 149)] == [149, 3, 77, 4, 149]
    assert dataset.batch(np.arange(0, 150, 7))[1].tolist() == list(range(0, 150, 7))


def test_more_partitions_than_samples_leave_some_empty(tmp_path: Path) -> None:
    dataset = packed_of(tmp_path, [1, 2], partitions=5)
    assert sorted(dataset[i] for i in dataset.order(0)(0, np.arange(2)).tolist()) == [1, 2]


def test_a_data_set_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    packed_of(tmp_path, [1, 2, 3])
    with pytest.raises(OSError, match="not empty"):
        packed_of(tmp_path, [4, 5, 6])
    assert [PackedDataset(tmp_path / "train")[i] for i in range(3)] == [1, 2, 3]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train"]


def test_a_copy_of_the_folder_is_the_same_data_set(tmp_path: Path) -> None:
    one = packed_of(tmp_path, [1, 2, 3])
    shutil.copytree(tmp_path / "train", tmp_path / "copy" / "train")
    assert PackedDataset(tmp_path / "copy" / "train").fingerprint() == one.fingerprint()
    assert packed_of(tmp_path / "again", [1, 2, 3]).fingerprint() != one.fingerprint()


def test_the_structure_of_a_sample_reads_well() -> None:
    sample = {"image": torch.zeros(2), "box": (np.float32(1), [None])}
    assert str(structure_of(sample)) == "{image: tensor of float32, box: tuple(scalar of <f4, list(none))}"
