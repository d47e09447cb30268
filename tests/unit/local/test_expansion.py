"""$(NAME) is replaced where and as a kubelet would."""

from __future__ import annotations

import pytest

from disttrain.local.expansion import expanded


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("rank=$(RANK) of $(WORLD_SIZE)", "rank=1 of 2"),
        ("$(RANK)$(RANK)", "11"),
        ("$(NONE) $RANK ${RANK}", "$(NONE) $RANK ${RANK}"),
        ("$$(RANK) $$$(RANK) $$", "$(RANK) $1 $"),
        ("$(RANK", "$(RANK"),
        ("$() $", "$() $"),
        ("$(EMPTY)", ""),
        ("$($(RANK))", "$($(RANK))"),
    ],
)
def test_by_the_rule_of_kubernetes(text: str, becomes: str) -> None:
    assert expanded(text, {"RANK": "1", "WORLD_SIZE": "2", "EMPTY": ""}) == becomes
