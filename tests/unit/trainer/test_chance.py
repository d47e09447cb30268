"""Dropout is a function of seed, part, micro-batch and module, whatever was drawn before."""

import torch
from torch import nn

from disttrain_trainer.parallel.chance import Chance

CPU = torch.device("cpu")


class Drawing(nn.Module):
    """Draws in its own forward()."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(x.shape)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(8, 8), Drawing()), nn.Dropout(0.5))


def drawn(chance: Chance, module: nn.Module, *, part: int = 3, microbatch: int = 1) -> torch.Tensor:
    chance.begin(part, microbatch)
    found: torch.Tensor = module(torch.ones(64, 8))
    return found


def test_a_module_draws_the_same_alone_and_in_the_model() -> None:
    torch.manual_seed(0)
    whole = model()
    chance = Chance(whole, seed=7, device=CPU)
    seen: list[torch.Tensor] = []
    whole[2].register_forward_hook(lambda module, inputs, output: seen.append(output == 0))
    drawn(chance, whole)
    assert torch.equal(drawn(chance, whole[2]) == 0, seen[0])
    assert torch.equal(drawn(chance, whole[1][1]), drawn(chance, whole[1][1]))


def test_any_other_key_draws_something_else() -> None:
    keyed = [
        drawn(
            Chance(made := nn.Sequential(*(nn.Dropout(0.5) for _ in range(5))), seed=seed, device=CPU),
            made[module],
            part=part,
            microbatch=micro,
        )
        for seed, part, micro, module in ((7, 3, 1, 2), (8, 3, 1, 2), (7, 4, 1, 2), (7, 3, 2, 2), (7, 3, 1, 4))
    ]
    assert not any(torch.equal(one, two) for number, one in enumerate(keyed) for two in keyed[:number])


def test_a_module_that_is_called_twice_draws_twice() -> None:
    drop = nn.Sequential(nn.Dropout(0.5))
    chance = Chance(drop, seed=7, device=CPU)
    chance.begin(0, 0)
    first, second = drop[0](torch.ones(64)), drop[0](torch.ones(64))
    assert not torch.equal(first, second)


def test_what_a_loss_draws_after_the_model_does_not_depend_on_it() -> None:
    found = []
    for depth in (1, 4):
        deep = nn.Sequential(*(nn.Dropout(0.5) for _ in range(depth)))
        drawn(Chance(deep, seed=7, device=CPU), deep)
        found.append(torch.rand(3))
    assert torch.equal(*found)
