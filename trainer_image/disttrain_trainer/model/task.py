"""What is trained: model, data and loss of a job, made from its factories. The same for every strategy."""

import hashlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from disttrain.api.environment import HASH_SEED
from disttrain.api.policies import Tls
from disttrain.api.precision import Precision
from disttrain.api.runtime import JobConfig
from disttrain.api.trainer import Backend, LastBatch
from disttrain_trainer.data import loading
from disttrain_trainer.data import stream as streams
from disttrain_trainer.data.chance import mix
from disttrain_trainer.data.loader import Fetcher, fetcher, fingerprint_of
from disttrain_trainer.data.loader_processes import NotForeseen
from disttrain_trainer.data.loading import Loading
from disttrain_trainer.data.opening import Reading
from disttrain_trainer.data.order import KeyedPermutation, Order
from disttrain_trainer.data.packed_dataset import PackedDataset
from disttrain_trainer.data.read_ahead import ReadAhead
from disttrain_trainer.data.schedule import BatchPart, DataSet, Schedule
from disttrain_trainer.data.stream import Stream, StreamOrder
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.model import parameter_groups
from disttrain_trainer.model.evaluation import Evaluator
from disttrain_trainer.model.factories import add_current_folder, resolve
from disttrain_trainer.model.factory_optimizer import MakeOptimizer
from disttrain_trainer.model.hooks import Hooks, HookTask
from disttrain_trainer.model.learning_rate import LearningRate
from disttrain_trainer.model.mapped import LargeInFiles
from disttrain_trainer.model.module import prepare
from disttrain_trainer.model.objective import Loss, cross_entropy
from disttrain_trainer.model.precision import Autocast
from disttrain_trainer.model.user_code import guarded, refusing_groups
from disttrain_trainer.runtime import logs, machine
from disttrain_trainer.runtime.user_files import make_importable

log = logs.get_logger(__name__)

_IN_MEMORY = 16
"""The share of the memory that the first tensors of a model take which is cut over the workers; the others lie in files."""
_TRIED_SAMPLES = 2
"""BatchNorm refuses one."""


@dataclass(slots=True, kw_only=True)
class Task:
    """The user's part of a training, ready to be stepped through."""

    model: nn.Module
    make_model: Callable[[], nn.Module]
    """Calls the factory once more: the same parameters and buffers in a new module. Raises as `build`."""
    loss: Loss
    schedule: Schedule
    learning_rate: LearningRate
    make_optimizer: MakeOptimizer | None
    """Calls trainer.optimizer.factory; None without."""
    data: DataSet
    fetch: Fetcher
    device: torch.device
    evaluate: Evaluator | None
    """Evaluates a model of the factory's on the test data."""

    batches_per_step: int = 1
    """Batches of a full step whose gradients add up: parts, and their portions."""
    seeds_all: bool
    """Python's and numpy's generators are set for each part, too: see `notice_draws`."""
    read_ahead: Callable[[int], None] | None = None
    """Has the samples of the parts after this one read in the background."""
    loading: Loading | None = None
    """The processes of trainer.loaderWorkers."""
    stream: Stream | None = None
    """Of an iterable data set: what the batches are made of, in place of `fetch`."""
    precision: Precision = Precision.FLOAT32
    hooks: Hooks | None = None

    @property
    def autocast(self) -> Autocast:
        """Around each forward: the precision of the job on this device."""
        return Autocast(self.precision, self.device)

    def batch(self, part: BatchPart) -> Any:
        """The samples of a part, on the device. The generators are where the samples left them: `seed` comes after it."""
        if self.stream is not None:
            return self.fetch.place(self.stream.take(part))
        if self.loading is not None and part.samples:  # else a stand-in
            with suppress(NotForeseen):
                return self.fetch.place(self.loading.take(part))
        elif self.read_ahead is not None:
            self.read_ahead(part.index)
        return self.fetch(part.indices, part.epoch)

    def first_samples(self) -> Any:
        """A few samples of the training's first part, for a forward that whole and cut model both compute; seeds it as the part."""
        part = self.schedule.part(0)
        batch = self.fetch(part.indices[:_TRIED_SAMPLES], part.epoch)
        self.seed(part)
        return batch

    def seed(self, part: BatchPart, *, others: bool = False) -> None:
        """Sets torch's generator for a part, so that dropout does not depend on who computes the part, nor on restarts.

        others: those of Python and numpy, too, so that `notice_draws` can tell. To set them costs more than a small model's step: in each
        part only with `deterministic`, where several ranks compute a part together, where samples have set them (data/chance.py), and
        once the model or its loss has drawn from them. Else they go on from where `seed_process` set them.
        """
        seed = self._seed_of(part)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        if self.seeds_all or others:
            _seed_others(seed)

    def notice_draws(self, part: BatchPart) -> None:
        """After the loss of a part that was seeded with `others`: where the model or its loss has drawn from Python's or
        numpy's generator, these are set for each part from now on."""
        if self.seeds_all:
            return
        drawn = _state_of_others()
        _seed_others(self._seed_of(part))
        self.seeds_all = drawn != _state_of_others()

    def _seed_of(self, part: BatchPart) -> int:
        seed = mix(self.schedule.seed, part.index)
        return mix(seed, part.batch) if part.batch else seed


