"""What a loss is the mean of, read from its autograd graph: the parts of a step must count by it, and not by their samples.

Be the loss of a part S / D, S a sum over the part. The mean of the parts' losses, weighed by their D, is then the sum of S over all
parts, divided by the sum of D. So D is the weight. That is what one process computes where D adds up over parts, as numbers of tokens do.
Where D does not (a constant), it is the sum of S up to a factor; weighing by samples gives that for equal parts only.

Not read, so that the part counts by its samples: a divisor that has a gradient, a numerator that is itself a mean over the samples, a sum
of terms of which one shows no weight or another one, and every other form.
"""

import math
from typing import Any

import torch

_PASSED = frozenset(
    {"ToCopyBackward0", "ViewBackward0", "SqueezeBackward0", "CloneBackward0", "NegBackward0", "MulBackward1"}
)
"""Of one input, whose mean is over the same: a cast, another view, the sign, a factor as in label smoothing."""
_CROSS_ENTROPY = frozenset({"NllLossBackward0", "NllLoss2DBackward0"})
_ELEMENTWISE = frozenset(
    {"MulBackward0", "PowBackward0", "SubBackward0", "AddBackward0", "AbsBackward0", "SqrtBackward0", *_PASSED}
)
_ELEMENT_LOSSES = frozenset(
    f"{name}Backward0"
    for name in ("MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits")
)
_MEAN = 1
"""torch's number of `reduction="mean"`."""
_DEPTH = 4
"""Operations between a sum and a mean over the samples that are looked through."""


def weight_of(loss: torch.Tensor) -> float | None:
    """The divisor of a loss, 0-dim and with a graph: the targets (by their class weights) of a cross entropy, the elements of a mean over
    one dimension, the rows of one over what a mask has picked, the D of sum / D. None: it is not to be read, or is no number of 0 or more.

    Waits for the device. Call it before backward, which frees what is read.
    """
    try:
        weight = _read(loss.grad_fn)
    except RuntimeError:  # what the graph saved was changed in place: backward says so
        return None
    return weight if weight is not None and math.isfinite(weight) and weight >= 0 else None


def _read(node: Any) -> float | None:
    if node is None:
        return None
    name = node.name()
    if name in _CROSS_ENTROPY:
        return _number(node._saved_total_weight) if node._saved_reduction == _MEAN else None
    if name in _PASSED:
        return _read(node.next_functions[0][0])
    if name == "DivBackward0":
        return _divisor(node)
    if name == "MeanBackward0":
        return _rows(node, node._saved_self_sym_sizes)
    if name in _ELEMENT_LOSSES:
        return _rows(node, node._saved_self.shape) if node._saved_reduction == _MEAN else None
    if name == "AddBackward0":
        first, second = (_read(term) for term, _ in node.next_functions)
        return first if first == second else None
    return None


def _divisor(node: Any) -> float | None:
    (numerator, _), (divisor, _) = node.next_functions
    while numerator is not None and numerator.name() in _PASSED:
        numerator = numerator.next_functions[0][0]
    if (
        divisor is not None
        or numerator is None
        or numerator.name() not in {"SumBackward0", "SumBackward1", *_CROSS_ENTROPY}
    ):
        return None
    if numerator.name() in _CROSS_ENTROPY:
        return _number(node._saved_other) if numerator._saved_reduction != _MEAN else None
    if not numerator._saved_self_sym_sizes or _is_mean_of_samples(numerator):
        return None
    return _number(node._saved_other)


def _rows(node: Any, sizes: Any) -> float | None:
    """Of a mean over all elements: those of the first dimension, where it is the only one, or what a mask or an index has picked. Else the
    samples may lie along another dimension."""
    is_known = len(sizes) == 1 or (len(sizes) > 1 and _is_picked(node))
    return float(sizes[0]) if is_known and not _is_mean_of_samples(node) else None


def _is_picked(node: Any, depth: int = _DEPTH) -> bool:
    """Whether elements of an input were picked, as by `x[mask]`."""
    for source, _ in node.next_functions:
        name = source.name() if source is not None else ""
        if name == "IndexBackward0" or (name in _ELEMENTWISE and depth and _is_picked(source, depth - 1)):
            return True
    return False


def _is_mean_of_samples(node: Any, depth: int = _DEPTH) -> bool:
    """Whether an input is a mean over the first dimension: then the parts count by their samples, whatever it is divided by."""
    for source, _ in node.next_functions:
        if source is None:
            continue
        name = source.name()
        if name == "MeanBackward0":
            return True
        if name == "MeanBackward1":
            dimensions = len(source._saved_self_sym_sizes)
            # Numbers of dimensions are kept as unsigned ones: -1 is 2^64 - 1. None of them means all.
            if any(number in {0, (1 << 64) - dimensions} for number in source._saved_dim or (0,)):
                return True
        if name in _ELEMENTWISE and depth and _is_mean_of_samples(source, depth - 1):
            return True
    return False


def _number(tensor: Any) -> float | None:
    """Of a tensor of one element. Not of a subclass, such as a DTensor, whose value may take a message to other ranks."""
    return float(tensor.item()) if type(tensor) is torch.Tensor and not tensor.dim() else None
