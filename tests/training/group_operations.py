"""What torch does with a group, on plain gloo, on ours over gloo and on ours under TLS: the results of each are to be the same.

Values are small integers, of which every sum is exact, whatever its order.
"""

from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import transports
from disttrain_trainer.parallel.process_group import AbortableProcessGroup
from disttrain_trainer.parallel.rendezvous_store import RendezvousStore

SIZE = 4
TIMEOUT = timedelta(seconds=60)


def run(results: Connection, what: str, rank: int, port: int, rendezvous: str, tls: Path) -> None:
    """Sends three lists of tensors as nested lists: gloo's results, ours over gloo, and ours under TLS.

    port: of torch's store. rendezvous: address of ours. tls: folder of the certificate.
    """
    torch.set_num_threads(1)
    operations: Callable[[int], list[torch.Tensor]] = globals()[what]
    transport = transports.certified_by(tls)

    def store(prefix: str) -> dist.Store:
        connected = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)
        return dist.PrefixStore(prefix, connected)

    def secure_store() -> dist.Store:
        return RendezvousStore(transport, rendezvous, prefix="ours", timeout=TIMEOUT)

    def calculated() -> list[Any]:
        torch.manual_seed(0)
        return [tensor.tolist() for tensor in operations(rank)]

    dist.init_process_group("gloo", store=store("gloo"), rank=rank, world_size=SIZE, timeout=TIMEOUT)
    expected = calculated()
    dist.destroy_process_group()
    found = []
    for group, its_store in (
        (AbortableProcessGroup(), lambda: store("ours")),
        (AbortableProcessGroup(transport=transport), secure_store),
    ):
        with group.joined("gloo", store=its_store, rank=rank, size=SIZE, timeout=TIMEOUT):
            assert dist.get_backend() == "disttrain"
            found.append(calculated())
    results.send((expected, *found))


def values(rank: int, count: int = 8) -> torch.Tensor:
    return torch.randint(-8, 9, (count,), generator=torch.Generator().manual_seed(rank)).float()


