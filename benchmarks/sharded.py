"""What our loop costs beside a bare PyTorch loop with the same wrapping, FSDP2, tensor or pipeline: in turns, in the same two processes.

    python benchmarks/sharded.py            # a table; a ratio of 1.00 is a loop that costs nothing, above it is faster

The bare loop is what one would write by hand: fully_shard on each layer and the model, the same plan of column and row parts, or
PipelineStage and Schedule1F1B; AdamW with fused=True, torch's collectives on plain gloo. With FSDP2 a third line has our collectives in the
bare loop, so that the two effects can be told apart.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from itertools import product
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B
from torch.distributed.tensor import DTensor

from disttrain.api.names import Role
from disttrain.api.runtime import Addresses, JobConfig
from disttrain.api.spec import DistTrainJobSpec
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.model import task as tasks
from disttrain_trainer.model.blocks import blocks_of
from disttrain_trainer.model.flat import described
from disttrain_trainer.model.objective import Objective
from disttrain_trainer.model.task import Task
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.parallel import shard_collectives, stages, tensor
from disttrain_trainer.parallel.compose import ParallelContext, compose
from disttrain_trainer.parallel.mesh import Groups, mesh_of
from disttrain_trainer.parallel.process_group import AbortableProcessGroup
from disttrain_trainer.parallel.shard_optimizer import ShardOptimizer
from disttrain_trainer.parallel.sharded_model import ShardedModel
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies.shard_exchange import ShardExchange
from ranks import RANKS, TIMEOUT, measure, store

BATCH = 16
SAMPLES = 100_000
"""More than the data set has."""
MICROBATCHES = 4
MODELS = {"charlm 64x2": {"width": 64, "layers": 2}, "charlm 256x4": {"width": 256, "layers": 4}}
CUTS: dict[str, dict[str, Any]] = {
    "FSDP2": {"type": "DataParallel", "dataParallel": {"sharding": "FullyShard"}},
    "tensor": {"type": "ModelParallel", "modelParallel": {"tensor": RANKS}},
    "pipeline": {"type": "ModelParallel", "modelParallel": {"pipeline": RANKS, "microbatches": MICROBATCHES}},
}
Turn = Callable[[], None]
Compute = Callable[[list[torch.Tensor]], None]


def config_of(model: str, cut: str) -> JobConfig:
    """A job of RANKS workers that never ends."""
    module = "disttrain_trainer.examples.charlm"
    spec = DistTrainJobSpec.model_validate(
        {
            "strategy": CUTS[cut],
            "trainer": {
                "model": f"{module}:model",
                "dataset": f"{module}:dataset",
                "loss": f"{module}:loss",
                "optimizer": {"name": "AdamW", "learningRate": 0.001},
                "batchSize": BATCH * RANKS if cut == "FSDP2" else BATCH,
                "maxSteps": 1_000_000,
                "config": MODELS[model],
            },
            "worker": {"replicas": RANKS},
        }
    )
    return JobConfig(
        namespace="benchmark",
        name="sharded",
        uid="none",
        attempt=1,
        strategy=spec.strategy,
        trainer=spec.trainer,
        workers=RANKS,
        addresses=Addresses(control="127.0.0.1:9", rendezvous="127.0.0.1:9"),
    )


def ours(config: JobConfig, rank: int, steps: int) -> Turn:
    """Our loop. Its reports go to a connection that is never made."""
    process = Process(config=config, role=Role.WORKER, index=rank)
    member = CollectiveMember()
    control = ControlClient(
        process=process, describe=member.describe, on_message=member.on_message, on_released=lambda: None
    )
    task, mesh, metrics = (
        tasks.build(config, rank=rank, local_rank=0, incarnation=""),
        mesh_of(config),
        Metrics(process),
    )
    layout, at = described(task.model), mesh.coordinate(rank)
    groups = Groups.of(mesh, rank=rank, device="cpu")
    local = compose(
        task.model, ParallelContext(config=config, mesh=mesh, at=at, groups=groups, loss=task.loss, device=task.device)
    )
    model = ShardedModel(local, layout=layout, at=at)
    counts = mesh.counts(rank)
    loop = TrainingLoop(task, model, name="ours", metrics=metrics, send=lambda fields: None, counts=counts)
    loop.adopt(model, local.pipeline or Objective(local.module, task.loss))
    member.step, member.round = 0, Round(1)
    exchange = ShardExchange(
        process=process,
        metrics=metrics,
        control=control,
        member=member,
        this_round=member.round,
        loop=loop,
        task=task,
        mesh=mesh,
        groups=groups,
        model=model,
        pipeline=local.pipeline,
        optimizer=ShardOptimizer(config.trainer.loop.optimizer, model),
        buffers=None,
        parameters=len(layout.places),
        checkpoints=None,
    )

    def turn() -> None:
        task.schedule.total_steps = member.step + steps
        loop.run(exchange)

    return turn


def cut_by_fsdp(model: nn.Module, mesh: DeviceMesh, *, own_collectives: bool = False) -> None:
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if own_collectives:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                shard_collectives.use(module)


def staged(model: nn.Module, mesh: DeviceMesh) -> Compute:
    """Forward and backward of a batch in this rank's stage."""
    rank = mesh.get_local_rank()
    chosen = stages.split(model, RANKS, config={}, by_user=None)
    stages.keep(model, [chosen[rank]])
    stage = PipelineStage(chosen[rank], rank, RANKS, torch.device("cpu"), group=mesh.get_group())

    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())

    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=loss)

    def compute(batch: list[torch.Tensor]) -> None:
        if rank:
            schedule.step(target=batch[1])
        else:
            schedule.step(batch[0])

    return compute


