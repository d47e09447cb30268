"""spec.trainer.precision: in which numbers a step is computed."""

from enum import StrEnum


class Precision(StrEnum):
    FLOAT32 = "Float32"
    """As the model's parameters are."""
    BFLOAT16 = "BFloat16"
    """What torch.autocast computes in bfloat16; parameters, gradients and the optimiser's state stay float32."""
