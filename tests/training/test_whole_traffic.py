"""All that the processes of one job send one another, and all that lies on its workers' disks: what is planted is found without encryption,
and not with it. One local run in a network namespace of its own; what its loopback carries is written down (capture.py)."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.programs import skip
from local_runs.command import DISTTRAIN
from training.job import MUTUAL, digits, served

CAPTURE = Path(__file__).with_name("capture.py")
GRADIENT = 1.2345e-7
SAMPLE = struct.pack("<f", 7.6543e-9) * 64
PLANTED = f"""
import os
from pathlib import Path
import torch
from torch.utils.data import TensorDataset
from disttrain_trainer.examples import digits

SAMPLE = {SAMPLE!r}

class Planted(torch.nn.Sequential):
    def __init__(self, inner):
        super().__init__(inner)
        self.planted = torch.nn.Parameter(torch.zeros(4096))
        self.planted.register_hook(lambda gradient: torch.full_like(gradient, {GRADIENT}))

    def forward(self, batch):
        return super().forward(batch) + 0 * self.planted.sum()

def model(config):
    return Planted(digits.model(config))

def dataset(config, split):
    images, labels = digits.dataset(config, split).tensors
    images = images.clone()
    if split == "train":
        images[::5] = torch.frombuffer(bytearray(SAMPLE), dtype=torch.float32)
    return TensorDataset(images, labels)

def evaluate(model, dataset):
    # At the end, in each worker: what stands for its node's disk.
    for worker in Path(os.environ["DISTTRAIN_COPIES_DIR"]).parent.iterdir():
        files = [path.read_bytes() for path in worker.rglob("*") if path.is_file()]
        Path(f"disk-{{worker.name}}").write_text(f"{{len(files)}} {{any(SAMPLE in file for file in files)}}")
    return digits.evaluate(model, dataset)
"""


def in_pieces(value: float) -> list[bytes]:
    """A gradient as it may be on the wire: as it is, or as the part of one of three ranks."""
    return [struct.pack("<f", value / parts) * 64 for parts in (1, 2, 3)]


def pack(folder: Path, key: Path | None) -> None:
    claim = folder / ".disttrain/claims/data"
    command = [str(DISTTRAIN), "data", "pack", "planted:dataset", str(claim), "--partitions", "12"]
    subprocess.run([*command, *(["--key", str(key)] if key else [])], cwd=folder, check=True, capture_output=True)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("strategy", [{}, served("Sync", servers=1)], ids=["DataParallel", "ParameterServer"])
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_planted_tensor_sample_and_job_uid_are_in_the_traffic_and_on_a_disk_only_without_encryption(
    tmp_path: Path, strategy: dict[str, Any], encrypted: bool
) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "key").write_text("17" * 32)
    pack(tmp_path, tmp_path / "key" if encrypted else None)
    trainer = {"model": "planted:model", "dataset": "disttrain_trainer.data:packed", "evaluate": "planted:evaluate"}
    data: dict[str, Any] = {"replication": 2, "volume": {"persistentVolumeClaim": "data"}}
    if encrypted:
        data["encryption"] = {"secretName": "key"}
    spec = digits(
        trainer={**trainer, "epochs": 4},
        data=data,
        worker={"replicas": 3},
        **(MUTUAL if encrypted else {}),
        **strategy,
    )
    job = {"apiVersion": "disttrain.dev/v1alpha1", "kind": "DistTrainJob", "metadata": {"name": "tapped"}, "spec": spec}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"key": "17" * 32}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump_all([job, secret] if encrypted else [job]))

    command = [sys.executable, str(CAPTURE), "traffic", str(DISTTRAIN), "run", "-q", "-o", "json", "job.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=170)
    if "a network namespace cannot be made" in done.stderr:
        skip("this machine lets a test make no network namespace; run it as root, or allow user namespaces")
    assert done.returncode == 0, done.stderr
    uid = json.loads(done.stdout)["metadata"]["uid"]

    heard = [path.read_bytes() for path in (tmp_path / "traffic").iterdir()]
    assert sum(map(len, heard)) > 1 << 18

    def found(*planted: bytes) -> bool:
        return any(one in flow for flow in heard for one in planted)

    said = {
        "tensor": found(*in_pieces(GRADIENT)),
        "sample": found(SAMPLE),
        "job's uid": found(uid.encode()),
    }
    # Without TLS, processes of one machine and their servers speak over Unix sockets, which no network carries.
    assert said == dict.fromkeys(said, not encrypted) | {"tensor": not encrypted and not strategy}
    disks = [path.read_text().split() for path in tmp_path.glob("disk-worker-*")]
    assert len(disks) == 3
    assert all(int(files) > 0 for files, _ in disks)
    assert [shown for _, shown in disks] == [str(not encrypted)] * 3
