"""What packed data costs beside tensors in memory: our loop on both, in turns, in one process.

    python benchmarks/data.py            # a table; 1.00 is data that costs nothing, and 0.90 is asked for

Digits, packed into 8 partitions and encrypted with AES-256-GCM, read from this worker's own copies (data.replication); the peer is the same
loop on a TensorDataset, which indexes tensors. And twice more: what a batch costs where its blocks are in the cache, and where each epoch
reads and decrypts them all again.
"""

import argparse
import os
import secrets
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from disttrain.api import environment
from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain.api.storage import PACKED, Data, DataVolume, Encryption
from disttrain_trainer.data.pack_writer import write
from disttrain_trainer.data.packed_dataset import PackedDataset
from disttrain_trainer.examples import digits
from disttrain_trainer.net import copies
from disttrain_trainer.net.transport import PLAIN
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.runtime.sockets import listen
from loop import BATCH, Ours, make_config


def packed_config(steps: int) -> JobConfig:
    """The job of benchmarks/loop.py on packed, encrypted and replicated digits."""
    config = make_config("digits", steps)
    data = Data(
        replication=2,
        encryption=Encryption(secret_name="key"),
        volume=DataVolume(persistent_volume_claim="data"),
    )
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    addresses = config.addresses.model_copy(update={"copies": (f"127.0.0.1:{port}",)})
    trainer = config.trainer.model_copy(update={"dataset": PACKED})
    return config.model_copy(update={"data": data, "trainer": trainer, "addresses": addresses})


def measure(*, steps: int, rounds: int, folder: Path) -> list[tuple[str, float]]:
    """What is printed: names, and milliseconds or ratios."""
    key = secrets.token_bytes(32)
    (folder / "key").write_bytes(key)
    write(digits.dataset({}, "train"), folder / "train", split="train", partitions=8, key=key, what="digits")
    os.environ |= {environment.DATA_DIR: str(folder), environment.DATA_KEY: str(folder / "key")}
    config = packed_config(steps * (rounds + 1))
    loops = {"memory": Ours("digits", steps=steps, rounds=rounds + 1)}
    process = Process(config=config, role=Role.WORKER, index=0, copies_dir=folder / "copies")
    with copies.kept(process, PLAIN) as kept:
        loops["packed"] = Ours(config, steps=steps, rounds=1)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    processor: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop.run()
    for _ in range(rounds):
        for name, loop in loops.items():
            began, busy = time.perf_counter(), time.process_time()
            loop.run()
            processor[name].append((time.process_time() - busy) / steps)
            seconds[name].append((time.perf_counter() - began) / steps)
    if kept is not None:
        kept.close()
    busy_ratio = statistics.median(processor["memory"]) / statistics.median(processor["packed"])
    both = zip(seconds["memory"], seconds["packed"], strict=True)
    return [
        ("a step on tensors in memory, ms at best", min(seconds["memory"]) * 1e3),
        ("a step on packed, encrypted, replicated data, ms at best", min(seconds["packed"]) * 1e3),
        ("a batch of 64 from the cache, ms", batch_seconds(folder, key, cached=True) * 1e3),
        (
            "a batch of 64, each of whose blocks is read and decrypted, ms",
            batch_seconds(folder, key, cached=False) * 1e3,
        ),
        ("memory / packed at best", min(seconds["memory"]) / min(seconds["packed"])),
        ("memory / packed of the processor's time, at the median, background threads included", busy_ratio),
        ("memory / packed at the median", statistics.median(m / p for m, p in both)),
    ]


def batch_seconds(folder: Path, key: bytes, *, cached: bool) -> float:
    """The best of some epochs, by batches."""
    dataset = PackedDataset(folder / "train", key, **({} if cached else {"cache": 1}))
    order = dataset.order(0)
    best = float("inf")
    for epoch in range(5):
        numbers = order(epoch, np.arange(len(dataset)))
        batches = [numbers[at : at + BATCH] for at in range(0, len(numbers), BATCH)]
        began = time.perf_counter()
        for batch in batches:
            dataset.batch(batch)
        best = min(best, (time.perf_counter() - began) / len(batches))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed data beside tensors in memory.")
    parser.add_argument("--steps", type=int, default=100, help="of a turn")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, figure in measure(steps=options.steps, rounds=options.rounds, folder=Path(folder)):
            print(f"{name:84} {figure:8.3f}")


if __name__ == "__main__":
    main()
