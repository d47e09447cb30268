"""Packed data at a URL: read by fsspec from a real HTTP server and a real archive, and what is wrong with it in one line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from disttrain.api import environment
from disttrain_trainer.data import packed, packed_dataset
from disttrain_trainer.data.loader_processes import LoaderProcesses
from disttrain_trainer.data.opening import Reading
from disttrain_trainer.data.pack_writer import write
from disttrain_trainer.data.packed_dataset import PackedDataset
from disttrain_trainer.data.url_store import UrlStore, read_options
from disttrain_trainer.errors import DataUnreadable, WrongInput
from file_server import Server

KEY = bytes(range(32))
SAMPLES = [(number, bytes([number]) * 9000) for number in range(90)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """One that serves a packed and encrypted data set."""
    write(SAMPLES, tmp_path / "pack" / "train", split="train", partitions=3, key=KEY, what="mine:dataset")
    serving = Server(tmp_path)
    yield serving
    serving.close()


def test_every_sample_is_read_from_an_http_server(server: Server) -> None:
    dataset = PackedDataset(UrlStore(server.url, "train", {}), KEY)
    assert [dataset[number] for number in range(90)] == SAMPLES
    assert server.asked["GET part-000001.blocks"] == len(dataset.index.partitions[1].blocks), "block by block"


def test_a_loader_process_reads_by_a_connection_of_its_own(server: Server) -> None:
    dataset = PackedDataset(UrlStore(server.url, "train", {}), KEY)
    loaders = LoaderProcesses(1, lambda key: dataset[key[0]], dataset=dataset, around=contextlib.nullcontext)
    try:
        loaders.foresee([(7, 0)], [(80, 0)])
        assert [loaders.take((number, 0)) for number in (7, 80)] == [SAMPLES[7], SAMPLES[80]]
    finally:
        loaders.close()
    assert dataset[40] == SAMPLES[40]


def test_every_sample_is_read_from_an_archive(tmp_path: Path) -> None:
    write(SAMPLES, tmp_path / "pack" / "train", split="train", partitions=4, key=KEY, what="mine:dataset")
    with ZipFile(tmp_path / "pack.zip", "w") as archive:
        for path in (tmp_path / "pack" / "train").iterdir():
            archive.write(path, f"pack/train/{path.name}")
    dataset = PackedDataset(UrlStore(f"zip://pack::file://{tmp_path}/pack.zip", "train", {}), KEY)
    assert [dataset[number] for number in range(90)] == SAMPLES


def test_the_factory_reads_from_the_url_of_the_job_with_the_options_of_the_secret(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "secret"
    (tmp_path / "options").mkdir()
    (tmp_path / "options" / "client_kwargs").write_text(json.dumps({"headers": {"Authorization": "Bearer secret"}}))
    (tmp_path / "options" / "..data").mkdir()  # as in a mounted Secret
    (tmp_path / "key").write_bytes(KEY)
    monkeypatch.setenv(environment.DATA_KEY, str(tmp_path / "key"))
    monkeypatch.setattr(Reading, "url", server.url)
    with pytest.raises(
        WrongInput, match=r"train/index\.json cannot be read: 403.*correct the Secret of data\.urlSecretName"
    ):
        packed({}, "train")
    monkeypatch.setenv(environment.DATA_URL_OPTIONS, str(tmp_path / "options"))
    assert packed({}, "train")[7] == SAMPLES[7]


def test_a_server_that_fails_for_a_moment_is_waited_for(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    dataset = PackedDataset(UrlStore(server.url, "train", {}), KEY)
    server.failures = 3
    assert [dataset[number] for number in range(90)] == SAMPLES
    assert "part-000000.blocks cannot be read: 503" in caplog.text


def test_a_server_that_is_gone_is_a_failure_that_is_retried(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_dataset, "PATIENCE_SECONDS", 0.2)
    dataset = PackedDataset(UrlStore(server.url, "train", {"skip_instance_cache": True}), KEY)
    server.failures = 1 << 30
    with pytest.raises(DataUnreadable, match=r"train/part-000000\.blocks cannot be read: 503.*look at data\.url"):
        dataset[0]
    with pytest.raises(DataUnreadable, match=r"index\.json cannot be read: 503"):
        PackedDataset(UrlStore(server.url, "train", {}), KEY)


def test_a_split_that_is_not_there_is_named(server: Server) -> None:
    with pytest.raises(WrongInput, match=r"no packed data set in http://.*/pack with the split 'test'; it has train"):
        PackedDataset(UrlStore(server.url, "test", {}), KEY)


def test_a_partition_that_is_missing_or_cut_short_is_named_at_the_start(server: Server) -> None:
    part = server.root / "pack" / "train" / "part-000002.blocks"
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    with pytest.raises(WrongInput, match=r"/train/part-000002\.blocks has \d+ bytes, \d+ were packed: "):
        PackedDataset(UrlStore(server.url, "train", {}), KEY)
    part.unlink()
    with pytest.raises(WrongInput, match=r"http://.*/pack/train/part-000002\.blocks is missing: "):
        PackedDataset(UrlStore(server.url, "train", {}), KEY)


def test_a_server_without_ranges_is_refused(server: Server) -> None:
    server.ranges = False
    with pytest.raises(WrongInput, match=r"must be of a server that gives ranges"):
        PackedDataset(UrlStore(server.url, "train", {}), KEY)[0]


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        (
            "nosuch://bucket",
            {},
            "data.url: nosuch://bucket cannot be opened: Protocol not known: nosuch; use an image with",
        ),
        ("dropbox://folder", {}, "data.url: dropbox://folder cannot be opened: "),
        ("file:///data", {"nosuch": {}}, None),
    ],
)
def test_a_url_that_no_library_opens_is_named(url: str, options: dict[str, Any], says: str | None) -> None:
    if says is None:
        UrlStore(url, "train", options)
        return
    with pytest.raises(WrongInput) as caught:
        UrlStore(url, "train", options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_option_that_is_no_json_is_named_without_its_value(tmp_path: Path) -> None:
    (tmp_path / "client_kwargs").write_text("{secret")
    with pytest.raises(WrongInput) as caught:
        read_options(tmp_path)
    assert str(caught.value).startswith("data.urlSecretName: the entry 'client_kwargs' begins as JSON, and is none: ")
    assert "secret" not in str(caught.value).removeprefix("data.urlSecretName")
    (tmp_path / "client_kwargs").write_text("no json\n")
    assert read_options(tmp_path) == {"client_kwargs": "no json"}
