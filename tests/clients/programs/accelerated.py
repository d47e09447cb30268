"""accelerate's loop."""

import torch
from accelerate import Accelerator
from result import say
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
inputs = torch.randn(320, 8)
model = torch.nn.Linear(8, 1)
loader = DataLoader(TensorDataset(inputs, inputs.sum(1)), batch_size=16)
model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.05), loader)
steps = 0
for _ in range(2):
    for x, y in loader:
        loss = ((model(x).squeeze(1) - y) ** 2).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        steps += 1
mean = accelerator.gather(loss.detach().reshape(1)).mean().item()
if accelerator.is_main_process:
    say(steps=steps, world=accelerator.num_processes, loss=mean)
accelerator.end_training()
