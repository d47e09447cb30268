"""What is trained: model, data and loss of a job, made from its factories. The same for every strategy."""

import hashlib
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from disttrain.api.environment import HASH_SEED
from disttrain.api.policies import Tls
from disttrain.api.runtime import JobConfig
from disttrain.api.trainer import Backend, LastBatch
from disttrain_trainer.data.loader import Fetch, fetcher, fingerprint_of
from disttrain_trainer.data.opening import Reading
from disttrain_trainer.data.order import KeyedPermutation, Order
from disttrain_trainer.data.packed_dataset import PackedDataset
from disttrain_trainer.data.read_ahead import ReadAhead
from disttrain_trainer.data.schedule import BatchPart, DataSet, Schedule
from disttrain_trainer.errors import OwnGroup, UserError, WrongInput
from disttrain_trainer.model.evaluation import Evaluation, numbers_of
from disttrain_trainer.model.factories import add_current_folder, place_of, resolve
from disttrain_trainer.model.loss_weight import weight_of
from disttrain_trainer.model.module import evaluating, prepare
from disttrain_trainer.model.user_code import guarded
from disttrain_trainer.runtime import logs, machine
from disttrain_trainer.runtime.termination import of_user_error
from disttrain_trainer.runtime.user_files import make_importable

log = logs.get_logger(__name__)

Loss = Callable[[nn.Module, Any], Any]
"""Returns the mean loss of a batch, or (mean, weight)."""
MOST_WEIGHTLESS = 50
"""Losses from the first one on that may have the weight 0: batches without targets."""
IDLE_STEPS = 3
"""Losses from the first one on that may teach nothing."""


@dataclass(slots=True, kw_only=True)
class Task:
    """The user's part of a training, ready to be stepped through."""

    model: nn.Module
    make_model: Callable[[], nn.Module]
    """Calls the factory once more: the same parameters and buffers in a new module. Raises as `build`."""
    loss: Loss
    schedule: Schedule
    data: DataSet
    fetch: Fetch
    device: torch.device
    evaluate: Callable[[nn.Module], Evaluation] | None
    """Evaluates a model of the factory's on the test data."""

    seeds_all: bool
    """Python's and numpy's generators are set for each part, too."""
    read_ahead: Callable[[int], None] | None = None
    """Has the samples of the parts after this one read in the background."""

    def batch(self, part: BatchPart) -> Any:
        """The samples of a part, on the device."""
        if self.read_ahead is not None:
            self.read_ahead(part.index)
        return self.fetch(part.indices)

    def seed(self, part: BatchPart) -> None:
        """Sets torch's generator for a part, so that dropout does not depend on who computes the part, nor on restarts.

        Those of Python and numpy, which a dataset may use, cost more than a small model's step: only with `deterministic`, and where
        several ranks compute a part together, which must read the same samples. Else they go on from where `seed_process` set them.
        """
        seed = mix(self.schedule.seed, part.index)
        if part.batch:
            seed = mix(seed, part.batch)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        if self.seeds_all:
            random.seed(seed)
            np.random.seed(seed & 0xFFFFFFFF)


def mix(seed: int, number: int) -> int:
    """A seed of 64 bits for each pair of numbers below 2^63: another one for each number, and seemingly unrelated (splitmix64)."""
    mask = (1 << 64) - 1
    seed = (seed * 0x9E3779B97F4A7C15 + number) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        seed = (seed ^ (seed >> shift)) * factor & mask
    return seed ^ (seed >> 31)


