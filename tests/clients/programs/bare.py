"""DistributedDataParallel as the tutorial of torchrun has it."""

import torch
import torch.distributed as dist
from result import say
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.05)
generator = torch.Generator().manual_seed(rank)
for step in range(1, 41):
    inputs = torch.randn(16, 8, generator=generator)
    loss = ((model(inputs).squeeze(1) - inputs.sum(1)) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if rank == 0:
        print(f"step {step}/40 loss {loss.item():.6f}", flush=True)
if rank == 0:
    say(steps=step, world=world, loss=loss.item())
dist.destroy_process_group()
