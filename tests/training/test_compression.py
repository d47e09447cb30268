"""compression: what is pushed is rounded or cut, what the servers do with it is as ever; held against the definition in plain torch."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from disttrain.api.strategy import Compression as Settings
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.model.flat import Span
from disttrain_trainer.net.frames import BFLOAT16, SPARSE, Header, Link, Op, ProtocolError
from disttrain_trainer.parameter_server import FlatModel
from disttrain_trainer.parameter_server import compression as compressions
from disttrain_trainer.parameter_server.client import GradientInfo
from disttrain_trainer.parameter_server.shard import Buffers
from training.job import Job, checkpoints, digits
from training.parameter_servers import (
    ASYNC,
    Worker,
    enter,
    in_threads,
    make_client,
    make_config,
    mlp,
    serving,
    users,
)

SAMPLES, BATCH, STEPS, FRACTION = 40, 12, 30, 0.05
MOMENTUM = {"name": "SGD", "learningRate": 0.05, "momentum": 0.9}
Sent = Callable[[int, torch.Tensor], torch.Tensor]
"""Of a worker and its gradient, what arrives."""


def rounded(worker: int, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.bfloat16().to(gradient.dtype)


def largest() -> Sent:
    """With a residual for each worker."""
    residuals: dict[int, torch.Tensor] = {}

    def sent(worker: int, gradient: torch.Tensor) -> torch.Tensor:
        whole = residuals.get(worker, torch.zeros_like(gradient)) + gradient
        kept = torch.zeros(len(whole), dtype=torch.bool)
        kept[whole.abs().argsort(descending=True)[: math.ceil(FRACTION * len(whole))]] = True
        residuals[worker] = torch.where(kept, 0, whole)
        return torch.where(kept, whole, 0)

    return sent


def written_down(workers: int, sent: Sent) -> torch.Tensor:
    """The definition: plain torch, with the mean of what arrives for the gradient."""
    schedule = Schedule(samples=SAMPLES, batch_size=BATCH, parts_per_step=workers, seed=3, max_steps=STEPS)
    whole = Worker(torch.float64, SAMPLES)
    stepper = torch.optim.SGD(whole.module.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        arrived = torch.zeros_like(whole.flat.parameters[0])
        for rank in range(workers):
            part = schedule.part(step * workers + rank)
            if (gradient := whole.gradient(part)) is not None:
                arrived += sent(rank, gradient[0]) * part.samples / part.batch_samples
        whole.flat.zero_grad()
        whole.flat.gradients()[0].copy_(arrived)
        stepper.step()
    return whole.flat.parameters[0]


@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize(
    ("settings", "sent"),
    [({"type": "BFloat16"}, lambda: rounded), ({"type": "TopK", "topKFraction": FRACTION}, largest)],
    ids=["BFloat16", "TopK"],
)
def test_any_number_of_workers_and_servers_trains_the_definition(
    workers: int, servers: int, settings: dict[str, object], sent: Callable[[], Sent]
) -> None:
    policy = {"consistency": "Sync", "compression": settings}
    config = make_config(workers=workers, servers=servers, consistency=policy, optimizer=MOMENTUM)
    schedule = Schedule(samples=SAMPLES, batch_size=BATCH, parts_per_step=workers, seed=3, max_steps=STEPS)
    with serving(config) as shards:

        def work(rank: int) -> torch.Tensor:
            worker = Worker(torch.float64, SAMPLES)
            compression = compressions.of(Settings.model_validate(settings), worker.flat.parameters)
            client = enter(make_client(shards, config, rank=rank, compression=compression), worker.flat, join=True)
            client.pull(worker.flat.parameters, step=0)
            for step in range(STEPS):
                part = schedule.part(step * workers + rank)
                client.push_pull(part, worker.gradient(part), worker.flat.parameters, step + 1)
            client.close()
            return worker.flat.parameters[0].clone()

        (found, *_) = in_threads([lambda rank=rank: work(rank) for rank in range(workers)])
    torch.testing.assert_close(found, written_down(workers, sent()), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"type": "None"}, 1.0, 1.001),
        ({"type": "BFloat16"}, 0.5, 0.501),
        ({"type": "TopK", "topKFraction": 0.01}, 0.02, 0.021),
    ],
    ids=["None", "BFloat16", "TopK"],
)
def test_the_bytes_of_a_push(settings: dict[str, object], low: float, high: float) -> None:
    length = 1 << 18
    config = make_config(servers=2, consistency={**ASYNC, "compression": settings})
    schedule = Schedule(samples=400, batch_size=1, parts_per_step=1, seed=0, max_steps=50)
    with serving(config) as shards:
        flat = FlatModel(nn.ParameterList([nn.Parameter(torch.zeros(length))]))
        compression = compressions.of(Settings.model_validate(settings), flat.parameters)
        client = enter(make_client(shards, config, compression=compression), flat, join=True)
        before = client.bytes_sent
        client.push(schedule.part(0), (torch.randn(length),))
        share = (client.bytes_sent - before) / (4 * length)
        print(f"{settings['type']}: {share:.4f} of the bytes")
        assert low <= share <= high


def test_what_is_left_out_is_sent_later() -> None:
    like = (torch.zeros(100),)
    largest = compressions.of(Settings.model_validate({"type": "TopK", "topKFraction": 0.1}), like)
    assert largest is not None
    gradient, arrived = torch.linspace(0.1, 1, 100), torch.zeros(100)
    span = Span(dtype=torch.float32, start=0, stop=100)
    for _ in range(40):
        largest.encode((gradient,))
        arrived += received(largest.payload([span]), span, SPARSE)
    # Each element is sent as soon as it is among the ten largest: what is missing is less than two cycles of the whole vector.
    assert float((40 * gradient - arrived).max()) < 20 * float(gradient.max())
    assert float((40 * gradient - arrived).min()) >= -1e-5


def test_what_takes_no_part_and_what_weighs_nothing_keeps_its_residual() -> None:
    """Against the definition: of a part only elements that take part are sent, of a part of weight 0 none, and nothing is lost."""
    length, used, steps, rate = 60, 40, 12, 0.1
    settings = {"type": "TopK", "topKFraction": FRACTION}
    optimizer = {"name": "SGD", "learningRate": rate}
    config = make_config(servers=2, consistency={"consistency": "Sync", "compression": settings}, optimizer=optimizer)
    schedule = Schedule(samples=12, batch_size=12, parts_per_step=1, seed=3, max_steps=steps)
    gradients = torch.randn(steps, length, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, residual = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64)
    with serving(config) as shards:
        flat = FlatModel(nn.ParameterList([nn.Parameter(torch.zeros(length, dtype=torch.float64))]))
        compression = compressions.of(Settings.model_validate(settings), flat.parameters)
        client = enter(make_client(shards, config, compression=compression), flat, join=True)
        client.pull(flat.parameters, step=0)
        for step in range(steps):
            weight, branch = 0.0 if step % 4 == 3 else 2.0, step % 2 == 1
            gradient = gradients[step].clone()
            if branch:
                gradient[used:] = 0
            info = GradientInfo(weight=weight, runs=[(0, 0, used)] if branch else None)
            client.push_pull(schedule.part(step), (gradient,), flat.parameters, step + 1, info)
            if weight:
                residual += gradient
                candidates = residual.abs()[: used if branch else length]
                sent = candidates.argsort(descending=True)[: math.ceil(FRACTION * length)]
                expected[sent] -= rate * residual[sent]
                residual[sent] = 0
        client.close()
    torch.testing.assert_close(flat.parameters[0], expected, atol=1e-12, rtol=0)


def test_a_gradient_that_is_pushed_again_is_encoded_once() -> None:
    settings = {"type": "TopK", "topKFraction": 0.1}
    config = make_config(consistency={**ASYNC, "compression": settings})
    schedule = Schedule(samples=4, batch_size=1, parts_per_step=1, seed=0, max_steps=4)
    with serving(config) as shards:
        flat = FlatModel(nn.ParameterList([nn.Parameter(torch.zeros(10))]))
        compression = compressions.of(Settings.model_validate(settings), flat.parameters)
        assert isinstance(compression, compressions.Largest)
        client = enter(make_client(shards, config, compression=compression), flat, join=True)
        for again in (False, True):
            client.push(schedule.part(0), (torch.arange(10.0),), GradientInfo(encoded=again))
        client.close()
    assert compression.residual[0].tolist() == [*range(9), 0]


def test_the_residual_of_lost_steps_is_forgotten() -> None:
    span = Span(dtype=torch.float32, start=0, stop=10)
    largest = compressions.of(Settings.model_validate({"type": "TopK", "topKFraction": 0.1}), (torch.zeros(10),))
    assert largest is not None
    largest.encode((torch.ones(10),))
    largest.reset()
    largest.encode((torch.zeros(10),))
    assert not received(largest.payload([span]), span, SPARSE).any()


def received(payload: list[memoryview], span: Span, flag: int) -> torch.Tensor:
    """What a server makes of a payload."""
    data = b"".join(payload)
    buffers = Buffers([span])
    header = Header(op=Op.PUSH, code=flag, nbytes=len(data), samples=1, batch_samples=1)
    compressions.receive(ReceivedBytes(data), header, buffers, before=0)
    return buffers.parts[0][: span.length]


class ReceivedBytes(Link):
    """A link whose peer has sent these bytes and no more."""

    def __init__(self, data: bytes) -> None:
        self._left = memoryview(data)

    def receive_some_of(self, view: memoryview) -> None:
        assert len(view) <= len(self._left), "this would wait for ever"
        view[:], self._left = self._left[: len(view)], self._left[len(view) :]


def sparse(count: int, positions: list[int], values: list[float]) -> list[memoryview]:
    parts = [count.to_bytes(8, "little"), torch.tensor(positions, dtype=torch.int32).numpy().tobytes()]
    return [memoryview(part) for part in (*parts, torch.tensor(values).numpy().tobytes())]


@pytest.mark.parametrize(
    "payload",
    [
        sparse(2, [5, 3], [1.0, 1.0]),
        sparse(2, [3, 3], [1.0, 1.0]),
        sparse(1, [-1], [1.0]),
        sparse(1, [10], [1.0]),
        sparse(11, list(range(11)), [1.0] * 11),
        sparse(5, [1, 2], [1.0, 1.0]),
        [*sparse(1, [1], [1.0]), memoryview(b"more")],
        [memoryview(b"few")],
    ],
    ids=["descending", "twice", "negative", "behind the end", "too many", "cut off", "too long", "no number"],
)
def test_a_gradient_that_does_not_fit_is_refused_before_anything_is_read_that_is_not_there(
    payload: list[memoryview],
) -> None:
    with pytest.raises(ProtocolError):
        received(payload, Span(dtype=torch.float32, start=0, stop=10), SPARSE)


@pytest.mark.parametrize("length", [1, 63, (1 << 17) + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_vectors_of_any_type_and_length_arrive_rounded(dtype: torch.dtype, length: int) -> None:
    vector = torch.randn(length).to(dtype)
    rounding = compressions.of(Settings.model_validate({"type": "BFloat16"}), (vector,))
    assert rounding is not None
    rounding.encode((vector,))
    span = Span(dtype=dtype, start=0, stop=length)
    expected = vector if dtype.itemsize == 2 else vector.bfloat16().to(dtype)
    assert torch.equal(received(rounding.payload([span]), span, BFLOAT16), expected)


def test_a_model_without_compression_has_none() -> None:
    assert compressions.of(Settings(), FlatModel(mlp()).parameters) is None


def test_a_job_of_processes_trains_the_definition(tmp_path: Path) -> None:
    (tmp_path / "users.py").write_text(users(SAMPLES))
    policy = {"consistency": "Sync", "compression": {"type": "TopK", "topKFraction": FRACTION}}
    spec = digits(
        strategy={"type": "ParameterServer", "parameterServer": policy},
        parameterServer={"replicas": 2},
        worker={"replicas": 1},
        trainer={
            "model": "users:model", "dataset": "users:dataset", "loss": "users:loss", "evaluate": None, "epochs": None,
            "optimizer": MOMENTUM, "maxSteps": STEPS, "batchSize": BATCH, "seed": 3,
        },
        **checkpoints(1000),
    )  # fmt: skip
    with Job(folder=tmp_path, spec=spec) as job:
        job.train()
    model = mlp(torch.float64)
    model.load_state_dict(load_file(tmp_path / "checkpoints" / "model.safetensors"))
    found = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(found, written_down(1, largest()), atol=1e-12, rtol=0)
