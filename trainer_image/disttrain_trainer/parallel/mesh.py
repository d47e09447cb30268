"""The process groups of a mesh, for one round. Where a rank stands in it is arithmetic: disttrain.api.mesh."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from disttrain.api.mesh import AXES, Mesh
from disttrain.api.runtime import JobConfig
from disttrain_trainer.errors import WrongInput


def mesh_of(config: JobConfig) -> Mesh:
    """The mesh of a job. Raises WrongInput, with the arithmetic, when its processes make none."""
    try:
        return Mesh.of(config.strategy, workers=config.workers, processes=config.processes_per_worker)
    except ValueError as error:
        raise WrongInput(str(error)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The groups of this rank in the present round."""

    mesh: DeviceMesh
    """With the axes of AXES."""
    data: dist.ProcessGroup
    """The ranks that hold the same part of the model and compute other parts of a batch, whether or not it is cut over them too."""
    data_ranks: tuple[int, ...]
    """They, by their data rank."""
    replicate: dist.ProcessGroup
    """The ranks that hold copies of the same state."""

    @classmethod
    def of(cls, mesh: Mesh, *, rank: int, device: str) -> "Groups":
        """Makes the groups: every rank of the round must call it. device: its type, such as cpu.

        Raises BrokenGroup when a peer is lost meanwhile.
        """
        made = init_device_mesh(device, mesh.shape, mesh_dim_names=AXES)
        if mesh.data == mesh.size:
            group = dist.group.WORLD
            assert group is not None
        else:
            group = made["replicate", "shard"]._flatten("data").get_group()
        return cls(mesh=made, data=group, data_ranks=mesh.data_ranks(rank), replicate=made.get_group("replicate"))