def dtypes(rank: int) -> list[torch.Tensor]:
    """Sums and others of each dtype, of few elements and of so many that they travel in pieces, and of a tensor that is not contiguous."""
    found = []
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
    ):
        for count in (3, 1_000_003):
            whole = (values(rank, count) % 5).to(dtype)
            shared, largest, product = whole.clone(), whole.clone(), whole.clone()
            dist.all_reduce(whole)
            dist.broadcast(shared, 1)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            dist.all_reduce(product, op=dist.ReduceOp.PRODUCT)
            found += [tensor[:: max(1, count // 7)].double() for tensor in (whole, shared, largest, product)]
    bits = values(rank).to(torch.int32)
    for op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR):
        mine = bits.clone()
        dist.all_reduce(mine, op=op)
        found.append(mine)
    columns, part = values(rank, 80_000).view(200, 400).t(), torch.zeros(300_000)
    dist.all_reduce(columns)
    dist.reduce_scatter_tensor(part, values(rank, 300_000 * SIZE))
    return [*found, columns[::50, ::50], part[::50_000]]


def collectives(rank: int) -> list[torch.Tensor]:
    """Each collective, waited for at once and later."""
    found: list[torch.Tensor] = []
    for late in (False, True):

        def done(call: Callable[..., Any], *tensors: Any, late: bool = late, **keywords: Any) -> None:
            work = call(*tensors, async_op=late, **keywords)
            if late:
                assert work.wait()

        mine, two = values(rank), [values(rank), values(rank + 10)]
        many = [torch.zeros(8) for _ in range(SIZE)]
        parts, whole = list(values(rank, 8 * SIZE).chunk(SIZE)), torch.zeros(8 * SIZE)
        part, own = torch.zeros(8), torch.zeros(8)
        done(dist.all_reduce, mine)
        done(dist.all_reduce_coalesced, two)
        done(dist.all_gather, many, mine)
        done(dist.all_gather_into_tensor, whole, mine)
        found += [mine, *two, *many, whole.clone()]
        done(dist.reduce_scatter, part, parts)
        found.append(part.clone())
        done(dist.reduce_scatter_tensor, part, values(rank, 8 * SIZE), op=dist.ReduceOp.AVG)
        done(dist.all_to_all_single, whole, values(rank, 8 * SIZE))
        done(dist.all_to_all, many, parts)
        found += [part, whole, *many]
        largest, shared = values(rank), values(rank)
        done(dist.reduce, largest, 1, op=dist.ReduceOp.MAX)
        done(dist.broadcast, shared, 2)
        gathered = [torch.zeros(8) for _ in range(SIZE)] if rank == 3 else None
        done(dist.gather, values(rank), gathered, 3)
        done(dist.scatter, own, parts if rank == 0 else None, 0)
        found += [largest if rank == 1 else shared, shared, own, *(gathered or [])]
        done(dist.barrier)
    numbers: list[Any] = [None] * SIZE
    dist.all_gather_object(numbers, {"rank": rank})
    return [*found, torch.tensor([number["rank"] for number in numbers])]


def functional_collectives(rank: int) -> list[torch.Tensor]:
    """Those of DTensor and of compiled code, with their gradients."""
    group = dist.group.WORLD
    mine = values(rank).requires_grad_()
    found = [
        functional.all_reduce(mine.detach(), "sum", group) + 0,
        functional.broadcast(mine.detach(), 1, group) + 0,
        functional.all_to_all_single(mine.detach(), None, None, group) + 0,
        *(tensor + 0 for tensor in functional.all_gather_into_tensor_coalesced([mine.detach()] * 2, group)),
        *(tensor + 0 for tensor in functional.reduce_scatter_tensor_coalesced([mine.detach()], "sum", [0], group)),
        *(tensor + 0 for tensor in functional.all_reduce_coalesced([mine.detach()] * 2, "sum", group)),
    ]
    gathered = functional.all_gather_tensor_autograd(mine, 0, group)
    scattered = functional.reduce_scatter_tensor_autograd(gathered * (rank + 1), "sum", 0, group)
    scattered.square().sum().backward()  # type: ignore[no-untyped-call]
    assert mine.grad is not None
    return [*found, scattered.detach(), mine.grad]


def messages(rank: int) -> list[torch.Tensor]:
    """Sends and receives, alone and several at once."""
    right, left = (rank + 1) % SIZE, (rank - 1) % SIZE
    got, large = torch.zeros(8), torch.zeros(1_000_000)
    receive = dist.irecv(got, left)
    dist.send(values(rank), right)
    assert receive is not None
    receive.wait()
    operations = [dist.P2POp(dist.isend, values(rank, len(large)), right), dist.P2POp(dist.irecv, large, left)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return [got, large.sum()]


def subgroups(rank: int) -> list[torch.Tensor]:
    """Groups of a mesh of two by two, and one of some ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    found = []
    for name in ("a", "b"):
        mine = values(rank)
        dist.all_reduce(mine, group=mesh.get_group(name))
        found.append(mine)
    some = dist.new_group([0, 2, 3])
    mine = values(rank)
    if rank != 1:
        dist.all_reduce(mine, group=some)
    return [*found, mine]


def tensor_parallel(rank: int) -> list[torch.Tensor]:
    """A step of a model that is cut by columns and by rows."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    mesh = init_device_mesh("cpu", (SIZE,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(values(0)).square().sum().backward()
    optimizer.step()
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def pipeline(rank: int) -> list[torch.Tensor]:
    """A step of four stages."""
    layer = [nn.Linear(8, 8) for _ in range(SIZE)][rank]
    stage = PipelineStage(layer, rank, SIZE, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=nn.functional.mse_loss)
    rows = values(0, 16 * 8).view(16, 8)
    losses: list[torch.Tensor] = []
    if rank == 0:
        schedule.step(rows)
    elif rank == SIZE - 1:
        schedule.step(target=rows, losses=losses)
    else:
        schedule.step()
    return [*losses, *(p.grad for p in layer.parameters() if p.grad is not None)]
