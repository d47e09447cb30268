"""What a user's trainer.parallelize, or the plan that is found, makes of models as others write them: one process's result, or one line."""

from typing import Any

import pytest
import torch

from training import plan_ranks
from training.mesh_ranks import MeshRanks


def trained(
    ranks: MeshRanks,
    plan: str | None,
    *,
    data: int = 1,
    sharding: str = "Replicated",
    loss: str = "loss",
    **options: Any,
) -> tuple[Any, list[Any]]:
    job = plan_ranks.config(data=data, plan=plan, sharding=sharding, options=options, loss=loss)
    return job, ranks.run(2 * data, plan_ranks.train, job)


@pytest.mark.parametrize(
    "how",
    [
        {"plan": "plain"},
        {"plan": "plain", "dropout": 0.2},
        {"plan": "sequence"},
        {"plan": "sequence", "loss": "parallel_loss", "loss_parallel": True},
        {"plan": "sequence", "data": 2},
        {"plan": "sequence", "data": 2, "sharding": "FullyShard"},
        {"plan": "sequence_then_shard", "data": 2, "sharding": "FullyShard"},
        {"plan": "shard_blocks", "data": 2, "sharding": "FullyShard"},
        {"plan": "tied_again", "tied": True},
        {"plan": None, "dropout": 0.2},
        {"plan": None, "ffn": "gated"},
        {"plan": None, "ffn": "gated", "data": 2, "sharding": "FullyShard"},
        {"plan": None, "ffn": "moe"},
        {"plan": None, "attention": "fused", "tied": True},
    ],
    ids=lambda how: "-".join(str(value) for value in how.values()),
)
def test_a_plan_computes_what_one_process_does(ranks: MeshRanks, how: dict[str, Any]) -> None:
    job, found = trained(ranks, **how)
    expected = plan_ranks.alone(job, count=how.get("data", 1))
    for state in found:
        assert isinstance(state, dict), state
        far = max((value - expected[name]).abs().max().item() for name, value in state.items())
        assert far < 1e-12
        assert state.keys() == expected.keys()


@pytest.mark.parametrize(("data", "sharding"), [(1, "Replicated"), (2, "FullyShard")])
def test_a_model_that_lay_in_files_is_that_which_lay_in_memory(ranks: MeshRanks, data: int, sharding: str) -> None:
    job, found = trained(ranks, None, data=data, sharding=sharding, tied=True)
    out_of_files = ranks.run(2 * data, plan_ranks.train_out_of_files, job)
    for state, other in zip(found, out_of_files, strict=True):
        assert isinstance(other, dict), other
        assert all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            {"plan": "own_mesh"},
            "cuts layers.0.attention.wq.weight over a mesh of its own (axes tp): use the mesh that it is given",
        ),
        ({"plan": "other_axis"}, "asks the mesh for an axis that it does not have"),
        ({"plan": "data_axis", "data": 2}, "cuts layers.0.attention.wq.weight over the axis replicate"),
        (
            {"plan": "shard_blocks", "data": 2},
            "calls fully_shard on layers.0, but strategy.dataParallel.sharding is Replicated",
        ),
        (
            {"plan": "shard_without_a_mesh", "data": 2, "sharding": "FullyShard"},
            'calls fully_shard on the model with another mesh than mesh["shard"]',
        ),
        (
            {"plan": "untied", "tied": True},
            "makes two parameters of output.weight and tok_embeddings.weight, which are tied",
        ),
        ({"plan": "all_heads"}, "once the model is cut, module layers.0.attention.wo returns something else"),
        (
            {"plan": "renamed"},
            "renames parameters (layers.0.attention.wk.weight is wrapped.layers.0.attention.wk.weight now)",
        ),
        ({"plan": "frozen"}, "changes parameter norm.weight: its requires_grad was True and is False"),
        ({"plan": "nothing"}, "returned a NoneType; expected the model"),
        ({"plan": "forgotten_norm"}, "has another gradient on each process of the tensor axis"),
        (
            {"plan": "plain", "inner_dropout": True},
            "layers.0.feed_forward.inner draws dropout for a part of an activation",
        ),
        (
            {"plan": "sequence", "dropout": 0.3},
            "layers.0.dropout draws dropout for a part of an activation",
        ),
    ],
    ids=lambda value: value["plan"] if isinstance(value, dict) else "",
)
def test_a_plan_that_trains_something_else_is_refused_by_name(ranks: MeshRanks, how: dict[str, Any], says: str) -> None:
    _, found = trained(ranks, **how)
    for refusal in found:
        assert isinstance(refusal, str), "it was trained"
        assert refusal.startswith("WrongInput: trainer.parallelize")
        assert says in refusal
        assert "\n" not in refusal


def test_attention_in_bfloat16_is_cut_though_it_rounds(ranks: MeshRanks) -> None:
    for placements in ranks.run(2, plan_ranks.cut_in_bfloat16):
        assert placements == ["(Shard(dim=0),)", "(Shard(dim=1),)", "(Shard(dim=0),)", "(Shard(dim=0),)"]
