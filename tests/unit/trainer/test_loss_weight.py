"""The divisor that is read from a loss's graph, and the losses of which none is."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from disttrain_trainer.errors import UserError
from disttrain_trainer.model.loss_weight import weight_of
from disttrain_trainer.model.objective import MOST_WEIGHTLESS, Objective

X = torch.arange(60.0).view(4, 5, 3).requires_grad_()
MASK = torch.arange(20).view(4, 5) % 3 == 0  # 7 tokens
EACH = X.square().mean(-1)
LOGITS = torch.arange(18.0).view(6, 3).requires_grad_()
TARGETS = torch.tensor([0, 1, 2, -100, 1, 1])
CLASSES = torch.tensor([0.5, 1.0, 2.0])


def of_targets(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits, TARGETS.view(-1))


def smoothed(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return functional.cross_entropy(logits, targets, label_smoothing=0.1, **options)


def sum_of_terms(first: Any, second: Any, third: Any) -> Tensor:
    return (EACH * MASK).sum() / first + EACH.sum() / second + EACH.square().sum() / third


@pytest.mark.parametrize(
    ("loss", "weight"),
    [
        (lambda: functional.cross_entropy(LOGITS, TARGETS), 5),
        (lambda: functional.cross_entropy(LOGITS, TARGETS, weight=CLASSES), 5.5),
        (lambda: functional.cross_entropy(LOGITS, TARGETS, label_smoothing=0.1), 5),
        (lambda: functional.cross_entropy(LOGITS, TARGETS, weight=CLASSES, label_smoothing=0.1), 5.5),
        (lambda: functional.cross_entropy(LOGITS, TARGETS, reduction="sum") / 5, 5),
        (lambda: functional.cross_entropy(LOGITS.half(), TARGETS).float(), 5),
        (lambda: functional.cross_entropy(LOGITS.view(2, 3, 3), TARGETS.view(2, 3)), 5),
        (lambda: functional.cross_entropy(LOGITS, torch.full((6,), -100)), 0),
        (lambda: smoothed(LOGITS, TARGETS.abs().clamp(max=2)), 6),
        (lambda: smoothed(LOGITS.view(2, 3, 3), TARGETS.view(2, 3)), 5),
        (lambda: smoothed(LOGITS.view(2, 3, 3), TARGETS.view(2, 3), weight=CLASSES), 5.5),
        (lambda: of_targets(LOGITS) + of_targets(LOGITS * 2), 5),
        (lambda: smoothed(LOGITS, TARGETS) + smoothed(LOGITS * 2, TARGETS), 5),
        (lambda: sum_of_terms(*[MASK.sum()] * 3), 7),
        (lambda: (EACH * MASK).sum() / MASK.sum(), 7),
        (lambda: (EACH * MASK).sum() / int(MASK.sum()), 7),
        (lambda: (EACH * MASK).sum((0, 1)) / MASK.sum(), 7),
        (lambda: -(EACH * MASK).sum() / MASK.sum(), 7),
        (lambda: ((EACH * MASK).sum().view(1).squeeze() / MASK.sum()).view(()).double(), 7),
        (lambda: (EACH * MASK).sum() / (MASK.sum() * 0), 0),
        (lambda: EACH[MASK].mean(), 7),
        (lambda: EACH.view(-1).mean(), 20),
        (lambda: X[MASK].mean(), 7),
        (lambda: (X - 1)[MASK].square().mean(), 7),
        (lambda: functional.mse_loss(X[MASK], torch.zeros(7, 3)), 7),
        (lambda: functional.smooth_l1_loss(EACH[MASK], torch.zeros(7)), 7),
        (lambda: functional.binary_cross_entropy_with_logits(X[MASK], torch.zeros(7, 3)), 7),
    ],
)
def test_what_a_loss_is_divided_by_is_read(loss: Callable[[], Tensor], weight: float) -> None:
    assert weight_of(loss()) == weight


@pytest.mark.parametrize(
    "loss",
    [
        lambda: EACH.mean(),  # of padded samples it is unknown which elements count
        lambda: functional.mse_loss(X, torch.zeros_like(X)),
        lambda: functional.mse_loss(X[MASK], torch.zeros(7, 3), reduction="sum"),
        lambda: EACH.sum(),
        lambda: (EACH * MASK).sum() / EACH.sum(),  # a gradient flows through the divisor
        lambda: (EACH * MASK).sum() / -7,
        lambda: (EACH * MASK).sum() / float("nan"),
        lambda: (EACH * MASK).sum() / MASK.sum() + X.square().sum(),
        lambda: (EACH * MASK).sum() / MASK.sum() + EACH.sum() / 20,
        # Terms whose weights are equal only here.
        lambda: sum_of_terms(MASK.sum(), MASK.sum(), MASK.sum()),
        lambda: sum_of_terms(7, 7, 7),
        lambda: of_targets(LOGITS) + functional.cross_entropy(LOGITS, TARGETS.flip(0)),
        lambda: smoothed(LOGITS, TARGETS) + smoothed(LOGITS, TARGETS.flip(0)),
        lambda: of_targets(LOGITS) + LOGITS.square().sum() / torch.tensor(5),
        lambda: X[MASK].mean() + X[MASK.flip(0, 1)].mean(),
        lambda: X.square().mean(0).sum() / 3,  # a mean over samples, of several outputs
        lambda: X.square().mean(-3).sum() / 3,
        lambda: X.square().mean(0).sqrt().sum() / 3,
        lambda: X.square().mean(0).view(-1).mean(),
        lambda: X.mean().sum() / 3,
        lambda: functional.cross_entropy(LOGITS, TARGETS) / 3,
        lambda: functional.cross_entropy(LOGITS, TARGETS.abs().clamp(max=2)[:, None].expand(6, 3).float()),
        lambda: (EACH * MASK).sum() / torch.ones(1) * 1,
    ],
)
def test_every_other_form_counts_by_samples(loss: Callable[[], Tensor]) -> None:
    assert weight_of(loss().squeeze()) is None


@pytest.mark.parametrize("sizes", [(3, 3), (5, 1), (1, 4, 1)])
def test_the_weighed_means_of_parts_have_the_gradient_of_one_process(sizes: tuple[int, ...]) -> None:
    def loss(samples: slice) -> Tensor:
        return functional.cross_entropy(LOGITS.double()[samples], TARGETS[samples])

    (expected,) = torch.autograd.grad(loss(slice(None)), LOGITS)
    gradient, total, start = torch.zeros_like(LOGITS), 0.0, 0
    for size in sizes:
        mean = loss(slice(start, start + size))
        weight = weight_of(mean)
        assert weight is not None
        if weight:
            gradient += torch.autograd.grad(mean * weight, LOGITS)[0]
        total, start = total + weight, start + size
    torch.testing.assert_close(gradient / total, expected, rtol=1e-6, atol=1e-7)


MODEL = nn.Linear(2, 1)


def masked(model: nn.Module, batch: Any) -> Tensor:
    x, mask = batch
    loss: Tensor = (model(x)[:, 0] * mask).sum() / mask.sum()
    return loss


def test_an_explicit_weight_wins_over_the_graph() -> None:
    batch = torch.ones(3, 2), torch.tensor([1, 1, 0])
    assert Objective(MODEL, masked)(batch, 3)[1] == 2
    assert Objective(MODEL, lambda model, batch: (masked(model, batch), 9))(batch, 3)[1] == 9


def test_a_mean_over_the_samples_has_no_weight_of_its_own_and_so_the_bits_of_before() -> None:
    assert Objective(MODEL, masked)((torch.ones(3, 2), torch.ones(3)), 3)[1] is None


def test_nothing_is_read_where_nothing_is_added_up() -> None:
    batch = torch.ones(3, 2), torch.tensor([1, 1, 0])
    assert Objective(MODEL, masked, reads_weights=False)(batch, 3)[1] is None


def test_a_loss_of_two_forms_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def either(model: nn.Module, batch: Any) -> Tensor:
        x, mask = batch
        return masked(model, batch) if mask.any() else model(x).sum() * 0

    objective = Objective(MODEL, either)
    with caplog.at_level(logging.WARNING):
        for mask in ([1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]):
            objective((torch.ones(3, 2), torch.tensor(mask)), 3)
    (record,) = caplog.records
    assert "return (mean, weight)" in record.getMessage()


def test_a_mask_that_never_leaves_anything_is_refused_by_name() -> None:
    objective, batch = Objective(MODEL, masked), (torch.ones(3, 2), torch.zeros(3))
    for _ in range(MOST_WEIGHTLESS - 1):
        assert objective(batch, 3)[1] == 0
    with pytest.raises(UserError, match=r"trainer\.loss divided by 0 in each of its first 50 calls"):
        objective(batch, 3)
