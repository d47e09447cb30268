"""How a Lease is lost: the loss is reported, whatever the reason, and what the Lease allowed ends with it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disttrain.controller.leader import LEASE_SECONDS, RENEW_SECONDS, leadership
from disttrain.controller.metrics import REGISTRY
from disttrain.controller.settings import Settings
from disttrain.kube.api import Unavailable
from unit.controller.hand_turned import hand_turned, now

SETTINGS = Settings(leader_elect=True)


class LeaseServer:
    """Has one Lease, and fails when the test says so."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] = {"metadata": {"resourceVersion": "1"}, "spec": {}}
        self.error: Exception | None = None

    async def get(self, *_: object) -> dict[str, Any]:
        if self.error:
            raise self.error
        return self.lease

    async def patch(self, _: object, __: object, ___: object, patch: dict[str, Any]) -> None:
        self.lease["spec"] = {**(self.lease.get("spec") or {}), **patch["spec"]}


def leads() -> float | None:
    return REGISTRY.get_sample_value("disttrain_operator_leader")


@pytest.mark.parametrize(
    ("error", "most"),
    [
        pytest.param(Unavailable(0, "Timeout", "no answer"), RENEW_SECONDS + 2, id="server that is away"),
        pytest.param(ValueError("no JSON"), RENEW_SECONDS + 2, id="anything else"),
    ],
)
@hand_turned
async def test_lease_that_cannot_be_renewed_is_lost_before_another_may_take_it(error: Exception, most: float) -> None:
    server, lost = LeaseServer(), asyncio.Event()
    async with leadership(SETTINGS, server, lost=lost.set):  # type: ignore[arg-type]
        await asyncio.sleep(60)
        assert (leads(), lost.is_set()) == (1, False)
        server.error, began = error, now()
        async with asyncio.timeout(3600):
            await lost.wait()
        assert now() - began <= most < LEASE_SECONDS
        assert leads() == 0


@hand_turned
async def test_lease_that_is_left_in_order_is_not_lost() -> None:
    server, lost = LeaseServer(), asyncio.Event()
    async with leadership(SETTINGS, server, lost=lost.set):  # type: ignore[arg-type]
        await asyncio.sleep(60)
    await asyncio.sleep(60)
    assert not lost.is_set()
    assert server.lease["spec"]["holderIdentity"] == ""


@pytest.mark.parametrize("spec", [None, {}, {"leaseTransitions": None, "holderIdentity": None, "later": {"a": 1}}])
@hand_turned
async def test_lease_that_another_tool_or_version_made_is_taken(spec: dict[str, Any] | None) -> None:
    server = LeaseServer()
    server.lease["spec"] = spec
    if spec is None:
        del server.lease["spec"]
    async with asyncio.timeout(60), leadership(SETTINGS, server, lost=lambda: None):  # type: ignore[arg-type]
        assert server.lease["spec"]["holderIdentity"]
        assert server.lease["spec"]["leaseTransitions"] == 1
        assert server.lease["spec"].get("later") == (spec or {}).get("later")
