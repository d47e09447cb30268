"""The clip of a gradient by its norm: trainer.maxGradientNorm, with the numbers of torch.nn.utils.clip_grad_norm_."""

from disttrain_trainer.model.flat import Vectors, norm

_EPSILON = 1e-6
"""Added to the norm, as torch does."""


def coefficient(norm: float, most: float) -> float:
    """What a gradient of this norm is multiplied by so that its norm is at most `most`: at most 1. As in torch, an infinite norm gives 0
    and NaN gives NaN."""
    factor = most / (norm + _EPSILON)
    return 1.0 if factor > 1.0 else factor


def clip(gradients: Vectors, most: float) -> float:
    """Scales the gradients in place to a norm of at most `most`; returns the norm before, over all of them."""
    before = norm(gradients)
    factor = coefficient(before, most)
    if factor != 1.0:
        for vector in gradients:
            vector.mul_(factor)
    return before
