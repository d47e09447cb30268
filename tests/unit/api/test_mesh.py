"""Where each rank stands in the mesh, and which meshes there are none of."""

import pytest

from disttrain.api.mesh import Coordinate, Mesh
from disttrain.api.strategy import Strategy


def mesh(workers: int = 1, processes: int = 1, /, *, tensor: int = 0, pipeline: int = 1, **data: object) -> Mesh:
    fields: dict[str, object] = {"type": "Hybrid" if tensor else "DataParallel", "dataParallel": data}
    if tensor:
        fields["modelParallel"] = {"tensor": tensor, "pipeline": pipeline}
    return Mesh.of(Strategy.model_validate(fields), workers=workers, processes=processes)


def test_each_strategy_fills_the_axes_from_the_processes_that_there_are() -> None:
    assert mesh(4) == Mesh(replicate=4)
    assert mesh(2, 2, sharding="FullyShard") == Mesh(shard=4)
    assert mesh(4, sharding="HybridShard", shardSize=2) == Mesh(replicate=2, shard=2)
    assert mesh(8, tensor=2, pipeline=2) == Mesh(pipeline=2, replicate=2, tensor=2)
    assert mesh(8, tensor=2, sharding="FullyShard") == Mesh(shard=4, tensor=2)


def test_by_default_the_processes_of_a_pod_share_a_copy() -> None:
    assert mesh(3, 4, sharding="HybridShard") == Mesh(replicate=3, shard=4)
    assert mesh(2, 4, tensor=2, sharding="HybridShard") == Mesh(replicate=2, shard=2, tensor=2)
    assert mesh(4, tensor=2, sharding="HybridShard") == Mesh(replicate=2, tensor=2)


def test_ranks_of_a_tensor_group_are_neighbours_and_stages_lie_far_apart() -> None:
    cube = Mesh(pipeline=2, replicate=2, shard=1, tensor=2)
    assert cube.coordinate(5) == Coordinate(pipeline=1, replicate=0, shard=0, tensor=1)
    assert [cube.rank(cube.coordinate(rank)) for rank in range(8)] == list(range(8))
    assert cube.replicas() == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert cube.replicas_of(6) == (4, 6)


def test_ranks_that_compute_the_same_parts_share_a_data_rank_and_one_of_them_counts() -> None:
    cube = Mesh(pipeline=2, replicate=2, shard=1, tensor=2)
    assert [cube.data_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [rank for rank in range(8) if cube.counts(rank)] == [4, 6]
    assert cube.data_ranks(7) == (5, 7)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tensor": 2, "pipeline": 2}, r"2 x pipeline 2 = 4 processes .* 3 workers x 2 = 6: make that a multiple"),
        ({"sharding": "HybridShard", "shardSize": 4}, r"4 processes share .* and 6 are data parallel \(6 / 1\)"),
    ],
)
def test_processes_that_make_no_mesh_are_refused_with_the_arithmetic(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mesh(3, 2, **fields)  # type: ignore[arg-type]
