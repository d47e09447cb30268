"""fully_shard with torch's own checkpoints. Rank 1 of the first run is killed at step 12; what starts again goes on from step 10."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from result import say
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
folder, killed = Path("checkpoints"), Path("killed")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
optimizer = torch.optim.AdamW(model.parameters(), 0.01)
saved = max((int(file.name) for file in folder.glob("*") if (file / ".metadata").exists()), default=0)
if saved:
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / str(saved))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
for step in range(saved + 1, 21):
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(1000 * rank + step))
    loss = ((model(inputs).squeeze(1) - inputs.sum(1)) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / str(step))
    if step == 12 and rank == 1 and "KILL" in os.environ and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
if rank == 0:
    assert saved == 10 or "KILL" not in os.environ
    say(steps=step, world=world, loss=loss.item())
dist.destroy_process_group()
