"""What a loss is the mean of, read from its autograd graph: the parts of a step must count by it, and not by their samples.

Let the loss of a part be S / D, S a sum over the part. The mean of the parts' losses, weighed by their D, is then the sum of S over all
parts, divided by the sum of D. So D is the weight. That is what one process computes where D adds up over parts, as numbers of tokens do.
Where D does not (a constant), it is the sum of S up to a factor; weighing by samples gives that for equal parts only.

A sum of terms has a weight where all are means over the very same: the two terms of one cross entropy with label smoothing, cross
entropies of the same targets, sums that the same tensor divides. Weights that are equal in one part may differ in another one.

Not read, so that the part counts by its samples: a divisor that has a gradient, a numerator that is itself a mean over the samples, every
other sum of terms, and every other form.
"""

import math
from typing import Any

import torch

_PASSED = frozenset(
    {"ToCopyBackward0", "ViewBackward0", "SqueezeBackward0", "CloneBackward0", "NegBackward0", "MulBackward1"}
)
"""Of one input, whose mean is over the same: a cast, another view, the sign, a factor as in label smoothing."""
_SMOOTHING = ("SumBackward0", "MaskedFillBackward0", "NegBackward0", "SumBackward1")
"""From the divisor of the second term of a cross entropy with label smoothing up to its class weights, or its log_softmax (ATen,
cross_entropy_loss_label_smoothing)."""
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
        return first if first == second and _basis(node) is not None else None
    return None


def _basis(node: Any) -> tuple[Any, ...] | None:
    """What a mean is over: the targets, class weights and ignored class of a cross entropy, or the divisor. None: it is not known, or not
    the same in all terms of a sum."""
    node = _past_factors(node)
    name = node.name() if node is not None else ""
    if name in _CROSS_ENTROPY:
        return node._saved_target, node._saved_weight, node._saved_ignore_index
    if name == "DivBackward0":
        return (node._saved_other,)
    if name != "AddBackward0":
        return None
    first, second = (term for term, _ in node.next_functions)
    basis = _basis(first)
    if _is_smoothing(second, of=first):
        return basis
    other = _basis(second)
    known = basis is not None and other is not None and len(basis) == len(other)
    return basis if known and all(map(_is_same, basis or (), other or ())) else None


def _is_smoothing(term: Any, *, of: Any) -> bool:
    """Whether it is the second term of the cross entropy whose first term is `of`."""
    term, of = _past_factors(term), _past_factors(of)
    if term is None or term.name() != "DivBackward0" or of is None or of.name() not in _CROSS_ENTROPY:
        return False
    for name in _SMOOTHING:
        term = term.next_functions[0][0]
        if term is None or term.name() != name:
            return False
    scores = [node.next_functions[0][0] for node in (term, of)]
    for number, passed in enumerate(
        ("MulBackward0", "ViewBackward0")
    ):  # class weights; more dimensions than the kernel takes
        if scores[number] is not None and scores[number].name() == passed:
            scores[number] = scores[number].next_functions[0][0]
    return scores[0] is not None and scores[0] is scores[1] and scores[0].name() == "LogSoftmaxBackward0"


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values that graphs have saved are one: tensors of the same memory, or equal ones that are none."""
    if isinstance(one, torch.Tensor) != isinstance(other, torch.Tensor):
        return False
    if type(one) is torch.Tensor and type(other) is torch.Tensor:
        first, second = ((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in (one, other))
        return first == second
    return one is other if isinstance(one, torch.Tensor) else bool(one == other)


def _past_factors(node: Any) -> Any:
    """The first operation that is none of `_PASSED`."""
    while node is not None and node.name() in _PASSED:
        node = node.next_functions[0][0]
    return node


def _divisor(node: Any) -> float | None:
    (numerator, _), (divisor, _) = node.next_functions
    numerator = _past_factors(numerator)
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
