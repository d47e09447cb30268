"""The rules between trainer.gradientAccumulationSteps and the rest of the spec (docs/design/0022)."""

from disttrain.api.base import Rule


def rules(*, parts: str) -> tuple[Rule, ...]:
    """The rules of a DistTrainJobSpec. parts: CEL of the parts of a step, with the default resolved."""
    return (
        Rule(
            cel="self.trainer.gradientAccumulationSteps <= 1 || self.trainer.batchSize < 1 || "
            f"self.trainer.batchSize >= self.trainer.gradientAccumulationSteps * {parts}",
            check=lambda s: (
                s.trainer.gradient_accumulation_steps == 1
                or s.trainer.batch_size
                >= s.trainer.gradient_accumulation_steps * (s.trainer.parts_per_step or s.default_parts_per_step)
            ),
            message="must be at least gradientAccumulationSteps x partsPerStep (default: one for each data-parallel worker process)",
            field="trainer.batchSize",
            shows="trainer.batchSize",
        ),
        Rule(
            cel="self.trainer.gradientAccumulationSteps == 1 || !has(self.strategy.parameterServer) || "
            "self.strategy.parameterServer.localSteps == 1",
            check=lambda s: (
                s.trainer.gradient_accumulation_steps == 1
                or s.strategy.parameter_server is None
                or s.strategy.parameter_server.local_steps == 1
            ),
            message="localSteps above 1 cut a part into batches already: leave one of the two out",
            field="trainer.gradientAccumulationSteps",
            shows="trainer.gradientAccumulationSteps",
        ),
    )
