"""Whether the ranks of a tensor group have the same gradients for what they hold together: asked once, before the first step.

A parameter that is not cut over the tensor axis has the same gradient on all of its ranks, or a plan is wrong: a norm that gets its part
of a sequence as a plain tensor, say. Each rank would train another one from there on, and none the model.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from disttrain_trainer.errors import WrongInput
from disttrain_trainer.parallel.sharded_model import Piece
from disttrain_trainer.parallel.trial import Print, tolerance


def require_equal_gradients(
    pieces: Sequence[tuple[Piece, torch.Tensor | None]],
    *,
    group: dist.ProcessGroup,
    size: int,
    field: str,
    computed_in: torch.dtype,
) -> None:
    """Compares the gradients over the ranks of a tensor group, which all call it with the same pieces.

    pieces: those that are not cut over that axis, with their gradients as they lie here. computed_in: the dtype of the products that they
    come from, where it is coarser than theirs. Raises WrongInput on every rank, which begins
    with the field and names the parameter whose gradients differ most.
    """
    if not pieces:
        return
    prints = [Print.of(gradient) if gradient is not None else None for _, gradient in pieces]
    width = 1 + len(Print.of(torch.zeros(1)).projections)
    rows = [(one.norm, *one.projections) if one is not None else (-1.0,) + (0.0,) * (width - 1) for one in prints]
    own = torch.tensor(rows, dtype=torch.float64, device=pieces[0][0].local.device)
    everyone = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(everyone, own, group=group)
    stacked = torch.stack(everyone)  # (ranks, pieces, width)
    spread = stacked - stacked[0]
    far = (2 * spread[..., 1:].square().mean(-1)).sqrt().amax(0)
    far = torch.maximum(far, spread[..., 0].abs().amax(0))
    norms = stacked[..., 0].amax(0).clamp(min=0)
    total = float(norms.square().sum().sqrt())
    rounding = [
        max(tolerance(piece.local.dtype), tolerance(computed_in) if piece.local.dtype is torch.float32 else 0.0)
        for piece, _ in pieces
    ]
    limits = torch.tensor(rounding, dtype=torch.float64, device=own.device)
    # A gradient that is nothing but rounding, as of a bias before a norm, may be another one on each rank.
    allowed = limits * torch.maximum(norms, limits * total)
    excess = far - allowed
    if bool((excess > 0).any()):
        piece = pieces[int(excess.argmax())][0]
        raise WrongInput(
            f"{field}: parameter {piece.name} has another gradient on each process of the tensor axis, so that they would train different "
            "models: its module gets a part of an activation as a plain tensor; put the module into the plan (SequenceParallel for a "
            "norm), or give it the whole activation (PrepareModuleInput with Replicate)"
        )
