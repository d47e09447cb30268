"""A program that starts its processes itself, as the tutorial of DistributedDataParallel does."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from result import say
from torch.nn.parallel import DistributedDataParallel


def work(rank: int, world: int, port: int) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", str(port)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(40):
        inputs = torch.randn(16, 8)
        loss = ((model(inputs).squeeze(1) - inputs.sum(1)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if rank == 0:
        say(steps=40, world=world, loss=loss.item())
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.create_server(("localhost", 0)) as free:
        chosen = free.getsockname()[1]
    mp.spawn(work, args=(2, chosen), nprocs=2, join=True)
