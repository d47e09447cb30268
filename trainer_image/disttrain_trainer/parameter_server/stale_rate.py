"""The learning rate of a stale gradient. Pure.

The staleness of a gradient on a shard is the shard's version when the gradient is applied, minus the version of the parameters that it is
of: the updates between the two. A gradient of the current parameters has staleness 0.

Zhang, Gupta, Lian and Liu, "Staleness-aware async-SGD for distributed deep learning", IJCAI 2016, arXiv 1511.05950: the learning rate of
each gradient is divided by its staleness.
"""

from disttrain.api.strategy import StaleLearningRate


def rate_factor(rule: StaleLearningRate, staleness: int) -> float:
    """What the learning rate is multiplied by for a gradient of this staleness, 0 or more. Inverse: 1 for 0 and 1."""
    return 1.0 / max(1, staleness) if rule is StaleLearningRate.INVERSE else 1.0