def bare(task: Task, steps: int, *, order: torch.Tensor, compute: Compute | None = None) -> Turn:
    """The loop without us, of a model that is cut already. order: the samples of this rank. compute: forward and backward of a batch; None:
    of the loss."""
    model, loss = task.model, task.loss
    parameters = list(model.parameters())
    cut, whole = ([one for one in parameters if isinstance(one, DTensor) is is_cut] for is_cut in (True, False))
    # torch's fused step takes no tensors of both kinds at once.
    optimizers = [torch.optim.AdamW(chosen, lr=0.001, fused=True) for chosen in (cut, whole) if chosen]
    dataset = __import__("disttrain_trainer.examples.charlm", fromlist=["dataset"]).dataset({}, "train")
    order, at = order[order < len(dataset)], 0

    def turn() -> None:
        nonlocal at
        for _ in range(steps):
            at = at if at + BATCH <= len(order) else 0
            indices = order[at : at + BATCH]
            at += BATCH
            model.zero_grad()
            batch = [tensor[indices] for tensor in dataset.tensors]
            if compute is None:
                loss(model, batch).backward()
            else:
                compute(batch)
            for optimizer in optimizers:
                optimizer.step()

    return turn


def run(results: Connection, rank: int, port: int, model: str, cut: str, steps: int, rounds: int) -> None:
    """One rank. Sends for each loop seconds and CPU seconds of a step, one pair for each turn."""
    torch.set_num_threads(1)
    config = config_of(model, cut)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))

    def bare_fsdp(mesh: DeviceMesh, *, own_collectives: bool) -> Turn:
        task = tasks.build(config, rank=rank, local_rank=0, incarnation="")
        cut_by_fsdp(task.model, mesh, own_collectives=own_collectives)
        return bare(task, steps, order=order[rank::RANKS])

    def bare_tensor(mesh: DeviceMesh) -> Turn:
        task = tasks.build(config, rank=rank, local_rank=0, incarnation="")
        tensor.apply(task.model, mesh)
        return bare(task, steps, order=order)

    def bare_pipeline(mesh: DeviceMesh) -> Turn:
        task = tasks.build(config, rank=rank, local_rank=0, incarnation="")
        return bare(task, steps, order=order, compute=staged(task.model, mesh))

    with AbortableProcessGroup().joined("gloo", store=store(port), rank=rank, size=RANKS, timeout=TIMEOUT):
        mesh = DeviceMesh.from_group(dist.new_group(backend="gloo"), "cpu", mesh_dim_names=("ranks",))
        turns = {"ours": ours(config, rank, steps)}
        if cut == "FSDP2":
            turns["bare"] = bare_fsdp(mesh, own_collectives=False)
            turns["bare, our collectives"] = bare_fsdp(mesh, own_collectives=True)
        else:
            turns["bare"] = bare_tensor(mesh) if cut == "tensor" else bare_pipeline(mesh)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
        for number in range(rounds + 1):
            for name in list(turns) if number % 2 else reversed(turns):
                dist.barrier()
                began, used = time.perf_counter(), time.process_time()
                turns[name]()
                if number:  # the first one warms up
                    found[name].append(((time.perf_counter() - began) / steps, (time.process_time() - used) / steps))
    results.send(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each loop")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=list(CUTS))
    options = parser.parse_args()
    print(
        f"{'model':<13} {'cut':<9} {'loop':<22} {'ms/step':>8} {'best':>6} {'median':>7} {'CPU':>6}   bare / it; target of ours 0.97"
    )
    for model, cut in product(options.models, options.cuts):
        found = measure(run, model, cut, options.steps, options.rounds)
        seconds, used = ({name: [turn[at] for turn in turns] for name, turns in found.items()} for at in (0, 1))
        for name in found:
            median = statistics.median(b / s for b, s in zip(seconds["bare"], seconds[name], strict=True))
            best = min(seconds["bare"]) / min(seconds[name])
            cpu = statistics.median(b / s for b, s in zip(used["bare"], used[name], strict=True))
            fastest = min(seconds[name]) * 1e3
            print(
                f"{model:<13} {cut:<9} {name:<22} {fastest:>8.2f} {best:>6.2f} {median:>7.2f} {cpu:>6.2f}", flush=True
            )


if __name__ == "__main__":
    main()
