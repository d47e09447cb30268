"""The files of `disttrain init`: a commented job, and a model or script that runs as it is. Pure."""

import keyword
import re
import sys
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from disttrain.api.names import API_VERSION, KIND


class Way(StrEnum):
    """How the job trains."""

    DATA_PARALLEL = "DataParallel"
    PARAMETER_SERVER = "ParameterServer"
    SCRIPT = "script"


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user answered."""

    name: str
    way: Way
    workers: int

    @property
    def module(self) -> str:
        """The module of the job's Python file."""
        module = self.name.replace("-", "_")
        taken = (
            keyword.iskeyword(module) or module in sys.stdlib_module_names or module in ("torch", "numpy", "disttrain")
        )
        return f"{module}_model" if taken else module


NAME: Final = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
"""As metadata.name of a job: RFC 1035, at most 40 characters."""


def files(choices: Choices) -> dict[str, str]:
    """The texts by their file names, the job first."""
    code = _SCRIPT if choices.way is Way.SCRIPT else _MODEL
    return {f"{choices.name}.yaml": _job(choices), f"{choices.module}.py": code.replace("JOB", choices.name)}


def _job(choices: Choices) -> str:
    parts = [_HEAD, _STRATEGY[choices.way], _TRAINER[choices.way]]
    parts += [_SERVERS] if choices.way is Way.PARAMETER_SERVER else []
    text = "".join([*parts, _REST])
    values = {
        "API_VERSION": API_VERSION,
        "KIND": KIND,
        "JOB": choices.name,
        "MODULE": choices.module,
        "WORKERS": str(choices.workers),
        "BATCH": str(max(100, 10 * choices.workers)),
    }
    return re.sub(r"\b(API_VERSION|KIND|JOB|MODULE|WORKERS|BATCH)\b", lambda found: values[found[0]], text)


_HEAD: Final = """\
# Here:         disttrain run JOB.yaml
# On a cluster: disttrain submit JOB.yaml --code . --wait      (takes the Python files of this folder along)
# Check it:     disttrain lint JOB.yaml                        All fields: kubectl explain dtj.spec
apiVersion: API_VERSION
kind: KIND
metadata:
  name: JOB
spec:
  # image: registry.example/trainer:1.0   # of your own, with the packages that your code imports; default: the operator's
"""
_STRATEGY: Final = {
    Way.DATA_PARALLEL: """\
  strategy:
    type: DataParallel # every worker has the whole model, and a part of each batch
    # dataParallel: {sharding: FullyShard}   # a model larger than the memory of a worker (FSDP)
""",
    Way.PARAMETER_SERVER: """\
  strategy:
    type: ParameterServer # servers hold the parameters, workers compute gradients
    parameterServer:
      consistency: BoundedStaleness # Sync | Async | BoundedStaleness: a worker waits for nobody
      maxStaleness: 4 # until it is so many steps ahead of the slowest
""",
    Way.SCRIPT: """\
  strategy:
    type: DataParallel # of a script: it makes its own process group
""",
}
_LOOP: Final = """\
  trainer:
    model: MODULE:model # functions of MODULE.py
    dataset: MODULE:dataset
    loss: MODULE:loss
    evaluate: MODULE:evaluate # on split "test", at the end
    optimizer: {name: Adam, learningRate: 0.01}
    config: {hidden: 64} # handed to the functions as it is
    epochs: 40 # or maxSteps
    batchSize: BATCH # over all workers together
    # learningRateSchedule: {type: Cosine, warmupSteps: 50}
    # precision: BFloat16
    # evaluateEverySteps: 100
"""
_TRAINER: Final = {
    Way.DATA_PARALLEL: _LOOP,
    Way.PARAMETER_SERVER: _LOOP,
    Way.SCRIPT: """\
  trainer:
    script:
      file: MODULE.py # runs as under torchrun: RANK, WORLD_SIZE, MASTER_ADDR …
      args: ["--steps", "200"]
""",
}
_SERVERS: Final = """\
  parameterServer:
    replicas: 2 # each holds a part of the parameters
"""
_REST: Final = """\
  worker:
    replicas: WORKERS
    # gpusPerWorker: 1
    # template: {spec: {containers: [{name: trainer, resources: {requests: {cpu: "2", memory: 4Gi}}}]}}
  checkpoint: # a restart goes on from here, and so does: disttrain run --resume JOB.yaml
    volume: {persistentVolumeClaim: JOB-checkpoints} # of a local run the folder .disttrain/claims/JOB-checkpoints
    everySteps: 100
  # data:
  #   volume: {persistentVolumeClaim: JOB-data, path: /data}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: JOB-checkpoints
spec:
  accessModes: [ReadWriteOnce] # ReadWriteMany where the pods run on several nodes
  resources: {requests: {storage: 1Gi}}
"""
_MODEL: Final = '''\
"""The model and the data of the job JOB: dots that belong to one of two arms of a spiral. Put your own in their place."""

import math

import torch
from torch import nn
from torch.utils.data import TensorDataset


def model(config):
    """Any torch.nn.Module. config: trainer.config of the job."""
    hidden = config.get("hidden", 64)
    return nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2))


def dataset(config, split):
    """Any map-style data set: len(dataset), dataset[i]. split: "train" or "test"."""
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)  # the same data in each process
    angle = torch.rand(1000, generator=generator) * 3 * math.pi
    arm = torch.randint(0, 2, (1000,), generator=generator)
    dots = torch.stack([angle * torch.cos(angle + math.pi * arm), angle * torch.sin(angle + math.pi * arm)], dim=1)
    return TensorDataset(dots / 10, arm)


def loss(model, batch):
    """The mean loss of a batch."""
    dots, arm = batch
    return nn.functional.cross_entropy(model(dots), arm)


def evaluate(model, dataset):
    """Numbers by their names."""
    dots, arm = dataset.tensors
    return {"accuracy": (model(dots).argmax(dim=1) == arm).float().mean().item()}
'''
_SCRIPT: Final = '''\
"""The training of the job JOB, as under torchrun. Put your own in its place."""

import argparse

import torch
import torch.distributed as dist
from disttrain_trainer import session  # optional: progress in the status, checkpoints that survive a restart
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
steps = parser.parse_args().steps

dist.init_process_group("gloo")  # nccl with GPUs
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(10, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
truth = torch.randn(10, 1)

torch.manual_seed(1 + dist.get_rank())  # every rank draws samples of its own
for step in range(1, steps + 1):
    inputs = torch.randn(32, 10)
    loss = torch.nn.functional.mse_loss(model(inputs), inputs @ truth)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    session.report(step=step, loss=loss.item(), samples=len(inputs), total_steps=steps)

if dist.get_rank() == 0:
    print(f"done after {steps} steps: loss {loss.item():.6f}", flush=True)
    if (folder := session.checkpoint_dir()) is not None:
        torch.save(model.module.state_dict(), folder / "model.pt")
dist.destroy_process_group()
'''
