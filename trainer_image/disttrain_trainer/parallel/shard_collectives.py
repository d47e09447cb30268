"""FSDP2's two collectives on gloo, from operations that gloo does better.

A reduce-scatter is an all-to-all, and each rank adds up what it got: the bytes that must travel, once. gloo's own reduces in a ring or a
tree of whole messages, and takes 1.5 to 3 times as long. An all-gather is one broadcast from each rank, all at once; gloo's own goes
round a ring step by step.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

_MOST_BROADCASTS = 8
"""Ranks up to which an all-gather is made of broadcasts: each of them costs its start."""


class GatherByBroadcasts(DefaultAllGather):
    """FSDP2's all-gather."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        size = group.size()
        if async_op or size > _MOST_BROADCASTS:
            return super().__call__(output_tensor, input_tensor, group, async_op)
        parts = output_tensor.chunk(size)
        own = parts[group.rank()]
        if own.data_ptr() != input_tensor.data_ptr():
            own.copy_(input_tensor)
        works = [
            dist.broadcast(part, group=group, group_src=source, async_op=True) for source, part in enumerate(parts)
        ]
        for work in works:
            if work is not None:
                work.wait()
        return None


class ReduceByExchange(DefaultReduceScatter):
    """FSDP2's reduce-scatter. The order of the additions is that of the ranks: the same bits each time."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        if async_op or op != dist.ReduceOp.SUM:
            return super().__call__(output_tensor, input_tensor, group, op, async_op)
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), 0, out=output_tensor)
        return None


def use(module: FSDPModule) -> None:
    """Gives a wrapped module these collectives. For gloo: another backend has better ones of its own."""
    module.set_custom_all_gather(GatherByBroadcasts())
    module.set_custom_reduce_scatter(ReduceByExchange())
