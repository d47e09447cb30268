"""The order between namespaces, and how many of one are inside at a time."""

from __future__ import annotations

import asyncio

from disttrain.controller.turns import Slots, Turns, share


def test_namespaces_take_turns_and_within_one_the_first_comes_first() -> None:
    turns: Turns[int] = Turns()
    for number in range(3):
        turns.append("flood", number)
    turns.append("team", 10)
    assert [turns.pop() for _ in range(5)] == [("flood", 0), ("team", 10), ("flood", 1), ("flood", 2), None]
    assert len(turns) == 0


def test_namespace_that_may_not_enter_keeps_its_place() -> None:
    turns: Turns[int] = Turns()
    turns.append("full", 1)
    turns.append("team", 2)
    assert turns.pop(lambda namespace: namespace != "full") == ("team", 2)
    assert turns.pop(lambda namespace: namespace != "full") is None
    assert turns.pop() == ("full", 1)


async def test_one_namespace_leaves_slots_to_the_others() -> None:
    slots, inside = Slots(8), list[str]()
    leave = asyncio.Event()

    async def visit(namespace: str) -> None:
        async with slots.of(namespace):
            inside.append(namespace)
            await leave.wait()

    flood = [asyncio.create_task(visit("flood")) for _ in range(100)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert inside == ["flood"] * share(8)
    visitor = asyncio.create_task(visit("team"))
    await asyncio.sleep(0.01)
    assert inside[-1] == "team"
    leave.set()
    await asyncio.gather(visitor, *flood)
    assert len(inside) == 101


async def test_slot_of_one_that_was_cancelled_is_free_again() -> None:
    slots = Slots(1)
    async with slots.of("team"):
        waiting = [asyncio.create_task(_inside(slots)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
    # The second was let in at the moment at which it is cancelled.
    waiting[1].cancel()
    await asyncio.wait_for(waiting[2], 5)
    async with asyncio.timeout(5), slots.of("team"):
        pass


async def _inside(slots: Slots) -> None:
    async with slots.of("team"):
        await asyncio.sleep(0)