def _seed_others(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def _state_of_others() -> tuple[object, bytes, int]:
    of_numpy: Any = np.random.get_state()
    return random.getstate(), of_numpy[1].tobytes(), of_numpy[2]


def seed_all(seed: int) -> None:
    """Seeds the generators of torch, Python and numpy."""
    torch.manual_seed(seed)
    _seed_others(seed)


@contextmanager
def factory_seeds(seed: int) -> Iterator[None]:
    """Around each call of a factory: every process makes the same, and a dataset draws the same split each time.

    Afterwards the generators go on where they were, or all workers would draw the same numbers from there on.
    """
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seed_all(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def seed_process(seed: int, *, rank: int, incarnation: str) -> None:
    """Seeds the generators of this process unlike those of any other, and unlike those of the process that it replaces.

    A dataset that draws from numpy or `random` as it loads a sample, to augment it, would otherwise draw the same in every worker.
    """
    identity = int.from_bytes(hashlib.sha256(f"{rank} {incarnation}".encode()).digest()[:8]) >> 1
    seed_all(mix(seed, identity))


def build(config: JobConfig, *, rank: int, local_rank: int, incarnation: str) -> Task:
    """Makes the task of one process. Raises WrongInput, or what the user's factories raise."""
    trainer, loop = config.trainer, config.trainer.loop
    add_current_folder()
    make_importable(os.environ)
    resolved = {
        "trainer.model": _resolve("trainer.model", loop.model, "config"),
        "trainer.dataset": _resolve("trainer.dataset", loop.dataset, "config", "split"),
    }
    collate = _resolve("trainer.collate", loop.collate, "samples") if loop.collate else None
    loss = _resolve("trainer.loss", loop.loss, "model", "batch") if loop.loss else cross_entropy
    evaluate = _resolve("trainer.evaluate", loop.evaluate, "model", "dataset") if loop.evaluate else None
    hooks = Hooks.of(config)
    if trainer.deterministic:
        be_deterministic()
    device = choose_device(config, local_rank=local_rank)
    options = dict(trainer.config or {})

    def make_model() -> nn.Module:
        # A process that keeps a part of the model has no need of memory for all of it.
        whole = LargeInFiles(after=machine.memory() // _IN_MEMORY) if config.strategy.is_sharded else nullcontext()
        with guarded("trainer.model"), factory_seeds(trainer.seed), whole:
            model = resolved["trainer.model"](dict(options))
        if not isinstance(model, nn.Module):
            raise WrongInput(
                f"trainer.model: {loop.model!r} returned a {type(model).__name__}; expected a torch.nn.Module"
            )
        prepare(model)
        return model

    model = make_model()
    parameter_groups.check(loop.optimizer, [name for name, _ in model.named_parameters()])
    Reading.url = config.data.url if config.data is not None else None
    with guarded("trainer.dataset"), factory_seeds(trainer.seed):
        dataset = resolved["trainer.dataset"](dict(options), "train")
        field = f"trainer.dataset: {loop.dataset!r}"
        stream = streams.of(config, dataset, field=field, collate=collate, rank=rank)
        fetch = (
            fetcher(dataset, device=device, field=field, collate=collate, seed=trainer.seed)
            if stream is None
            else stream.fetcher(device)
        )
        packed = dataset if isinstance(dataset, PackedDataset) else None
        order: Order | None = packed.order(trainer.seed) if packed is not None else None
        if stream is not None:
            order = StreamOrder()
        if packed is not None and evaluate is not None:
            resolved["trainer.dataset"](
                dict(options), "test"
            )  # what is wrong with it is not to be seen at the end only
        data = DataSet(
            len(dataset) if stream is None else streams.SAMPLES,
            fingerprint_of(dataset),
            order.name if order is not None else KeyedPermutation.name,
        )
    model.to(device)
    autocast = Autocast(trainer.precision, device)
    autocast.check(model)
    schedule = schedule_of(config, data.samples, order)
    read_ahead = None
    if packed is not None:
        _check_partitions(config, packed)
        steps = max(1, packed.ahead // trainer.batch_size)
        read_ahead = ReadAhead(Schedule.of(config, data.samples, order), steps, packed.read_ahead)

    evaluator = None
    if evaluate is not None:
        evaluator = Evaluator(
            evaluate,
            name=str(loop.evaluate),
            dataset=lambda: resolved["trainer.dataset"](dict(options), "test"),
            seeds=partial(factory_seeds, trainer.seed),
            mode=autocast.evaluating,
        )
    if stream is not None and trainer.nan_policy is not None:
        raise WrongInput(
            "trainer.nanPolicy: the samples of an iterable data set have no numbers by which they could be left out: use a map-style one"
        )
    if hooks is not None:
        total = schedule.total_steps
        hooks.start(HookTask(model=model, config=options, rank=rank, world_size=config.world_size, total_steps=total))
    seed_process(trainer.seed, rank=rank, incarnation=incarnation)
    around = partial(refusing_groups, "trainer.dataset")
    ahead = Schedule.of(config, data.samples, order)
    return Task(
        model=model,
        make_model=make_model,
        loss=loss,
        schedule=schedule,
        learning_rate=LearningRate(trainer.learning_rate_schedule, schedule.total_steps),
        make_optimizer=_make_optimizer(config),
        data=data,
        fetch=fetch,
        device=device,
        evaluate=evaluator,
        batches_per_step=config.parts_per_step * trainer.gradient_accumulation_steps,
        seeds_all=trainer.deterministic or config.strategy.model_parallel_size > 1 or fetch.by_sample,
        read_ahead=read_ahead,
        precision=trainer.precision,
        loading=loading.begin(config, fetch=fetch, schedule=ahead, dataset=dataset, around=around)
        if stream is None
        else None,
        stream=stream,
        hooks=hooks,
    )


def _make_optimizer(config: JobConfig) -> MakeOptimizer | None:
    trainer = config.trainer
    if (name := trainer.loop.optimizer.factory) is None:
        return None
    field = "trainer.optimizer.factory"
    function = _resolve(field, name, "parameters", "config")

    def make(parameters: list[nn.Parameter]) -> Any:
        with guarded(field), factory_seeds(trainer.seed):
            return function(parameters, dict(trainer.config or {}))

    return make


def _check_partitions(config: JobConfig, packed: PackedDataset) -> None:
    wanted, there = config.data and config.data.partitions, len(packed.index.partitions)
    if wanted is not None and wanted != there:
        raise WrongInput(
            f"data.partitions is {wanted}, but {packed.store.where()} was packed into {there}: set it to {there}, or leave it out"
        )


def _resolve(field: str, name: str, *arguments: str) -> Callable[..., Any]:
    with guarded(field):  # importing a module runs its code
        return resolve(field, name, *arguments)


def schedule_of(config: JobConfig, samples: int, order: Order | None) -> Schedule:
    trainer = config.trainer
    portions = trainer.gradient_accumulation_steps
    if portions > 1 and trainer.batch_size < (least := config.parts_per_step * portions):
        raise WrongInput(
            f"trainer.gradientAccumulationSteps: a part of the batch has {trainer.batch_size} / {config.parts_per_step} samples, fewer "
            f"than {portions} portions: lower it, or set trainer.batchSize to {least} or more"
        )
    if trainer.last_batch is LastBatch.DROP and samples < trainer.batch_size:
        raise WrongInput(
            f"trainer.lastBatch: Drop leaves nothing: trainer.dataset has {samples} samples, and trainer.batchSize is "
            f"{trainer.batch_size}; lower batchSize, or set lastBatch to Keep"
        )
    return Schedule.of(config, samples, order)


def choose_device(config: JobConfig, *, local_rank: int) -> torch.device:
    """The GPU of this process, or the CPU. Raises WrongInput when the job asks for GPUs and none is there."""
    if config.gpus_per_worker == 0:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise WrongInput(
            f"worker.gpusPerWorker is {config.gpus_per_worker}, but torch sees {torch.cuda.device_count()} GPUs here; "
            "use a node and an image with CUDA, or set it to 0"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_backend(config: JobConfig, device: torch.device) -> str:
    """nccl between GPUs, gloo elsewhere and for encrypted traffic, which NCCL has not, unless the job says which."""
    if config.trainer.backend is not Backend.AUTO:
        return str(config.trainer.backend.value)
    return "nccl" if device.type == "cuda" and config.tls is Tls.DISABLED else "gloo"


def be_deterministic() -> None:
    """torch.use_deterministic_algorithms, but torch._inductor, seconds of a start, is imported only by who uses it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if not os.environ.get(HASH_SEED, "").isdecimal():
        log.warning(
            "trainer.deterministic: %s is %s, so that a set of strings has another order in each process; leave it to the job",
            HASH_SEED,
            os.environ.get(HASH_SEED, "not set"),
        )
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(True)
    else:
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # read by torch._inductor, should it ever be imported
        torch.set_deterministic_debug_mode("error")
