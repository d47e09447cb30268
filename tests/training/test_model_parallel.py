"""A model cut into tensor and pipeline parts computes what one process computes with the same parts and micro-batches."""

from typing import Any

import pytest

from disttrain.api.strategy import Schedule
from training import mesh_models, mesh_users
from training.mesh_ranks import MeshRanks


def difference(ranks: MeshRanks, options: dict[str, Any], *, stages: int = 1, shards: int = 1, **how: Any) -> float:
    found = ranks.run(stages * shards, mesh_models.on_mesh, options, stages=stages, shards=shards, **how)
    how.pop("order", None)
    how.pop("recomputes", None)
    if stages == 1:
        how["microbatch"] = None
    return mesh_models.difference(mesh_models.alone(options, **how), found)


EVERY = pytest.mark.parametrize("order", list(Schedule))


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"frozen": True}], ids=["free", "tied", "frozen"])
def test_a_layer_on_two_processes_is_that_of_one(ranks: MeshRanks, options: dict[str, Any]) -> None:
    assert difference(ranks, options, shards=2) < 1e-12


@EVERY
def test_a_pipeline_with_dropout_buffers_and_a_smaller_last_batch_is_one_process(
    ranks: MeshRanks, order: Schedule
) -> None:
    assert difference(ranks, {}, stages=2, order=order) < 1e-12


@EVERY
def test_a_pipeline_trains_what_comes_after_a_frozen_stage(ranks: MeshRanks, order: Schedule) -> None:
    assert difference(ranks, {"frozen": True}, stages=2, order=order) < 1e-12


@EVERY
def test_stages_that_backward_computes_again_have_the_same_dropout_and_buffers(
    ranks: MeshRanks, order: Schedule
) -> None:
    assert difference(ranks, {}, stages=2, order=order, recomputes=True) < 1e-12


def test_a_cut_layer_that_backward_computes_again_is_that_of_one_process(ranks: MeshRanks) -> None:
    assert difference(ranks, {}, shards=2, recomputes=True) < 1e-12


@EVERY
def test_a_layer_on_two_processes_of_each_of_two_stages_is_one_process(ranks: MeshRanks, order: Schedule) -> None:
    assert difference(ranks, {}, stages=2, shards=2, order=order) < 1e-12


@EVERY
@pytest.mark.parametrize("idle", [None, 1])
def test_stages_that_are_cut_are_gathered_and_summed_once_a_step(
    ranks: MeshRanks, order: Schedule, idle: int | None
) -> None:
    for wrapped, steps in ranks.run(4, mesh_models.collectives_of_steps, order, idle=idle):
        gathers, sums = steps[0]
        assert 0 < gathers == sums <= wrapped  # one that has all its parameters in another has none of its own
        assert steps[1] == steps[0]


@pytest.mark.parametrize(
    "mesh", [{"shards": 2}, {"stages": 2, "order": Schedule.ONE_FORWARD_ONE_BACKWARD}], ids=["tensor", "pipeline"]
)
def test_in_fp32_sgd_stays_near(ranks: MeshRanks, mesh: dict[str, Any]) -> None:
    assert difference(ranks, {"dtype": "float32"}, name="SGD", **mesh) < 1e-6


def test_a_loss_without_a_weight_counts_by_samples(ranks: MeshRanks) -> None:
    how = {"order": Schedule.ONE_FORWARD_ONE_BACKWARD, "of": mesh_users.mean_loss, "microbatch": 3}
    assert difference(ranks, {}, stages=2, **how) < 1e-12


@EVERY
def test_named_values_of_a_pipeline_are_means_over_each_micro_batch_once(ranks: MeshRanks, order: Schedule) -> None:
    last = [steps for steps in ranks.run(2, mesh_models.values_of_steps, order) if steps[0][0] is not None]
    assert len(last) == 1
    for values, expected in last[0]:
        assert values == pytest.approx({"first": expected})


def test_attention_that_would_compute_something_else_in_parts_is_refused(ranks: MeshRanks) -> None:
    for says in ranks.run(2, mesh_models.refusal_of_wide):
        assert "no plan for 0 of trainer.model: it computes something else once its heads are shared out" in says


def test_the_forward_of_a_pipeline_gives_every_process_the_models_output(ranks: MeshRanks) -> None:
    for found, expected, undisturbed in ranks.run(2, mesh_models.answers):
        assert undisturbed
        assert str(found) == str(expected)


def test_an_output_that_no_process_can_send_needs_the_whole_model_on_every_process(ranks: MeshRanks) -> None:
    for found, _, _ in ranks.run(2, mesh_models.answers, {1, 2}):
        assert found == "trainer.model returns a set, which does not go from one process to another"
