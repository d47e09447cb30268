"""Lightning's Trainer: arguments are the number of nodes and of processes of each. It starts the processes itself where none has."""

import logging
import sys
import tempfile

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from result import say
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch, index):
        x, y = batch
        self.last = ((self.layer(x).squeeze(1) - y) ** 2).mean()
        return self.last

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


if __name__ == "__main__":
    nodes, devices = map(int, sys.argv[1:])
    seed_everything(0, verbose=False)
    inputs = torch.randn(320, 8)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            strategy="ddp",
            num_nodes=nodes,
            devices=devices,
            max_steps=20,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        model = Model()
        trainer.fit(model, DataLoader(TensorDataset(inputs, inputs.sum(1)), batch_size=16))
    if trainer.global_rank == 0:
        say(steps=trainer.global_step, world=trainer.world_size, loss=model.last.item())