def seed_all(seed: int) -> None:
    """Seeds the generators of torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


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
    if trainer.deterministic:
        be_deterministic()
    device = choose_device(config, local_rank=local_rank)
    options = dict(trainer.config or {})

    def make_model() -> nn.Module:
        with guarded("trainer.model"), factory_seeds(trainer.seed):
            model = resolved["trainer.model"](dict(options))
        if not isinstance(model, nn.Module):
            raise WrongInput(
                f"trainer.model: {loop.model!r} returned a {type(model).__name__}; expected a torch.nn.Module"
            )
        prepare(model)
        return model

    model = make_model()
    Reading.url = config.data.url if config.data is not None else None
    with guarded("trainer.dataset"), factory_seeds(trainer.seed):
        dataset = resolved["trainer.dataset"](dict(options), "train")
        fetch = fetcher(dataset, device=device, field=f"trainer.dataset: {loop.dataset!r}", collate=collate)
        packed = dataset if isinstance(dataset, PackedDataset) else None
        order = packed.order(trainer.seed) if packed is not None else None
        if packed is not None and evaluate is not None:
            resolved["trainer.dataset"](
                dict(options), "test"
            )  # what is wrong with it is not to be seen at the end only
        data = DataSet(
            len(dataset), fingerprint_of(dataset), order.name if order is not None else KeyedPermutation.name
        )
    model.to(device)
    schedule = _schedule(config, data.samples, order)
    read_ahead = None
    if packed is not None:
        _check_partitions(config, packed)
        steps = max(1, packed.ahead // trainer.batch_size)
        read_ahead = ReadAhead(Schedule.of(config, data.samples, order), steps, packed.read_ahead)

    def evaluate_on_test(evaluate: Callable[..., Any], model: nn.Module) -> Evaluation:
        with guarded("trainer.evaluate"), factory_seeds(trainer.seed):
            test = resolved["trainer.dataset"](dict(options), "test")
            with evaluating(model), torch.no_grad():
                found = evaluate(model, test)
        return numbers_of(found, loop.evaluate)

    seed_process(trainer.seed, rank=rank, incarnation=incarnation)
    return Task(
        model=model,
        make_model=make_model,
        loss=loss,
        schedule=schedule,
        data=data,
        fetch=fetch,
        device=device,
        evaluate=partial(evaluate_on_test, evaluate) if evaluate else None,
        seeds_all=trainer.deterministic or config.strategy.model_parallel_size > 1,
        read_ahead=read_ahead,
    )


def _check_partitions(config: JobConfig, packed: PackedDataset) -> None:
    wanted, there = config.data and config.data.partitions, len(packed.index.partitions)
    if wanted is not None and wanted != there:
        raise WrongInput(
            f"data.partitions is {wanted}, but {packed.store.where()} was packed into {there}: set it to {there}, or leave it out"
        )


def _resolve(field: str, name: str, *arguments: str) -> Callable[..., Any]:
    with guarded(field):  # importing a module runs its code
        return resolve(field, name, *arguments)


def _schedule(config: JobConfig, samples: int, order: Order | None) -> Schedule:
    trainer = config.trainer
    if trainer.last_batch is LastBatch.DROP and samples < trainer.batch_size:
        raise WrongInput(
            f"trainer.lastBatch: Drop leaves nothing: trainer.dataset has {samples} samples, and trainer.batchSize is "
            f"{trainer.batch_size}; lower batchSize, or set lastBatch to Keep"
        )
    return Schedule.of(config, samples, order)


class LossOf(Protocol):
    """What the loop computes of a batch."""

    def __call__(self, batch: Any, samples: int) -> tuple[torch.Tensor, float | None]:
        """The mean loss of so many samples, a scalar, and its weight; None: the number of samples. Raises UserError."""

    def learned_nothing(self) -> None:
        """After a backward that reached no parameter. Raises UserError when none of the first ones did."""


class Objective:
    """The user's loss of a batch, checked to be one."""

    def __init__(self, model: nn.Module, loss: Loss, *, reads_weights: bool = True) -> None:
        """reads_weights: a loss that returns its mean alone counts by what its graph says that it is the mean of. Without effect, and so
        left out, where nothing is added up: a batch is one part."""
        self._model = model
        self._loss = loss
        self._reads_weights = reads_weights
        self._calls = self._idle = self._weightless = 0
        self._warned = False
        self._kinds = set[bool]()
        """Whether a weight was read, of the losses that count by something else than samples, and of those whose graph says nothing."""

    def __call__(self, batch: Any, samples: int) -> tuple[torch.Tensor, float | None]:
        """The mean loss of a batch of so many samples, a scalar with a graph; and the weight of that mean, which the loss returns, or its
        graph says. None: the samples.

        A mean of weight 0 may be anything: it counts for nothing. Raises UserError.
        """
        self._calls += 1
        try:
            loss, weight = self._of_user(batch), None
        except OwnGroup as error:
            raise error.by("trainer.model" if self._loss is cross_entropy else "trainer.loss") from None
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"trainer.batchSize: BatchNorm cannot train on the one sample of a worker's part: {error}; give each worker two or more, "
                f"or use another normalization in trainer.model ({of_user_error(error)[1].where})"
            ) from None
        if isinstance(loss, tuple | list):
            loss, weight = self._split(loss)
        if not isinstance(loss, torch.Tensor) or loss.dim():
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
            raise UserError(
                f"trainer.loss returned a {type(loss).__name__}{shape}; expected the batch's mean loss, a scalar tensor, "
                f"or (mean, weight){place_of(self._loss)}"
            )
        if weight is not None:
            self._look_at(weight)
        elif self._reads_weights:
            weight = self._read(loss, samples)
        if weight == 0:
            return loss, weight
        if not loss.requires_grad:
            raise UserError(
                "trainer.loss returned a loss that no parameter of trainer.model can learn from: it was computed without autograd, as "
                f"after detach(), item() or numpy(), or under torch.no_grad(){place_of(self._loss)}"
            )
        if loss.is_complex():
            raise UserError(f"trainer.loss returned a {loss.dtype}; expected a real number{place_of(self._loss)}")
        return loss, weight

    def _read(self, loss: torch.Tensor, samples: int) -> float | None:
        """What the graph says that the mean is over; None: samples, or it does not say. Raises UserError when none has counted."""
        weight = weight_of(loss)
        if weight == samples:
            return None
        self._weightless += weight == 0
        if self._weightless == self._calls == MOST_WEIGHTLESS:
            raise UserError(
                f"trainer.loss divided by 0 in each of its first {MOST_WEIGHTLESS} calls, so that nothing was trained: its mask leaves "
                f"nothing, or every target is ignored{place_of(self._loss)}"
            )
        self._kinds.add(weight is not None)
        if len(self._kinds) == 2 and not self._warned:
            self._warned = True
            log.warning(
                "trainer.loss is a mean over something else than samples, such as tokens, in some batches, and a sum of several terms, or "
                "of another form, in others, which count by their samples: return (mean, weight)%s",
                place_of(self._loss),
            )
        return weight

    def _of_user(self, batch: Any) -> Any:
        try:
            found = self._loss(self._model, batch)
        except BaseException as error:
            machine.leave_forked_child(error)
            raise
        machine.leave_forked_child()
        return found

    def _look_at(self, weight: float) -> None:
        """Whether the second value is a weight at all, and not an accuracy or another figure. Raises UserError when none has counted."""
        self._weightless += weight == 0
        if self._weightless == self._calls == MOST_WEIGHTLESS:
            raise UserError(
                f"trainer.loss returned (mean, 0) in each of its first {MOST_WEIGHTLESS} calls, so that nothing was trained: the second "
                f"value is the weight of the mean, such as a number of tokens; return the mean alone{place_of(self._loss)}"
            )
        if not self._warned and (0 < weight < 1 or self._weightless == self._calls == IDLE_STEPS):
            self._warned = True
            log.warning(
                "trainer.loss returned (mean, %g): the second value is taken as the weight of the mean, such as a number of tokens; if it "
                "is another figure, return the mean alone%s",
                weight,
                place_of(self._loss),
            )

    def learned_nothing(self) -> None:
        """After a backward that reached no parameter. Raises UserError when none of the first ones did: one batch may have no targets."""
        self._idle += 1
        if self._idle == self._calls == IDLE_STEPS:
            raise UserError(
                f"trainer.loss returned a loss whose graph reaches no parameter of trainer.model, {IDLE_STEPS} times in a row: it is of "
                f"another model, or requires_grad was set after detach(){place_of(self._loss)}"
            )

    def _split(self, returned: Sequence[Any]) -> tuple[Any, float]:
        if len(returned) != 2:
            raise UserError(
                f"trainer.loss returned {len(returned)} values; expected the batch's mean loss, or (mean, weight), such as the number of "
                f"tokens that it is the mean of{place_of(self._loss)}"
            )
        loss, given = returned
        try:
            weight = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError, RuntimeError):
            weight = math.nan
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(
                f"trainer.loss returned the weight {given!r:.100}; expected a number of 0 or more, such as the number of tokens that the "
                f"loss is the mean of{place_of(self._loss)}"
            )
        return loss, weight


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss where the job names none: cross entropy of (input, target). Raises UserError for data that it does not fit."""
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        count = f" of {len(batch)}" if isinstance(batch, list | tuple | dict) else ""
        raise UserError(
            "trainer.loss is not set, which means cross entropy of (input, target), but a batch of trainer.dataset is a "
            f"{type(batch).__name__}{count}: set trainer.loss"
        )
    inputs, targets = batch
    outputs = model(inputs)
    try:
        return nn.functional.cross_entropy(outputs, targets)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        what = [
            f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            for x in (outputs, targets)
        ]
        raise UserError(
            f"trainer.loss is not set, and cross entropy of what the model gives ({what[0]}) and the targets ({what[1]}) "
            f"fails: {error}: set trainer.loss"
        ) from None


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
