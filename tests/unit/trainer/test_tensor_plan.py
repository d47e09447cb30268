"""What of a model tensor parallel cuts by itself, and what it refuses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from disttrain_trainer.errors import WrongInput
from disttrain_trainer.examples import charlm
from disttrain_trainer.parallel import tensor
from disttrain_trainer.parallel.tensor import Pair, plan_of


class Linears(nn.Module):
    """Linears a, b, c, d of the width 8, and 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads = 4
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.drop = nn.Dropout(0.5)


class Gated(Linears):
    def forward(self, x: torch.Tensor) -> Any:
        return self.c(F.silu(self.a(x)) * self.b(x))


class ByHand(Linears):
    """Attention in single operations."""

    def forward(self, x: torch.Tensor) -> Any:
        batch, length, _ = x.shape
        q, k, v = (one(x).view(batch, length, self.n_heads, 2).transpose(1, 2) for one in (self.a, self.b, self.c))
        scores = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return self.d((scores @ v).transpose(1, 2).reshape(batch, length, -1))


class Wide(Linears):
    """Attention that takes the width of a head from that of the whole."""

    def forward(self, x: torch.Tensor) -> Any:
        batch, length, width = x.shape
        q, k, v = (one(x).view(batch, length, -1, width // 4).transpose(1, 2) for one in (self.a, self.b, self.c))
        return self.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


class Dropping(Linears):
    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.drop(torch.relu(self.a(x))))


class Residual(Linears):
    def forward(self, x: torch.Tensor) -> Any:
        return self.b(torch.relu(self.a(x)) + x)


class SoftMixed(Linears):
    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.a(x).softmax(-1))


class UsedTwice(Linears):
    def forward(self, x: torch.Tensor) -> Any:
        hidden = torch.relu(self.a(x))
        return self.b(hidden) + hidden


class Depends(Linears):
    def forward(self, x: torch.Tensor) -> Any:
        return self.b(torch.relu(self.a(x))) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("module", "pairs"),
    [
        (nn.Sequential(nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 2)), [Pair(("0",), "2", attention=False)]),
        (Gated(), [Pair(("a", "b"), "c", attention=False)]),
        (ByHand(), [Pair(("a", "b", "c"), "d", attention=True)]),
        (charlm.Attention(width=8, heads=4), [Pair(("q", "k", "v"), "o", attention=True)]),
        (Residual(), []),
        (SoftMixed(), []),
        (UsedTwice(), []),
        (Depends(), []),
        (nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Linear(8, 2)), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_is_certain_is_cut(module: nn.Module, pairs: list[Pair]) -> None:
    assert plan_of(module).pairs == pairs


def test_dropout_between_two_linears_keeps_them_whole() -> None:
    plan = plan_of(Dropping())
    assert (plan.pairs, plan.dropout) == ([], ["a", "b"])


class Three:
    """A mesh of three processes, of which a refusal asks no more."""

    def size(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)),
            "no plan for 0 of trainer.model: 8 outputs of 0 cannot be shared by 3 processes (8 / 3 leaves 2)",
        ),
        (
            nn.Sequential(charlm.Attention(width=12, heads=4)),
            "no plan for 0 of trainer.model: 4 heads (heads) cannot be shared by 3 processes (4 / 3 leaves 1)",
        ),
        (
            nn.Sequential(nn.Conv2d(1, 1, 1), Depends()),
            "no plan for 1 of trainer.model: its forward() cannot be read (TraceError",
        ),
        (
            nn.Sequential(nn.Linear(2, 2)),
            "no plan for the model of trainer.model: no two Linears in it follow one another",
        ),
        (
            nn.Sequential(Dropping()),
            "no plan for 0.a of trainer.model: there is dropout between it and the next Linear",
        ),
        (nn.TransformerEncoderLayer(8, 2), "no plan for the model of trainer.model: its forward() cannot be read"),
    ],
    ids=["outputs", "heads", "unreadable", "one Linear", "dropout", "torch's own"],
)
def test_what_has_no_plan_is_refused_by_name_in_one_line(model: nn.Module, says: str) -> None:
    with pytest.raises(WrongInput) as error:
        tensor.apply(model, Three())  # type: ignore[arg-type]
    assert says in str(error.value)
    assert "\n" not in str(error.value)
