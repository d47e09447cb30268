"""User code that makes torch's default process group is refused in each place, by the field that names the code."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data.distributed import DistributedSampler

from disttrain_trainer.data.loader import fetcher
from disttrain_trainer.errors import OwnGroup, WrongInput
from disttrain_trainer.model.objective import Objective, cross_entropy
from disttrain_trainer.model.user_code import guarded, keep_sigterm, refusing_groups
from disttrain_trainer.runtime import machine


def by_torch() -> None:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:1", rank=0, world_size=1)


def by_a_mesh() -> None:
    init_device_mesh("cpu", (1,))


class Samples:
    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> int:
        by_torch()
        return number


class Joining(nn.Module):
    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        by_torch()
        return batch


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    by_torch()
    return torch.zeros(())


def collate(samples: list[Any]) -> Any:
    by_torch()


def fetched(dataset: Any, collate: Callable[[list[Any]], Any] | None = None) -> Any:
    return fetcher(dataset, device=torch.device("cpu"), field="trainer.dataset", collate=collate)(np.arange(2))


@pytest.mark.parametrize("make", [by_torch, by_a_mesh])
def test_a_factory_that_makes_a_group_is_named_with_its_line_and_torch_is_as_before(make: Callable[[], None]) -> None:
    original = dist.init_process_group
    with pytest.raises(OwnGroup) as raised, guarded("trainer.model"):
        make()
    where = f"{Path(__file__)}:{make.__code__.co_firstlineno + 1}"
    assert str(raised.value).startswith(f"trainer.model calls torch.distributed.init_process_group ({where})")
    assert dist.init_process_group is dist.distributed_c10d.init_process_group is original


@pytest.mark.parametrize(
    ("run", "field"),
    [
        (lambda: Objective(nn.Linear(1, 1), loss)(None, 1), "trainer.loss"),
        (lambda: Objective(Joining(), cross_entropy)((torch.ones(1, 1), torch.ones(1, 1)), 1), "trainer.model"),
        (lambda: fetched(Samples()), "trainer.dataset"),
        (lambda: fetched([1, 2], collate), "trainer.collate"),
    ],
)
def test_what_makes_a_group_in_the_training_loop_is_named_by_its_field(run: Callable[[], Any], field: str) -> None:
    with pytest.raises(OwnGroup, match=rf"{field} calls .*\(.*test_user_code.py:\d+\)"), refusing_groups("here"):
        run()


def test_a_module_that_took_the_name_while_it_was_imported_is_refused_later_and_harmless_outside() -> None:
    with guarded("trainer.model"):
        taken = dist.init_process_group
    with pytest.raises(OwnGroup, match=r"trainer\.evaluate calls"), guarded("trainer.evaluate"):
        taken("gloo")
    with pytest.raises(RuntimeError, match="no-such-scheme"):  # torch's own answer
        taken("gloo", init_method="no-such-scheme://")


@pytest.fixture
def handles_sigterm() -> Iterator[None]:
    end = machine.on_sigterm(lambda: None)
    yield
    end()


@pytest.mark.usefixtures("handles_sigterm")
def test_a_handler_of_sigterm_that_a_loss_sets_is_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    ours = signal.getsignal(signal.SIGTERM)
    for _ in range(3):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        keep_sigterm("trainer.loss")
        assert signal.getsignal(signal.SIGTERM) is ours
    assert caplog.text.count("trainer.loss replaces the handler of SIGTERM") == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.parallel.DistributedDataParallel(nn.Linear(1, 1)),
        lambda: DistributedSampler([1, 2]),  # type: ignore[arg-type]
        lambda: dist.get_rank(),
    ],
)
def test_a_factory_that_needs_a_group_is_reported_to_do_without(make: Callable[[], object]) -> None:
    with (
        pytest.raises(
            WrongInput, match=r"^trainer\.model uses torch's default process group \(.*test_user_code.py:\d+\)"
        ),
        guarded("trainer.model"),
    ):
        make()
