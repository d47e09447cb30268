"""A few steps of a model of plan_users on a mesh, through all that a worker does with it; and the same in one process."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from configs import config_of
from disttrain.api.names import Role
from disttrain.api.runtime import JobConfig
from disttrain_trainer.data.chance import mix
from disttrain_trainer.data.schedule import Schedule
from disttrain_trainer.errors import TrainerError
from disttrain_trainer.loop.loop import TrainingLoop
from disttrain_trainer.model import mapped
from disttrain_trainer.model import task as tasks
from disttrain_trainer.model.flat import described
from disttrain_trainer.model.mapped import LargeInFiles
from disttrain_trainer.model.objective import Objective
from disttrain_trainer.net.control_client import ControlClient
from disttrain_trainer.net.members import CollectiveMember, Round
from disttrain_trainer.parallel.compose import ParallelContext, compose
from disttrain_trainer.parallel.mesh import Groups, mesh_of
from disttrain_trainer.parallel.shard_optimizer import ShardOptimizer
from disttrain_trainer.parallel.sharded_model import ShardedModel
from disttrain_trainer.runtime import machine
from disttrain_trainer.runtime.metrics import Metrics
from disttrain_trainer.runtime.process import Process
from disttrain_trainer.strategies.shard_exchange import ShardExchange
from training import plan_users

STEPS, BATCH, SEED = 6, 8, 3
State = dict[str, torch.Tensor]


def config(
    *, data: int, plan: str | None, sharding: str, options: dict[str, Any], loss: str = "loss", tensor: int = 2
) -> JobConfig:
    """The job of these steps."""
    module = "training.plan_users"
    trainer = {name: f"{module}:{name}" for name in ("model", "dataset")} | {
        "loss": f"{module}:{loss}",
        "optimizer": {"name": "AdamW", "learningRate": 0.01, "weightDecay": 0.01},
        "config": options,
        "batchSize": BATCH,
        "maxSteps": STEPS,
        "seed": SEED,
    }
    if plan is not None:
        trainer["parallelize"] = f"{module}:{plan}"
    strategy: dict[str, Any] = {"type": "Hybrid" if data > 1 else "ModelParallel", "modelParallel": {"tensor": tensor}}
    if data > 1:
        strategy["dataParallel"] = {"sharding": sharding}
    return config_of({"strategy": strategy, "trainer": trainer, "worker": {"replicas": data * tensor}})


def train(job: JobConfig) -> State | str:
    """The state after all steps, whole tensors; or what the model is refused with."""
    rank = dist.get_rank()
    process = Process(config=job, role=Role.WORKER, index=rank)
    member, metrics = CollectiveMember(), Metrics(process)
    control = ControlClient(
        process=process, describe=member.describe, on_message=member.on_message, on_released=lambda: None
    )
    task, mesh = tasks.build(job, rank=rank, local_rank=0, incarnation=""), mesh_of(job)
    groups, layout = Groups.of(mesh, rank=rank, device="cpu"), described(task.model)
    at = mesh.coordinate(rank)
    context = ParallelContext(
        config=job,
        mesh=mesh,
        at=at,
        groups=groups,
        loss=task.loss,
        device=task.device,
        sample=lambda: task.fetch(task.schedule.part(0).indices[:2]),
    )
    member.step, member.round = 0, Round(1)
    try:
        local = compose(task.model, context)
        model = ShardedModel(local, layout=layout, at=at)
        loop = TrainingLoop(
            task, model, name="test", metrics=metrics, send=lambda fields: None, counts=mesh.counts(rank)
        )
        loop.adopt(model, Objective(local.module, task.loss))
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
            pipeline=None,
            optimizer=ShardOptimizer(job.trainer.loop.optimizer, model),
            buffers=None,
            parameters=len(layout.places),
            checkpoints=None,
            plan_field=context.plan_field,
        )
        loop.run(exchange)
    except TrainerError as error:
        return f"{type(error).__name__}: {error}"
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in local.module.named_parameters()
    }


def train_out_of_files(job: JobConfig) -> State | str:
    """As `train`, where all of the whole model lies in files at first. Raises AssertionError when it does not."""
    made: list[LargeInFiles] = []

    def noted(*, after: int) -> LargeInFiles:
        made.append(LargeInFiles(after=after))
        return made[-1]

    with (
        mock.patch.object(mapped, "SMALL", 1),
        mock.patch.object(machine, "memory", return_value=0),
        mock.patch.object(tasks, "LargeInFiles", noted),
    ):
        found = train(job)
    assert made[0].nbytes > 0
    return found


def alone(job: JobConfig, *, count: int) -> State:
    """The state after all steps in one process, which computes the `count` parts of a step in turn."""
    options = dict(job.trainer.config or {})
    torch.manual_seed(SEED)
    model = plan_users.model(options)
    stepper = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    tensors = plan_users.dataset({}, "train").tensors
    schedule = Schedule(samples=19, batch_size=BATCH, parts_per_step=count, seed=SEED, max_steps=STEPS)
    for step in range(STEPS):
        stepper.zero_grad()
        for number in range(count):
            part = schedule.part(step * count + number)
            if part.samples:
                torch.manual_seed(mix(SEED, part.index))
                batch = [tensor[torch.tensor(part.indices)] for tensor in tensors]
                (plan_users.loss(model, batch) * (part.samples / part.batch_samples)).backward()
        stepper.step()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def cut_in_bfloat16() -> list[str]:
    """The placements of an attention in bfloat16, which is tried before it is cut."""
    from torch.distributed.device_mesh import init_device_mesh

    from disttrain_trainer.parallel import tensor

    torch.manual_seed(0)
    attention = plan_users.Attention().to(torch.bfloat16)
    tensor.apply(torch.nn.Sequential(attention), init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",)))
    return [str(getattr(parameter, "placements", None)) for parameter in attention.parameters()]
